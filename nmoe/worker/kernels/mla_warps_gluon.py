"""Absorbed latent attention with specialised warps, in Gluon: the building blocks of mla_exact_prefill_gluon.py, some
also of the decode kernels. A program has 64 rows, heads times queries.

    producer, one warp   loads queries, and tiles of positions from the pages into a ring
    two warpgroups       alternate over the tiles of a span: while one turns a tile's scores into weights, the other has
                         the tensor cores; each accumulates half of the columns of the values of all tiles

Tiles go in position order: a tile's weights depend on the largest score so far, which comes from the warpgroup that had
the previous tile, together with that tile's weights, through shared memory. Each half of a tile stays in the ring until
its values are added; whoever adds them knows that the scores, from which the weights came, are there, too. The
arithmetic is that of mla_exact_triton.py, operation by operation.

Shape suffixes: layouts S of scores, O of values (with rows over lanes in the same way), W of the sums of weights.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.worker.kernels.hopper_gluon import copy_tile, descriptor

ROWS = 64  # per program: heads times queries
TILE = 32  # positions weighed at a time
_M, _TILE = gl.constexpr(ROWS), gl.constexpr(TILE)
_SHARED_BYTES = 227 << 10  # per multiprocessor on Hopper
_OTHER_BYTES = 11_024  # the part of it that holds neither queries nor the ring
_BARRIER_BYTES = 32  # per stage of the ring
_LEAST_STAGES = 2  # each warpgroup has a tile


class Shared(NamedTuple):
    """Shared memory. Latents are stored in quarters of their columns."""

    q_latent: gl.shared_memory_descriptor  # [4, M, L / 4]
    q_rope: gl.shared_memory_descriptor  # [M / heads, heads, P]
    k_latent: gl.shared_memory_descriptor  # [stages * 4, tile, L / 4]
    k_rope: gl.shared_memory_descriptor  # [stages, tile, P]
    weights: gl.shared_memory_descriptor  # [2, M, tile]: of a tile's positions
    ones: gl.shared_memory_descriptor  # [tile, 8]
    factors: gl.shared_memory_descriptor  # [2, M]: multiply the values so far before a tile's are added
    peaks: gl.shared_memory_descriptor  # [2, M]: the largest scaled score of a span, up to a tile
    # [3, M]: factors of the values before a span and of its own, total weight
    merging: gl.shared_memory_descriptor
    # Barriers
    q_bars: gl.shared_memory_descriptor  # [2]: queries are present; are free
    filled: gl.shared_memory_descriptor  # [stages * 2]: half of the latents each, ropes with the first
    free: gl.shared_memory_descriptor  # [stages * 2]: by the warpgroup that adds this half
    weighed: gl.shared_memory_descriptor  # [2]
    weights_free: gl.shared_memory_descriptor  # [2]
    merge_bars: gl.shared_memory_descriptor  # [2]: present; free


@gluon.jit
def make_shared(q_desc, q_rope_desc, latent_desc, rope_desc, STAGES: gl.constexpr):
    """A program's shared memory, with a ring of STAGES stages, initialised for its warps."""
    QUARTER: gl.constexpr = latent_desc.block_type.shape[1]
    ROPE: gl.constexpr = rope_desc.block_type.shape[1]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_M, _TILE], gl.bfloat16)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_TILE, 8], gl.bfloat16)
    REGISTERS: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0])
    shared = Shared(
        q_latent=gl.allocate_shared_memory(gl.bfloat16, [4, _M, QUARTER], q_desc.layout),
        q_rope=gl.allocate_shared_memory(gl.bfloat16, q_rope_desc.block_type.shape, q_rope_desc.layout),
        k_latent=gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, _TILE, QUARTER], latent_desc.layout),
        k_rope=gl.allocate_shared_memory(gl.bfloat16, [STAGES, _TILE, ROPE], rope_desc.layout),
        weights=gl.allocate_shared_memory(gl.bfloat16, [2, _M, _TILE], WEIGHTS),
        ones=gl.allocate_shared_memory(gl.bfloat16, [_TILE, 8], ONES),
        factors=gl.allocate_shared_memory(gl.float32, [2, _M], ROWS),
        peaks=gl.allocate_shared_memory(gl.float32, [2, _M], ROWS),
        merging=gl.allocate_shared_memory(gl.float32, [3, _M], ROWS),
        q_bars=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        filled=gl.allocate_shared_memory(gl.int64, [STAGES * 2, 1], BARRIER),
        free=gl.allocate_shared_memory(gl.int64, [STAGES * 2, 1], BARRIER),
        weighed=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        weights_free=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        merge_bars=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
    )
    # What both warpgroups use is free once both have said so.
    for i in gl.static_range(2):
        mbarrier.init(shared.q_bars.index(i), count=1 + i)
        mbarrier.init(shared.merge_bars.index(i), count=1 + i)
        mbarrier.init(shared.weighed.index(i), count=1)
        mbarrier.init(shared.weights_free.index(i), count=1)
    for i in gl.static_range(STAGES * 2):
        mbarrier.init(shared.filled.index(i), count=1)
        mbarrier.init(shared.free.index(i), count=1)
    shared.ones.store(gl.full([_TILE, 8], 1.0, gl.bfloat16, REGISTERS))
    fence_async_shared()
    return shared


