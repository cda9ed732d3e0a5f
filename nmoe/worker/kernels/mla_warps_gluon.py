"""Absorbed latent attention with specialised warps, in Gluon: the building blocks of mla_exact_prefill_gluon.py. A
program has 64 rows, heads times queries.

    producer, one warp   loads queries, and tiles of positions from the pages into a ring (mla_ring_gluon.py)
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

from nmoe.worker.kernels.hopper_gluon import descriptor
from nmoe.worker.kernels.mla_ring_gluon import Ring, make_ring, rope_queries

ROWS = 64  # per program: heads times queries
TILE = 32  # positions weighed at a time
_M, _TILE = gl.constexpr(ROWS), gl.constexpr(TILE)
_SHARED_BYTES = 227 << 10  # per multiprocessor on Hopper
_OTHER_BYTES = 11_024  # the part of it that holds neither queries nor the ring
_BARRIER_BYTES = 32  # per stage of the ring
_LEAST_STAGES = 2  # each warpgroup has a tile


class Shared(NamedTuple):
    """Shared memory."""

    ring: Ring  # in halves: each is free once its warpgroup has added it
    weights: gl.shared_memory_descriptor  # [2, M, tile]: of a tile's positions
    ones: gl.shared_memory_descriptor  # [tile, 8]
    factors: gl.shared_memory_descriptor  # [2, M]: multiply the values so far before a tile's are added
    peaks: gl.shared_memory_descriptor  # [2, M]: the largest scaled score of a span, up to a tile
    # [3, M]: factors of the values before a span and of its own, total weight
    merging: gl.shared_memory_descriptor
    # Barriers
    weighed: gl.shared_memory_descriptor  # [2]
    weights_free: gl.shared_memory_descriptor  # [2]
    merge_bars: gl.shared_memory_descriptor  # [2]: present; free


@gluon.jit
def make_shared(descs, STAGES: gl.constexpr):
    """A program's shared memory, with a ring of STAGES stages, initialised for its warps. `descs` as in `make_ring`."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_M, _TILE], gl.bfloat16)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_TILE, 8], gl.bfloat16)
    REGISTERS: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0])
    shared = Shared(
        ring=make_ring(descs, STAGES, 2, 1, 2),
        weights=gl.allocate_shared_memory(gl.bfloat16, [2, _M, _TILE], WEIGHTS),
        ones=gl.allocate_shared_memory(gl.bfloat16, [_TILE, 8], ONES),
        factors=gl.allocate_shared_memory(gl.float32, [2, _M], ROWS),
        peaks=gl.allocate_shared_memory(gl.float32, [2, _M], ROWS),
        merging=gl.allocate_shared_memory(gl.float32, [3, _M], ROWS),
        weighed=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        weights_free=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        merge_bars=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
    )
    # What both warpgroups use is free once both have said so.
    for i in gl.static_range(2):
        mbarrier.init(shared.merge_bars.index(i), count=1 + i)
        mbarrier.init(shared.weighed.index(i), count=1)
        mbarrier.init(shared.weights_free.index(i), count=1)
    shared.ones.store(gl.full([_TILE, 8], 1.0, gl.bfloat16, REGISTERS))
    fence_async_shared()
    return shared


