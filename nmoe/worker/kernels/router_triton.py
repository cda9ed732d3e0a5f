"""The router on the GPU; `router.py` is the reference.

The float32 weight is stored as bfloat16 terms that add up to it, so every product with a bfloat16 input is exact and
only sums round, in float32. There is a single order of addition, so a token's bits are the same in any batch
(docs/exact.md): the tensor cores sum a piece of the hidden size, 64 inputs at a time and, within those, smallest term
first; then a span's pieces are added in order; then the spans. For few tokens a program computes a piece, and the
choosing kernel adds them; for many it computes a span, so that weights are read rarely and little is written between.

The kernel that chooses a token's experts also adds it to their lists (lists_triton.py).

Shape suffixes: T tokens, D hidden, E routed experts, N terms of a weight, P parts of a logit, K experts per token.
"""

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nmoe.architecture import Architecture
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.lists import Lists, Routes, empty_lists
from nmoe.worker.kernels.lists_triton import add_pairs, clear_counts

# The order of addition. Changing any of these changes bits.
_DEPTH = 64  # inputs for which the tensor cores take all terms in turn
_PIECE = 128  # inputs per accumulation; the tensor cores truncate sums, so it is short
_SPANS = 4  # at most; 8,000 tokens in tiles of 256 make 128 programs

_FEW = 512  # tokens up to which a program computes one piece
_TAKEN = tl.constexpr(-(2**31))  # the key of an expert already chosen: below all others


class _Tile(NamedTuple):
    """How the logits are divided among programs; no bits depend on it."""

    rows: int  # tokens
    columns: int  # experts, at most
    warps: int
    stages: int
    span: bool  # a program computes a span instead of a piece


def _tile(tokens: int, experts: int) -> _Tile:
    """Few tokens need many programs, many tokens large tiles, within 255 registers per thread for the piece and the
    running total, and within 227 KB for the stages."""
    if tokens <= 16 or (tokens <= 64 and experts <= 64):
        return _Tile(16, 32, 4, 3, span=False)
    if tokens <= _FEW:
        return _Tile(64, 64 if experts > 64 else 32, 4, 3, span=False)
    if experts > 64:
        return _Tile(128, 128, 8, 3, span=True)
    if tokens <= 7424:  # tiles of 256 would leave multiprocessors idle; two of these share one
        return _Tile(128, 64, 8, 2, span=True)
    return _Tile(256, 64, 16, 3, span=True)


