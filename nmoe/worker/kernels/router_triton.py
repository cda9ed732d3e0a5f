"""The router on the GPU; `router.py` is the reference.

The logits are float32 products (three tf32 passes) over fixed pieces of the hidden size, which the second kernel adds
in their order: the same bits in any batch.

Shape suffixes: T tokens, D hidden, E routed experts, K experts per token.
"""

import torch
import triton
import triton.language as tl

from nmoe.architecture import Architecture
from nmoe.worker.kernels.early import early

_PIECE = 128  # of the hidden size, per program
_BLOCK_T = 16


@triton.jit(do_not_specialize=["num_tokens"])
def _logits_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_tokens,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    piece = tl.program_id(1)
    expert = tl.arange(0, BLOCK_E)
    exists = (token < num_tokens)[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for k in tl.static_range(0, PIECE, BLOCK_K):
        lane = piece * PIECE + k + tl.arange(0, BLOCK_K)
        inside = (lane < D)[None, :]
        x = tl.load(x_ptr + token.to(tl.int64)[:, None] * D + lane[None, :], mask=exists & inside, other=0.0)
        w = tl.load(weight_ptr + expert[:, None] * D + lane[None, :], mask=(expert < E)[:, None] & inside, other=0.0)
        acc = tl.dot(x.to(tl.float32), tl.trans(w), acc, input_precision="tf32x3")
    out = out_ptr + (piece * num_tokens + token).to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(out, acc, mask=exists & (expert < E)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    num_tokens,
    factor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIECES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    exists = expert < E
    logits = tl.zeros([BLOCK_E], tl.float32)
    for piece in tl.static_range(PIECES):
        logits += tl.load(logits_ptr + (piece * num_tokens + token) * E + expert, mask=exists, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logits))
    biased = tl.where(exists, score + tl.load(bias_ptr + expert, mask=exists, other=0.0), float("-inf"))
    if TOP_GROUPS < GROUPS:
        in_group = tl.arange(0, BLOCK_E // GROUPS)
        grouped = tl.reshape(biased, [GROUPS, BLOCK_E // GROUPS])
        best = tl.argmax(grouped, 1)
        others = tl.where(in_group[None, :] == best[:, None], float("-inf"), grouped)
        rank = tl.max(grouped, 1) + tl.max(others, 1)
        group = tl.arange(0, GROUPS)
        kept = tl.zeros([GROUPS], tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            chosen_group = tl.argmax(rank, 0)
            kept = tl.where(group == chosen_group, 1, kept)
            rank = tl.where(group == chosen_group, float("-inf"), rank)
        biased = tl.reshape(tl.where(kept[:, None] != 0, grouped, float("-inf")), [BLOCK_E])
    slot = tl.arange(0, BLOCK_K)
    ids = tl.zeros([BLOCK_K], tl.int32)
    weights = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(K):
        chosen = tl.argmax(biased, 0)
        ids = tl.where(slot == k, chosen, ids)
        weights = tl.where(slot == k, tl.sum(tl.where(expert == chosen, score, 0.0), 0), weights)
        biased = tl.where(expert == chosen, float("-inf"), biased)
    if NORM:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(ids_ptr + token * K + slot, ids, mask=slot < K)
    tl.store(weights_ptr + token * K + slot, weights * factor, mask=slot < K)


def route(
    x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor, architecture: Architecture
) -> tuple[torch.Tensor, torch.Tensor]:
    """See router.py; the ids are int32. With several groups, experts and groups are powers of two."""
    a = architecture
    tokens, hidden = x_TD.shape
    ids_TK = torch.empty(tokens, a.num_experts_per_tok, dtype=torch.int32, device=x_TD.device)
    weights_TK = torch.empty(tokens, a.num_experts_per_tok, dtype=torch.float32, device=x_TD.device)
    if not tokens:
        return ids_TK, weights_TK
    pieces = triton.cdiv(hidden, _PIECE)
    logits = torch.empty(pieces, tokens, a.num_experts, dtype=torch.float32, device=x_TD.device)
    block_e = triton.next_power_of_2(a.num_experts)
    _logits_kernel[(triton.cdiv(tokens, _BLOCK_T), pieces)](
        x_TD,
        weight_ED,
        logits,
        tokens,
        D=hidden,
        E=a.num_experts,
        BLOCK_E=max(16, block_e),
        PIECE=_PIECE,
        BLOCK_K=64,
        BLOCK_T=_BLOCK_T,
        num_warps=4 if block_e <= 64 else 8,
        launch_pdl=early(tokens),
    )
    _choose_kernel[(tokens,)](
        logits,
        bias_E,
        ids_TK,
        weights_TK,
        tokens,
        a.routed_scaling_factor,
        E=a.num_experts,
        BLOCK_E=block_e,
        PIECES=pieces,
        GROUPS=a.n_group,
        TOP_GROUPS=a.topk_group,
        K=a.num_experts_per_tok,
        BLOCK_K=triton.next_power_of_2(a.num_experts_per_tok),
        NORM=a.norm_topk_prob,
        num_warps=1,
        launch_pdl=early(tokens),
    )
    return ids_TK, weights_TK