@gluon.jit
def _scores(shared, at):
    """Start multiplying the queries by the keys of the ring's tile number `at`, [M, tile]."""
    STAGES: gl.constexpr = shared.ring.k_rope.shape[0]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    stage = at % STAGES
    s = warpgroup_mma_init(gl.zeros([_M, _TILE], gl.float32, S))
    for i in gl.static_range(4):
        if i % 2 == 0:
            mbarrier.wait(shared.ring.filled.index(stage * 2 + i // 2), at // STAGES & 1)
        keys = shared.ring.k_latent.index(stage * 4 + i).permute((1, 0))
        s = warpgroup_mma(shared.ring.q_latent.index(i), keys, s, use_acc=i > 0, is_async=True)
    return warpgroup_mma(
        rope_queries(shared.ring, 0), shared.ring.k_rope.index(stage).permute((1, 0)), s, is_async=True
    )


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
def _add(shared, at, whose: gl.constexpr, mine: gl.constexpr, span_sum, acc_0, acc_1, factor):
    """Start adding tile number `at` of the ring: its values times warpgroup `whose`'s weights, in this one's half of
    the columns, plus what was there times the tile's factor. The first warpgroup also adds the weights."""
    STAGES: gl.constexpr = shared.ring.k_rope.shape[0]
    factor_O = gl.convert_layout(factor, gl.SliceLayout(1, acc_0.type.layout))[:, None]
    p = shared.weights.index(whose)
    if mine == 0:
        factor_W = gl.convert_layout(factor, gl.SliceLayout(1, span_sum.type.layout))[:, None]
        adding = warpgroup_mma(p, shared.ones, span_sum * factor_W, is_async=True)
    else:
        adding = warpgroup_mma_init(span_sum)
    columns = at % STAGES * 4 + 2 * mine
    adding_0 = warpgroup_mma(p, shared.ring.k_latent.index(columns), acc_0 * factor_O, is_async=True)
    adding_1 = warpgroup_mma(p, shared.ring.k_latent.index(columns + 1), acc_1 * factor_O, is_async=True)
    return adding, adding_0, adding_1


@gluon.jit
def _add_theirs(shared, at, factor, mine: gl.constexpr, span_sum, acc_0, acc_1):
    """Add a tile weighed by the other warpgroup; then this one needs neither its weights nor its half any more."""
    STAGES: gl.constexpr = shared.ring.k_rope.shape[0]
    adding = _add(shared, at, 1 - mine, mine, span_sum, acc_0, acc_1, factor)
    span_sum, acc_0, acc_1 = warpgroup_mma_wait(0, deps=adding)
    mbarrier.arrive(shared.weights_free.index(1 - mine), count=1)
    mbarrier.arrive(shared.ring.free.index(at % STAGES * 2 + mine), count=1)
    return span_sum, acc_0, acc_1


@gluon.jit
def _add_own(shared, at, has_next, s, factor, mine: gl.constexpr, span_sum, acc_0, acc_1):
    """Add a tile weighed by this warpgroup, and compute the scores of its next one, if the span has one. Adding ends
    first: the ring is short, so what is free must not wait until the next tile is there."""
    STAGES: gl.constexpr = shared.ring.k_rope.shape[0]
    adding = _add(shared, at, mine, mine, span_sum, acc_0, acc_1, factor)
    span_sum, acc_0, acc_1 = warpgroup_mma_wait(0, deps=adding)
    mbarrier.arrive(shared.ring.free.index(at % STAGES * 2 + mine), count=1)
    if has_next:
        s = warpgroup_mma_wait(0, deps=[_scores(shared, at + 2)])
    return s, span_sum, acc_0, acc_1


@gluon.jit
def attend_span(shared, at, begin, tiles, last, turns, scale_log2, mine: gl.constexpr):
    """Attend a span of `tiles` tiles, the first being the ring's number `at`. Returns the span's peak, the sum of its
    weights (first warpgroup only), and this one's half of its values, in two parts. `turns`, passed in and returned:
    how many tiles this warpgroup has weighed, and how many weighed by the other one it has added."""
    QUARTER: gl.constexpr = shared.ring.k_latent.shape[2]
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
        s = warpgroup_mma_wait(0, deps=[_scores(shared, at + mine)])
    if mine == 0:
        peak, factor = _weigh(shared, turn, s, begin, last, peak, scale_log2, mine)
        turn += 1
        s, weight, acc_0, acc_1 = _add_own(shared, at, tiles > 2, s, factor, mine, weight, acc_0, acc_1)
    for tile in range(2 - mine, tiles, 2):
        mbarrier.wait(shared.weighed.index(1 - mine), their_turn & 1)
        their_peak = shared.peaks.index(1 - mine).load(gl.SliceLayout(1, S))
        their_factor = shared.factors.index(1 - mine).load(gl.SliceLayout(1, O))
        # First, what the other warpgroup is waiting for.
        peak, factor = _weigh(shared, turn, s, begin + tile * _TILE, last, their_peak, scale_log2, mine)
        weight, acc_0, acc_1 = _add_theirs(shared, at + tile - 1, their_factor, mine, weight, acc_0, acc_1)
        s, weight, acc_0, acc_1 = _add_own(shared, at + tile, tile + 2 < tiles, s, factor, mine, weight, acc_0, acc_1)
        turn += 1
        their_turn += 1
    if (tiles - 1 - mine) % 2 != 0:
        mbarrier.wait(shared.weighed.index(1 - mine), their_turn & 1)
        peak = shared.peaks.index(1 - mine).load(gl.SliceLayout(1, S))
        their_factor = shared.factors.index(1 - mine).load(gl.SliceLayout(1, O))
        weight, acc_0, acc_1 = _add_theirs(shared, at + tiles - 1, their_factor, mine, weight, acc_0, acc_1)
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
