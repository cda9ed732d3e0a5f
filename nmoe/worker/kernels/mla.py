"""Multi-head latent attention over the paged cache (arXiv 2405.04434, section 2.1), in two equivalent forms.

A cache row holds a token's normalised latent c and roped key k, shared by all heads. The *expanded* form computes each
head's keys [W_UK c ; k] and values W_UV c, then attends as usual. The *absorbed* form moves W_UK into the query and
W_UV after the sum, and attends to the cache rows themselves: nothing per head is ever computed from the context, but
each query-key pair costs more. Both compute the same function; only the rounding differs.

Shape suffixes: T queries, R rows (requests), J positions of a context, H heads, N nope dimensions, P rope dimensions,
Q = N + P, L latent, C = L + P, V value dimensions, X = N + V.
"""

import dataclasses

import torch
import torch.nn.functional as F

from nmoe.architecture import Architecture

LATENT_EPS = 1e-6  # of the two latent norms, regardless of rms_norm_eps; transformers' modeling_deepseek_v3.py
_TILE = 256  # queries whose scores exist at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Up:
    """The two halves of kv_b_proj, views of one tensor, and the scale of the scores."""

    w_HXL: torch.Tensor
    w_uk_HNL: torch.Tensor
    w_uv_HVL: torch.Tensor
    scale: float

    @classmethod
    def of(cls, w_kv_b_YL: torch.Tensor, architecture: Architecture) -> "Up":
        """From kv_b_proj, [H * X, L]."""
        w_HXL = w_kv_b_YL.view(architecture.num_heads, -1, architecture.kv_lora_rank)
        nope = architecture.qk_nope_head_dim
        return cls(w_HXL, w_HXL[:, :nope], w_HXL[:, nope:], architecture.softmax_scale())


def absorbed_is_cheaper(num_queries: int, context: int, architecture: Architecture) -> bool:
    """The cost rule: whether the absorbed form multiplies less for a chunk of `num_queries` that ends at `context`.

    Per head and query-key pair the absorbed form takes C + L against Q + V; but it maps the queries through W_UK and
    their results through W_UV where the expanded form maps every position of the context.
    """
    a = architecture
    pairs = num_queries * (2 * context - num_queries + 1) // 2
    per_token = a.kv_lora_rank * (a.qk_nope_head_dim + a.v_head_dim)
    absorbed = pairs * (a.cache_dim + a.kv_lora_rank) + num_queries * per_token
    expanded = pairs * (a.qk_head_dim + a.v_head_dim) + context * per_token
    return absorbed < expanded


def absorb_queries(q_nope_THN: torch.Tensor, q_rope_THP: torch.Tensor, up: Up) -> torch.Tensor:
    """Queries that match cache rows: [W_UK^T q_nope ; q_rope], [T, H, C]."""
    q_latent_HTL = torch.bmm(q_nope_THN.transpose(0, 1), up.w_uk_HNL)
    return torch.cat((q_latent_HTL.transpose(0, 1), q_rope_THP), dim=-1)


def values_of_latents(latent_THL: torch.Tensor, up: Up) -> torch.Tensor:
    """Each head's value of its attended latent, W_UV c: [T, H, V]."""
    return torch.bmm(latent_THL.transpose(0, 1), up.w_uv_HVL.transpose(1, 2)).transpose(0, 1)


def absorbed_decode(q_RHC: torch.Tensor, context_RJC: torch.Tensor, hidden_R1J: torch.Tensor, up: Up) -> torch.Tensor:
    """One query per row against its own context. Returns attended latents, [R, H, L].

    `hidden_R1J` is 0 where the position exists and -inf where it does not; what is stored there must be finite.
    """
    scores_RHJ = torch.baddbmm(hidden_R1J, q_RHC, context_RJC.transpose(1, 2), alpha=up.scale)
    return torch.bmm(_softmax(scores_RHJ), context_RJC[..., : up.w_HXL.shape[-1]])


def absorbed_chunk(q_THC: torch.Tensor, context_JC: torch.Tensor, up: Up) -> torch.Tensor:
    """A chunk, the last T positions of its context of J, attended causally. Returns attended latents, [T, H, L]."""
    heads = q_THC.shape[1]
    keys_HCJ = context_JC.t().expand(heads, -1, -1)
    values_HJL = context_JC[:, : up.w_HXL.shape[-1]].expand(heads, -1, -1)
    return _causal(q_THC, keys_HCJ, values_HJL, up.scale)


def expanded_chunk(
    q_nope_THN: torch.Tensor, q_rope_THP: torch.Tensor, context_JC: torch.Tensor, up: Up
) -> torch.Tensor:
    """A chunk, the last T positions of its context of J, attended causally. Returns attended values, [T, H, V].

    A chunk that is its whole context is a full prefill.
    """
    heads, nope, latent = up.w_uk_HNL.shape
    kv_HXJ = torch.matmul(up.w_HXL, context_JC[:, :latent].t())
    k_rope_HPJ = context_JC[:, latent:].t().expand(heads, -1, -1)
    keys_HQJ = torch.cat((kv_HXJ[:, :nope], k_rope_HPJ), dim=1)
    values_HJV = kv_HXJ[:, nope:].transpose(1, 2)
    return _causal(torch.cat((q_nope_THN, q_rope_THP), dim=-1), keys_HQJ, values_HJV, up.scale)


def _causal(q_THQ: torch.Tensor, keys_HQJ: torch.Tensor, values_HJV: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last T positions of J, [T, H, V], in tiles of queries."""
    tokens, heads, _ = q_THQ.shape
    before = keys_HQJ.shape[-1] - tokens
    out_THV = q_THQ.new_empty(tokens, heads, values_HJV.shape[-1])
    for start in range(0, tokens, _TILE):
        stop = min(start + _TILE, tokens)
        scores_HTJ = torch.bmm(q_THQ[start:stop].transpose(0, 1), keys_HQJ[..., : before + stop]).mul_(scale)
        future_TT = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q_THQ.device).triu_(1)
        scores_HTJ[..., before + start :].masked_fill_(future_TT, -torch.inf)
        attended_HTV = torch.bmm(_softmax(scores_HTJ), values_HJV[:, : before + stop])
        out_THV[start:stop] = attended_HTV.transpose(0, 1)
    return out_THV


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