@triton.jit(do_not_specialize=["num_tokens"])
def _logits_kernel(
    x_ptr,
    gate_ptr,
    out_ptr,
    counts_ptr,
    num_tokens,
    D: tl.constexpr,
    E: tl.constexpr,
    TERMS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    COUNTS: tl.constexpr,
):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    if counts_ptr is not None:
        if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
            clear_counts(counts_ptr, COUNTS, 0, 1, 512)
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    token = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    exists, routed = (token < num_tokens)[:, None], (expert < E)[None, :]
    lane = tl.arange(0, DEPTH)
    x_at = x_ptr + token.to(tl.int64)[:, None] * D + lane[None, :]
    gate_at = gate_ptr + expert[None, :] * D + lane[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    piece = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(part * WIDTH, tl.minimum(D, (part + 1) * WIDTH), DEPTH, num_stages=STAGES):
        x = tl.load(x_at + k, mask=exists, other=0.0)
        piece = tl.where(k % PIECE == 0, 0.0, piece)  # not an `if`, or ptxas serialises the tensor cores
        for term in tl.static_range(TERMS):
            weight = tl.load(gate_at + (term * E * D + k), mask=routed, other=0.0)
            piece = tl.dot(x, weight, piece)
        if (k + DEPTH) % PIECE == 0:
            total += piece
    out = out_ptr + (part * num_tokens + token).to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(out, total, mask=exists & routed)


@triton.jit
def _of_best_groups(biased, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """Biased scores [N, E], -inf outside the groups of experts whose two largest scores have the largest sums."""
    ROWS: tl.constexpr = biased.shape[0]
    SIZE: tl.constexpr = biased.shape[1] // GROUPS
    in_group = tl.arange(0, SIZE)[None, None, :]
    grouped = tl.reshape(biased, [ROWS, GROUPS, SIZE])
    best = tl.argmax(grouped, 2)
    others = tl.where(in_group == best[:, :, None], float("-inf"), grouped)
    rank = tl.max(grouped, 2) + tl.max(others, 2)
    group = tl.arange(0, GROUPS)[None, :]
    kept = tl.zeros([ROWS, GROUPS], tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        chosen_group = tl.argmax(rank, 1)[:, None]
        kept = tl.where(group == chosen_group, 1, kept)
        rank = tl.where(group == chosen_group, float("-inf"), rank)
    return tl.reshape(tl.where(kept[:, :, None] != 0, grouped, float("-inf")), [ROWS, GROUPS * SIZE])


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    counts_ptr,
    pairs_ptr,
    num_tokens,
    factor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    tl.extra.cuda.gdc_launch_dependents()
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    routed = expert < E
    exists = (token < num_tokens) & routed
    bias = tl.load(bias_ptr + tl.broadcast_to(expert, [ROWS, BLOCK_E]), mask=exists, other=0.0)  # laid out as scores
    tl.extra.cuda.gdc_wait()
    logits = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for first in tl.static_range(0, PARTS, SPAN):
        span = tl.zeros([ROWS, BLOCK_E], tl.float32)
        for part in tl.static_range(first, first + SPAN):
            if part < PARTS:
                span += tl.load(logits_ptr + (part * num_tokens + token) * E + expert, mask=exists, other=0.0)
        logits += span
    score = 1.0 / (1.0 + tl.exp(-logits))
    biased = tl.where(routed, score + bias, float("-inf"))
    if TOP_GROUPS < GROUPS:
        biased = _of_best_groups(biased, GROUPS, TOP_GROUPS)
    # Mapped to integers in the same order, of which a warp finds the largest at once. Whatever the scores, even NaN, an
    # expert that exists and is not yet chosen precedes those that do not exist.
    bits = biased.to(tl.int32, bitcast=True)
    key = tl.where(routed, tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), _TAKEN + 1), _TAKEN)
    score_bits = score.to(tl.int32, bitcast=True)
    slot = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros([ROWS, BLOCK_K], tl.int32)
    weights = tl.zeros([ROWS, BLOCK_K], tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)  # slot by slot: how a reduction adds depends on the number of rows
    for k in tl.static_range(K):
        best = key == tl.max(key, 1)[:, None]
        chosen = tl.min(tl.where(best, expert, BLOCK_E), 1)[:, None]
        weight = tl.sum(tl.where(expert == chosen, score_bits, 0), 1)[:, None].to(tl.float32, bitcast=True)
        ids = tl.where(slot == k, chosen, ids)
        weights = tl.where(slot == k, weight, weights)
        total += weight
        key = tl.where(expert == chosen, _TAKEN, key)
    stored = (token < num_tokens) & (slot < K)
    if counts_ptr is not None:
        add_pairs(ids, (token * K + slot).to(tl.int32), stored, counts_ptr, pairs_ptr, num_tokens)
    if NORM:
        weights = weights / (total + 1e-20)
    tl.store(ids_ptr + token * K + slot, ids, mask=stored)
    tl.store(weights_ptr + token * K + slot, weights * factor, mask=stored)


def split_gate(weight_ED: torch.Tensor) -> torch.Tensor:
    """Convert a float32 weight for `route`: bfloat16 terms [N, E, D] that sum to it, smallest first, N from 1 to 3.

    Three terms represent every normal number of at least 2^-110 exactly. It has 24 significant bits; each term takes
    the top 8 of what is left, rounded, so 16 or fewer remain, then 8 or fewer, which are the third term; each
    difference is exact, as both operands are multiples of the number's last bit. bfloat16 has float32's exponents, so
    nothing overflows except the last half step below infinity, 3.39e38, which becomes NaN. Below 2^-110, bits under
    bfloat16's smallest number, 2^-133, are lost: at most 2^-134.

    Terms that are zero throughout are dropped, which changes no sum. A checkpoint with bfloat16 weights, like
    DeepSeek's, needs one term: half the float32 weight's memory; others need one and a half times as much.
    """
    terms, rest_ED = [], weight_ED
    for _ in range(3):
        terms.append(rest_ED.bfloat16())
        rest_ED = rest_ED - terms[-1].float()
    while len(terms) > 1 and not terms[-1].any():
        terms.pop()
    return torch.stack(terms[::-1])


def logits_in_parts(x_TD: torch.Tensor, gate_NED: torch.Tensor, lists: Lists | None = None) -> tuple[torch.Tensor, int]:
    """The logits' parts, float32 [P, T, E], and how many consecutive parts make a span; T is not 0.

    The logits are the sum of the spans, which are the sums of their parts: each starts from zero and is added in order.
    Also zeroes the counts of the `lists`.
    """
    (tokens, hidden), (terms, experts, _) = x_TD.shape, gate_NED.shape
    tile = _tile(tokens, experts)
    columns = min(tile.columns, max(16, triton.next_power_of_2(experts)))
    span = triton.cdiv(triton.cdiv(hidden, _PIECE), _SPANS)  # in pieces
    width = _PIECE * (span if tile.span else 1)
    parts = triton.cdiv(hidden, width)
    logits_PTE = torch.empty(parts, tokens, experts, dtype=torch.float32, device=x_TD.device)
    _logits_kernel[(triton.cdiv(experts, columns), parts, triton.cdiv(tokens, tile.rows))](
        x_TD,
        gate_NED,
        logits_PTE,
        lists.counts_EW if lists else None,
        tokens,
        D=hidden,
        E=experts,
        TERMS=terms,
        WIDTH=width,
        PIECE=_PIECE,
        DEPTH=_DEPTH,
        ROWS=tile.rows,
        COLUMNS=columns,
        STAGES=tile.stages,
        COUNTS=lists.counts_EW.numel() if lists else 0,
        num_warps=tile.warps,
        launch_pdl=early(tokens),
    )
    return logits_PTE, 1 if tile.span else span


def route(
    x_TD: torch.Tensor,
    gate_NED: torch.Tensor,
    bias_E: torch.Tensor,
    architecture: Architecture,
    *,
    listed: bool = False,
) -> Routes:
    """See router.py. The weight is `split_gate`'s; the ids are int32. D is a multiple of 128; with several groups, the
    numbers of experts and of groups are powers of two."""
    a, tokens, device = architecture, len(x_TD), x_TD.device
    ids_TK = torch.empty(tokens, a.num_experts_per_tok, dtype=torch.int32, device=device)
    weights_TK = torch.empty(tokens, a.num_experts_per_tok, dtype=torch.float32, device=device)
    lists = empty_lists(tokens, a.num_experts, device)[0] if listed else None
    if not tokens:
        return Routes(ids_TK, weights_TK, lists)
    logits_PTE, span = logits_in_parts(x_TD, gate_NED, lists)
    block_e = triton.next_power_of_2(a.num_experts)
    rows = max(1, 256 // block_e) if tokens > _FEW else 1  # eight scores per thread
    _choose_kernel[(triton.cdiv(tokens, rows),)](
        logits_PTE,
        bias_E,
        ids_TK,
        weights_TK,
        lists.counts_EW if lists else None,
        lists.pairs_EC if lists else None,
        tokens,
        a.routed_scaling_factor,
        E=a.num_experts,
        BLOCK_E=block_e,
        PARTS=len(logits_PTE),
        SPAN=span,
        GROUPS=a.n_group,
        TOP_GROUPS=a.topk_group,
        K=a.num_experts_per_tok,
        BLOCK_K=max(32 // rows, triton.next_power_of_2(a.num_experts_per_tok)),  # no slot occurs twice in a warp
        NORM=a.norm_topk_prob,
        ROWS=rows,
        num_warps=1,
        enable_fp_fusion=False,  # otherwise each form could fuse multiply-adds differently
        launch_pdl=early(tokens),
    )
    return Routes(ids_TK, weights_TK, lists and dataclasses.replace(lists, logits_PTE=logits_PTE))
