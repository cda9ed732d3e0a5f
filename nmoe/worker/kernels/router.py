"""The only router: `noaux_tc` of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2; transformers' modeling_deepseek_v3.py).

Shape suffixes: T tokens, D hidden, E routed experts, G groups of experts, K experts per token.
"""

import torch
import torch.nn.functional as F

from nmoe.architecture import Architecture
from nmoe.worker.kernels.lists import Routes


def route(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor,
    architecture: Architecture,
    *,
    listed: bool = False,
) -> Routes:
    """The experts of each token and their weights; on the GPU also grouped by expert, if `listed`.

    Sigmoid scores in float32. The bias affects which experts are chosen, never their weights: first choose the groups
    whose two best biased scores have the highest sums, then the best biased scores within them. Ties go to the lower
    id. Slots are in descending order of biased score. `weight_ED` and `bias_E` are float32.
    """
    a = architecture
    scores_TE = F.linear(x_TD.float(), weight_ED).sigmoid_()
    ids_TK = choose(scores_TE, bias_E, a)
    weights_TK = scores_TE.gather(1, ids_TK)
    if a.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return Routes(ids_TK, weights_TK * a.routed_scaling_factor)


def choose(scores_TE: torch.Tensor, bias_E: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Choose experts by their scores, int64 [T, K]."""
    a = architecture
    biased_TE = scores_TE + bias_E
    if a.topk_group < a.n_group:
        biased_TGS = biased_TE.view(len(biased_TE), a.n_group, a.num_experts // a.n_group)
        groups_TG = biased_TGS.topk(2, dim=-1).values
        groups_TG = groups_TG[..., 0] + groups_TG[..., 1]
        dropped = _ranked(groups_TG)[:, a.topk_group :]
        drop_TG = torch.zeros_like(groups_TG, dtype=torch.bool).scatter_(1, dropped, True)
        biased_TE = biased_TGS.masked_fill(drop_TG[..., None], -torch.inf).flatten(1)
    return _ranked(biased_TE)[:, : a.num_experts_per_tok]


def _ranked(scores: torch.Tensor) -> torch.Tensor:
    """Indices in descending order of score; topk would leave the order of equal scores to chance."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices
