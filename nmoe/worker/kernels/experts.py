"""The routed experts of one rank: gated MLPs (arXiv 2002.05202) over the tokens that chose them.

Shape suffixes: T tokens, K experts per token, D hidden, F intermediate of an expert, E experts of this rank.
"""

import dataclasses

import torch
import torch.nn.functional as F

from nmoe.worker.kernels.lists import Routes


@dataclasses.dataclass(frozen=True, slots=True)
class Arrived:
    """Rows sent by other ranks, in place of the tokens of a `grouped_mlp` on the GPU: they are scattered, and only the
    device knows how many there are. The accompanying routes have S rows; those beyond the rows that arrived are
    undefined. A row's ids in [0, E) come first; its other ids are E and in no list."""

    values_CD: torch.Tensor  # bfloat16, or float8_e4m3fn with scales
    scales_CG: torch.Tensor | None  # float32 [C, D / 128]
    slots_S: torch.Tensor  # int32: the index of each row in `values_CD`
    per_expert: float  # expected rows per expert


@dataclasses.dataclass(frozen=True, slots=True)
class Returned:
    """The sums sent back by the owners of tokens' experts, in place of the experts' terms on the GPU: they are added in
    float32 in rank order, N. They stay where they were written until the next tokens are sent."""

    sums_TND: torch.Tensor  # a token's D are contiguous
    owners_T: torch.Tensor  # int32, a bit per rank that sent a sum; the other sums are undefined


def silu_mul(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [T, F]; in each row of `gate_up_TG` [T, 2F] the gate comes first."""
    gate_TF, up_TF = gate_up_TG.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def grouped_mlp(
    x_TD: torch.Tensor, routes: Routes, w_gate_up_EGD: torch.Tensor, w_down_EDF: torch.Tensor
) -> torch.Tensor:
    """Each token's weighted sum over its experts on this rank, float32 [T, D], added in the order of the slots K.

    The routes' ids are in [0, E]: local expert ids, where E stands for an expert on another rank, which adds nothing.
    `w_gate_up_EGD` [E, 2F, D]: gate above up; `w_down_EDF` [E, D, F].
    """
    ids_TK, weights_TK, _ = routes
    num_experts, slots = w_down_EDF.shape[0], ids_TK.shape[1]
    pairs = ids_TK.flatten()
    order = pairs.argsort(stable=True)
    counts: list[int] = torch.bincount(pairs, minlength=num_experts + 1).tolist()
    elsewhere = counts.pop()
    x_ND = x_TD[order[: len(order) - elsewhere] // slots]
    # Two products per expert that has tokens, with one activation over all of them in between.
    experts = [expert for expert, count in enumerate(counts) if count]
    sizes = [counts[expert] for expert in experts]
    w_gate_up_DG, w_down_FD = w_gate_up_EGD.transpose(1, 2).unbind(), w_down_EDF.transpose(1, 2).unbind()
    chunks = zip(experts, torch.split(x_ND, sizes), strict=True)
    gate_up_NG = _joined([torch.mm(x, w_gate_up_DG[expert]) for expert, x in chunks], x_ND, w_gate_up_EGD.shape[1])
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
    hidden_NF = F.silu(gate_NF) * up_NF
    chunks = zip(experts, torch.split(hidden_NF, sizes), strict=True)
    outputs = [torch.mm(h, w_down_FD[expert]) for expert, h in chunks]
    if elsewhere:
        outputs.append(x_TD.new_zeros(elsewhere, x_TD.shape[1]))
    sorted_PD = _joined(outputs, x_ND, x_TD.shape[1])
    slots_PD = torch.empty_like(sorted_PD)
    slots_PD[order] = sorted_PD
    return _weighted_sum(slots_PD.view(*ids_TK.shape, x_TD.shape[1]).float(), weights_TK)


def sum_experts(routed_TD: torch.Tensor, shared_TD: torch.Tensor) -> torch.Tensor:
    """Add the shared experts' sum to the routed ones' (overwritten), in float32, and round once: [T, D]."""
    return routed_TD.add_(shared_TD).to(shared_TD.dtype)


def _weighted_sum(parts_TKD: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    first_TD, *others = parts_TKD.unbind(1)
    first_T1, *weights = weights_TK[..., None].unbind(1)
    sum_TD = first_TD * first_T1
    for part_TD, weight_T1 in zip(others, weights, strict=True):
        sum_TD.addcmul_(part_TD, weight_T1)
    return sum_TD


def _joined(parts: list[torch.Tensor], like: torch.Tensor, width: int) -> torch.Tensor:
    return torch.cat(parts) if parts else like.new_empty(0, width)