@gluon.jit
def load_queries(shared, q_desc, q_rope_desc, where, rope_where, nth):
    """Producer: load the queries of a program's piece of work, its `nth`: latents from a row and column of the first
    descriptor's matrix, ropes from a token, head and column on; zeros where there are no tokens. Shared memory has room
    for the queries of one piece, or of two."""
    QUARTER: gl.constexpr = shared.k_latent.shape[2]
    ROPE: gl.constexpr = shared.k_rope.shape[2]
    PIECES: gl.constexpr = shared.q_bars.shape[0] // 2
    place = nth % PIECES
    there = shared.q_bars.index(place)
    mbarrier.wait(shared.q_bars.index(PIECES + place), (nth // PIECES & 1) ^ 1)
    mbarrier.expect(there, shared.q_latent.shape[1] * (4 * QUARTER + ROPE) * 2)
    for i in gl.static_range(4):
        copy_tile(q_desc, [where[0], where[1] + i * QUARTER], there, shared.q_latent.index(place * 4 + i))
    q_rope = shared.q_rope
    if PIECES > 1:
        q_rope = q_rope.index(place)
    copy_tile(q_rope_desc, rope_where, there, q_rope)


@gluon.jit
def load_tiles(
    shared, latent_desc, rope_desc, row_pages_ptr, begin, stop, at, PAGE: gl.constexpr, STAGES: gl.constexpr
):
    """Producer: load the tiles from position `begin` to `stop` of the row with these pages. Returns how many there have
    been in total; `at` of them came before. A stage has one pair of barriers, or one for each half of its latents."""
    TILE: gl.constexpr = shared.k_latent.shape[1]
    QUARTER: gl.constexpr = shared.k_latent.shape[2]
    ROPE: gl.constexpr = shared.k_rope.shape[2]
    PIECES: gl.constexpr = shared.free.shape[0] // STAGES
    for position in range(begin, stop, TILE):
        stage = at % STAGES
        k_row = gl.load(row_pages_ptr + position // PAGE).to(gl.int32) * PAGE + position % PAGE
        for piece in gl.static_range(PIECES):
            filled = shared.filled.index(stage * PIECES + piece)
            mbarrier.wait(shared.free.index(stage * PIECES + piece), (at // STAGES & 1) ^ 1)
            mbarrier.expect(filled, TILE * (4 // PIECES * QUARTER + (ROPE if piece == 0 else 0)) * 2)
            for i in gl.static_range(piece * 4 // PIECES, (piece + 1) * 4 // PIECES):
                copy_tile(latent_desc, [k_row, i * QUARTER], filled, shared.k_latent.index(stage * 4 + i))
            if piece == 0:
                copy_tile(rope_desc, [k_row, 4 * QUARTER], filled, shared.k_rope.index(stage))
        at += 1
    return at


@gluon.jit
def _scores(shared, at, STAGES: gl.constexpr):
    """Start multiplying the queries by the keys of the ring's tile number `at`, [M, tile]."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    stage = at % STAGES
    s = warpgroup_mma_init(gl.zeros([_M, _TILE], gl.float32, S))
    for i in gl.static_range(4):
        if i % 2 == 0:
            mbarrier.wait(shared.filled.index(stage * 2 + i // 2), at // STAGES & 1)
        keys = shared.k_latent.index(stage * 4 + i).permute((1, 0))
        s = warpgroup_mma(shared.q_latent.index(i), keys, s, use_acc=i > 0, is_async=True)
    q_rope = shared.q_rope.reshape([_M, shared.k_rope.shape[2]])
    return warpgroup_mma(q_rope, shared.k_rope.index(stage).permute((1, 0)), s, is_async=True)


@gluon.jit
def _weigh(shared, turn, s, position, last, peak, scale_log2, mine: gl.constexpr):
    """Compute the weights of a tile's positions from its scores, and publish them, the new peak and the factor for what
    was added before, to both warpgroups. `turn`: how many tiles this warpgroup has weighed."""
    key = position + gl.arange(0, _TILE, gl.SliceLayout(0, s.type.layout))
    s = gl.where(key[None, :] <= last[:, None], s * scale_log2, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, 1))
    factor = gl.exp2(peak - new_peak)
    p = gl.exp2(s - new_peak[:, None]).to(gl.bfloat16)
    mbarrier.wait(shared.weights_free.index(mine), (turn & 1) ^ 1)
    shared.weights.index(mine).store(p)
    shared.factors.index(mine).store(factor)
    shared.peaks.index(mine).store(new_peak)
    fence_async_shared()
    mbarrier.arrive(shared.weighed.index(mine), count=1)
    return new_peak, factor


@gluon.jit
def _add(shared, at, whose: gl.constexpr, mine: gl.constexpr, span_sum, acc_0, acc_1, factor, STAGES: gl.constexpr):
    """Start adding tile number `at` of the ring: its values times warpgroup `whose`'s weights, in this one's half of
    the columns, plus what was there times the tile's factor. The first warpgroup also adds the weights."""
    factor_O = gl.convert_layout(factor, gl.SliceLayout(1, acc_0.type.layout))[:, None]
    p = shared.weights.index(whose)
    if mine == 0:
        factor_W = gl.convert_layout(factor, gl.SliceLayout(1, span_sum.type.layout))[:, None]
        adding = warpgroup_mma(p, shared.ones, span_sum * factor_W, is_async=True)
    else:
        adding = warpgroup_mma_init(span_sum)
    columns = at % STAGES * 4 + 2 * mine
    adding_0 = warpgroup_mma(p, shared.k_latent.index(columns), acc_0 * factor_O, is_async=True)
    adding_1 = warpgroup_mma(p, shared.k_latent.index(columns + 1), acc_1 * factor_O, is_async=True)
    return adding, adding_0, adding_1


@gluon.jit
def _add_theirs(shared, at, factor, mine: gl.constexpr, span_sum, acc_0, acc_1, STAGES: gl.constexpr):
    """Add a tile weighed by the other warpgroup; then this one needs neither its weights nor its half any more."""
    adding = _add(shared, at, 1 - mine, mine, span_sum, acc_0, acc_1, factor, STAGES)
    span_sum, acc_0, acc_1 = warpgroup_mma_wait(0, deps=adding)
    mbarrier.arrive(shared.weights_free.index(1 - mine), count=1)
    mbarrier.arrive(shared.free.index(at % STAGES * 2 + mine), count=1)
    return span_sum, acc_0, acc_1


@gluon.jit
def _add_own(shared, at, has_next, s, factor, mine: gl.constexpr, span_sum, acc_0, acc_1, STAGES: gl.constexpr):
    """Add a tile weighed by this warpgroup, and compute the scores of its next one, if the span has one. Adding ends
    first: the ring is short, so what is free must not wait until the next tile is there."""
    adding = _add(shared, at, mine, mine, span_sum, acc_0, acc_1, factor, STAGES)
    span_sum, acc_0, acc_1 = warpgroup_mma_wait(0, deps=adding)
    mbarrier.arrive(shared.free.index(at % STAGES * 2 + mine), count=1)
    if has_next:
        s = warpgroup_mma_wait(0, deps=[_scores(shared, at + 2, STAGES)])
    return s, span_sum, acc_0, acc_1


@gluon.jit
def attend_span(shared, at, begin, tiles, last, turns, scale_log2, mine: gl.constexpr, STAGES: gl.constexpr):
    """Attend a span of `tiles` tiles, the first being the ring's number `at`. Returns the span's peak, the sum of its
    weights (first warpgroup only), and this one's half of its values, in two parts. `turns`, passed in and returned:
    how many tiles this warpgroup has weighed, and how many weighed by the other one it has added."""
    QUARTER: gl.constexpr = shared.k_latent.shape[2]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 16])  # noqa: E741
    W: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    turn, their_turn = turns
    peak = gl.full([_M], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    weight = gl.zeros([_M, 8], gl.float32, W)
    acc_0 = gl.zeros([_M, QUARTER], gl.float32, O)
    acc_1 = gl.zeros([_M, QUARTER], gl.float32, O)
    s = gl.zeros([_M, _TILE], gl.float32, S)
    if mine < tiles:
        s = warpgroup_mma_wait(0, deps=[_scores(shared, at + mine, STAGES)])
    if mine == 0:
        peak, factor = _weigh(shared, turn, s, begin, last, peak, scale_log2, mine)
        turn += 1
        s, weight, acc_0, acc_1 = _add_own(shared, at, tiles > 2, s, factor, mine, weight, acc_0, acc_1, STAGES)
    for tile in range(2 - mine, tiles, 2):
        mbarrier.wait(shared.weighed.index(1 - mine), their_turn & 1)
        their_peak = shared.peaks.index(1 - mine).load(gl.SliceLayout(1, S))
        their_factor = shared.factors.index(1 - mine).load(gl.SliceLayout(1, O))
        # First, what the other warpgroup is waiting for.
        peak, factor = _weigh(shared, turn, s, begin + tile * _TILE, last, their_peak, scale_log2, mine)
        weight, acc_0, acc_1 = _add_theirs(shared, at + tile - 1, their_factor, mine, weight, acc_0, acc_1, STAGES)
        s, weight, acc_0, acc_1 = _add_own(
            shared, at + tile, tile + 2 < tiles, s, factor, mine, weight, acc_0, acc_1, STAGES
        )
        turn += 1
        their_turn += 1
    if (tiles - 1 - mine) % 2 != 0:
        mbarrier.wait(shared.weighed.index(1 - mine), their_turn & 1)
        peak = shared.peaks.index(1 - mine).load(gl.SliceLayout(1, S))
        their_factor = shared.factors.index(1 - mine).load(gl.SliceLayout(1, O))
        weight, acc_0, acc_1 = _add_theirs(shared, at + tiles - 1, their_factor, mine, weight, acc_0, acc_1, STAGES)
        their_turn += 1
    return peak, weight, acc_0, acc_1, (turn, their_turn)


def stages_of(width: int) -> int:
    """How many tiles of cache rows of this width the ring holds; nmoe/gpu_limits.py rejects rows that are too wide."""
    left = _SHARED_BYTES - _OTHER_BYTES - ROWS * width * 2
    stages = min(8, left // (TILE * width * 2 + _BARRIER_BYTES))
    assert stages >= _LEAST_STAGES, f"cache rows of {width} leave room for {stages} tiles"
    return stages


def rope_descriptor(q_THQ: torch.Tensor, heads: int, rope: int) -> TensorDescriptor:
    """For copying `rope` dimensions of queries: `heads` heads, and as many tokens as a program has rows for."""
    return descriptor(q_THQ, ROWS // heads, heads, rope)
