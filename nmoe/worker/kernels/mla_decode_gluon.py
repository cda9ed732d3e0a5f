"""Absorbed latent attention of one query per row over pages, for many heads, with specialised warps, in Gluon.
mla_decode_triton.py describes how the rows' contexts are cut into equal parts; a row within one part is finished here.

With 64 heads per program the tensor cores are the bound, not memory. Scores of 64 positions at a time keep them as busy
as the shared memory that they read (of 32, that would be the bound), and two such tiles are all that fits beside the
queries:

    producer, one warp   loads queries, and tiles of positions from the pages into a ring of two, in halves: the left
                         half of the latents with the ropes, and the right half
    two warpgroups       weigh a row's tiles in turns: the first its even tiles, the second its odd ones. The first adds
                         the left half of all tiles' values, the second the right half

A tile's weights depend on the largest score so far, which comes from the warpgroup that had the previous tile, together
with that tile's weights, through shared memory. So weights become known strictly one tile after another, and one buffer
does: whoever writes it has added what it held before, and so has the other warpgroup, which had to before it could
weigh the tile in between, or, after a piece's last tile, before it said that its sums are there. A warpgroup's own
weights are multiplied from registers. Half a tile is free once its values are added: the weights were there, so the
scores were, too. This order of work follows FlashMLA's "seesaw" (its docs/20250422-new-kernel-deep-dive.md,
github.com/deepseek-ai/FlashMLA).

Shape suffixes: R rows, H heads, M a program's heads, L latent, P rope dimensions, C = L + P, K rows of the cache, B
pages of a row (padded); layouts S of scores, O of values, with heads over lanes in the same way.
"""

import math
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

from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.hopper_gluon import descriptor, wait_for_kernel_before
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.mla_parts_gluon import part_of, piece_of
from nmoe.worker.kernels.mla_ring_gluon import Ring, load_old_tiles, load_queries, load_tiles, make_ring, rope_queries
from nmoe.worker.kernels.mla_tiles_triton import block_of_rows
from nmoe.worker.kernels.mla_values_gluon import Parts
from nmoe.worker.kernels.mla_warps_gluon import ROWS, rope_descriptor

TILE = 64  # positions weighed at a time
_M, _TILE, _STAGES = gl.constexpr(ROWS), gl.constexpr(TILE), gl.constexpr(2)


class _Shared(NamedTuple):
    """Shared memory."""

    ring: Ring  # in halves: each is freed by the warpgroup that adds it
    weights: gl.shared_memory_descriptor  # [M, tile]: of the tile weighed last
    factors: gl.shared_memory_descriptor  # [2, M]: multiply the values so far before a warpgroup's tile is added
    peaks: gl.shared_memory_descriptor  # [2, M]: the largest scaled score up to a warpgroup's tile
    sums: gl.shared_memory_descriptor  # [2 * 2, M]: of a warpgroup's weights in a piece, for even and for odd pieces
    # Barriers
    weighed: gl.shared_memory_descriptor  # [2]
    # [1]: both sums of a piece are present, and the weights of its last tile have been added by both
    summed: gl.shared_memory_descriptor


@gluon.jit
def _make_shared(descs):
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    HEADS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_M, _TILE], gl.bfloat16)
    shared = _Shared(
        ring=make_ring(descs, _STAGES, 2, 1, 2),
        weights=gl.allocate_shared_memory(gl.bfloat16, [_M, _TILE], WEIGHTS),
        factors=gl.allocate_shared_memory(gl.float32, [2, _M], HEADS),
        peaks=gl.allocate_shared_memory(gl.float32, [2, _M], HEADS),
        sums=gl.allocate_shared_memory(gl.float32, [4, _M], HEADS),
        weighed=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        summed=gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER),
    )
    for i in gl.static_range(2):
        mbarrier.init(shared.weighed.index(i), count=1)
    mbarrier.init(shared.summed.index(0), count=2)
    fence_async_shared()
    return shared


@gluon.jit
def _produce(shared, plan, descs, pages_ptr, max_pages, NOPE: gl.constexpr, BLOCK_R: gl.constexpr, PAGE: gl.constexpr):
    contexts_ptr, prefix_ptr, num_rows = plan
    L: gl.constexpr = 4 * shared.ring.k_latent.shape[2]
    at, stop, row = part_of(prefix_ptr, num_rows, BLOCK_R, 1)
    pieces = 0
    tiles = 0
    if at < stop:  # what was cached in earlier steps is there before the kernel before has ended
        begin, end, _ = piece_of(contexts_ptr, prefix_ptr, row, at, stop, PAGE)
        row_pages_ptr = pages_ptr + row.to(gl.int64) * max_pages
        context = gl.load(contexts_ptr + row)
        tiles = load_old_tiles(shared.ring, descs, row_pages_ptr, context, begin, end, 1, PAGE)
    wait_for_kernel_before()
    loaded = tiles * _TILE
    while at < stop:
        begin, end, at = piece_of(contexts_ptr, prefix_ptr, row, at, stop, PAGE)
        row_pages_ptr = pages_ptr + row.to(gl.int64) * max_pages
        # A tile finds room before the queries do: the piece before still needs those.
        ahead = gl.minimum(begin + _TILE, end)
        tiles = load_tiles(shared.ring, descs, row_pages_ptr, begin + loaded, ahead, tiles, PAGE)
        loaded = 0
        head = gl.program_id(1) * _M
        load_queries(shared.ring, descs, (head, row * L), (row, head, NOPE), pieces)
        tiles = load_tiles(shared.ring, descs, row_pages_ptr, ahead, end, tiles, PAGE)
        pieces += 1
        row += 1


@gluon.jit
def _scores(shared, at, position, end, scale_log2):
    """The scaled scores of the ring's tile number `at`, [M, tile], whose first position is given, with -inf for those
    from `end` on; and each head's largest."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    stage, phase = at % _STAGES, at // _STAGES & 1
    # Zero, which the compiler does not know: it would keep the places of all queries in registers throughout the loop.
    zero = at >> 28
    mbarrier.wait(shared.ring.filled.index(stage * 2), phase)
    s = warpgroup_mma_init(gl.zeros([_M, _TILE], gl.float32, S))
    s = warpgroup_mma(
        rope_queries(shared.ring, 0), shared.ring.k_rope.index(stage).permute((1, 0)), s, use_acc=False, is_async=True
    )
    for i in gl.static_range(4):
        if i == 2:
            mbarrier.wait(shared.ring.filled.index(stage * 2 + 1), phase)
        keys = shared.ring.k_latent.index(stage * 4 + i).permute((1, 0))
        s = warpgroup_mma(shared.ring.q_latent.index(i + zero), keys, s, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    key = position + gl.arange(0, _TILE, gl.SliceLayout(0, S))
    s = gl.where((key < end)[None, :], s * scale_log2, float("-inf"))
    return s, gl.max(s, 1)


@gluon.jit
def _weigh(s, tile_peak, peak):
    """The weights of a tile's positions from its scores, bfloat16 [M, tile], and their sums; the new peak, and the
    factor for what was added before."""
    new_peak = gl.maximum(peak, tile_peak)
    p = gl.exp2(s - new_peak[:, None]).to(gl.bfloat16)
    return p, gl.sum(p.to(gl.float32), 1), new_peak, gl.exp2(peak - new_peak)


@gluon.jit
def _publish(shared, p, peak, factor, mine: gl.constexpr):
    """Give the other warpgroup a tile's weights."""
    shared.weights.store(p)
    shared.factors.index(mine).store(factor)
    shared.peaks.index(mine).store(peak)
    fence_async_shared()
    mbarrier.arrive(shared.weighed.index(mine), count=1)


@gluon.jit
def _receive(shared, turn, layout: gl.constexpr, whose: gl.constexpr):
    """Wait for the other warpgroup's tile number `turn` to be weighed. Returns its peak and its factor."""
    mbarrier.wait(shared.weighed.index(whose), turn & 1)
    return shared.peaks.index(whose).load(layout), shared.factors.index(whose).load(layout)


@gluon.jit
def _add(shared, at, p, acc, factor, mine: gl.constexpr):
    """Start adding tile number `at` of the ring: its values times the weights `p`, in this warpgroup's half of the
    columns, to what was there times the tile's factor."""
    factor_O = gl.convert_layout(factor, gl.SliceLayout(1, acc[0].type.layout))[:, None]
    columns = at % _STAGES * 4 + 2 * mine
    acc_0 = warpgroup_mma(p, shared.ring.k_latent.index(columns), acc[0] * factor_O, is_async=True)
    acc_1 = warpgroup_mma(p, shared.ring.k_latent.index(columns + 1), acc[1] * factor_O, is_async=True)
    return acc_0, acc_1


@gluon.jit
def _added(shared, at, adding, mine: gl.constexpr):
    """Wait for what `_add` started with the other warpgroup's weights, and free this one's half of the tile."""
    acc_0, acc_1 = warpgroup_mma_wait(0, deps=[adding[0], adding[1]])
    mbarrier.arrive(shared.ring.free.index(at % _STAGES * 2 + mine), count=1)
    return acc_0, acc_1


@gluon.jit
def _add_own(shared, at, p, acc, factor, mine: gl.constexpr):
    """Add a tile weighed by this warpgroup, from registers, and free its half of it."""
    p = gl.convert_layout(p, gl.DotOperandLayout(0, acc[0].type.layout, 2))
    adding = _add(shared, at, p, acc, factor, mine)
    acc_0, acc_1, p = warpgroup_mma_wait(0, deps=[adding[0], adding[1], p])
    mbarrier.arrive(shared.ring.free.index(at % _STAGES * 2 + mine), count=1)
    return acc_0, acc_1


@gluon.jit
def _attend_even(shared, at, begin, end, scale_log2, their_turn, acc):
    """The first warpgroup's work on a piece whose first tile is the ring's number `at`. `their_turn`: how many tiles
    the second one has weighed. Returns the piece's peak, the sum of the weights of even tiles, and its half of the
    values. The queries are free once both warpgroups have computed their last scores."""
    HEADS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16]))
    tiles = (end - begin + _TILE - 1) // _TILE
    peak = gl.full([_M], float("-inf"), gl.float32, HEADS)
    weight = gl.zeros([_M], gl.float32, HEADS)
    s, tile_peak = _scores(shared, at, begin, end, scale_log2)
    mbarrier.arrive(shared.ring.q_bars.index(1), count=1, pred=tiles < 3)
    for tile in range(0, tiles, 2):
        p, total, peak, factor = _weigh(s, tile_peak, peak)
        _publish(shared, p, peak, factor, 0)
        weight = weight * factor + total
        acc = _add_own(shared, at + tile, p, acc, factor, 0)
        if tile + 1 < tiles:
            peak, factor = _receive(shared, their_turn, HEADS, 1)
            their_turn += 1
            weight *= factor
            adding = _add(shared, at + tile + 1, shared.weights, acc, factor, 0)
            acc = _added(shared, at + tile + 1, adding, 0)
        if tile + 2 < tiles:
            s, tile_peak = _scores(shared, at + tile + 2, begin + (tile + 2) * _TILE, end, scale_log2)
            mbarrier.arrive(shared.ring.q_bars.index(1), count=1, pred=tile + 4 >= tiles)
    return peak, weight, acc


@gluon.jit
def _attend_odd(shared, at, begin, end, scale_log2, their_turn, acc):
    """The second warpgroup's work, with odd tiles; see `_attend_even`. It weighs while it adds the first one's tile."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    HEADS: gl.constexpr = gl.SliceLayout(1, S)
    tiles = (end - begin + _TILE - 1) // _TILE
    peak = gl.full([_M], float("-inf"), gl.float32, HEADS)
    weight = gl.zeros([_M], gl.float32, HEADS)
    s, tile_peak = gl.zeros([_M, _TILE], gl.float32, S), peak
    if tiles > 1:
        s, tile_peak = _scores(shared, at + 1, begin + _TILE, end, scale_log2)
    mbarrier.arrive(shared.ring.q_bars.index(1), count=1, pred=tiles < 4)
    for tile in range(0, tiles - 1, 2):
        peak, factor = _receive(shared, their_turn, HEADS, 0)
        their_turn += 1
        weight *= factor
        adding = _add(shared, at + tile, shared.weights, acc, factor, 1)
        p, total, peak, factor = _weigh(s, tile_peak, peak)
        acc = _added(shared, at + tile, adding, 1)
        _publish(shared, p, peak, factor, 1)
        weight = weight * factor + total
        acc = _add_own(shared, at + tile + 1, p, acc, factor, 1)
        if tile + 3 < tiles:
            s, tile_peak = _scores(shared, at + tile + 3, begin + (tile + 3) * _TILE, end, scale_log2)
            mbarrier.arrive(shared.ring.q_bars.index(1), count=1, pred=tile + 5 >= tiles)
    if tiles % 2 == 1:
        peak, factor = _receive(shared, their_turn, HEADS, 0)
        weight *= factor
        adding = _add(shared, at + tiles - 1, shared.weights, acc, factor, 1)
        acc = _added(shared, at + tiles - 1, adding, 1)
    return peak, weight, acc


@gluon.jit
def _attend(
    shared,
    plan,
    rows,
    scale_log2,
    HEADS: gl.constexpr,
    BLOCK_R: gl.constexpr,
    PAGE: gl.constexpr,
    KEPT: gl.constexpr,
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1."""
    contexts_ptr, prefix_ptr, num_rows = plan
    partial_ptr, lse_ptr, out_ptr = rows
    QUARTER: gl.constexpr = shared.ring.k_latent.shape[2]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 16])  # noqa: E741
    head = gl.program_id(1) * _M
    lane_O = gl.arange(0, _M, gl.SliceLayout(1, O))
    column = 2 * mine * QUARTER + gl.arange(0, QUARTER, gl.SliceLayout(0, O))[None, :]
    at, stop, row = part_of(prefix_ptr, num_rows, BLOCK_R, 4)
    pieces = 0
    tiles = 0
    their_turns = 0
    while at < stop:
        begin, end, at = piece_of(contexts_ptr, prefix_ptr, row, at, stop, PAGE)
        whole = (begin == 0) & (at == gl.load(prefix_ptr + row + 1))
        count = (end - begin + _TILE - 1) // _TILE
        mbarrier.wait(shared.ring.q_bars.index(0), pieces & 1)
        zeros = gl.zeros([_M, QUARTER], gl.float32, O)
        if mine == 0:
            peak, weight, acc = _attend_even(shared, tiles, begin, end, scale_log2, their_turns, (zeros, zeros))
            their_turns += count // 2
        else:
            peak, weight, acc = _attend_odd(shared, tiles, begin, end, scale_log2, their_turns, (zeros, zeros))
            their_turns += (count + 1) // 2
        tiles += count
        sums = (pieces & 1) * 2
        shared.sums.index(sums + mine).store(weight)
        mbarrier.arrive(shared.summed.index(0), count=1)
        mbarrier.wait(shared.summed.index(0), pieces & 1)
        weight += shared.sums.index(sums + 1 - mine).load(weight.type.layout)
        slot = (row + gl.program_id(0)).to(gl.int64) * HEADS + head
        if mine == 0:
            gl.store(lse_ptr + slot + gl.arange(0, _M, peak.type.layout), peak + gl.log2(weight))
        factor = gl.convert_layout(1.0 / weight, gl.SliceLayout(1, O))[:, None]
        to_ptr = partial_ptr
        place = slot + lane_O
        if whole:
            to_ptr = out_ptr
            place = (head + lane_O).to(gl.int64) * num_rows + row
        to_ptr += place[:, None] * (4 * QUARTER) + column
        for i in gl.static_range(2):
            values = (acc[i] * factor).to(to_ptr.dtype.element_ty)
            gl.store(to_ptr + i * QUARTER, values, eviction_policy=KEPT)
        pieces += 1
        row += 1


@gluon.jit(do_not_specialize=["num_rows", "max_pages"], do_not_specialize_on_alignment=["pages_ptr"])
def _decode_kernel(
    q_desc,
    latent_desc,
    rope_desc,
    q_rope_desc,
    pages_ptr,
    contexts_ptr,
    prefix_ptr,
    partial_ptr,
    lse_ptr,
    out_ptr,
    num_rows,
    max_pages,
    scale_log2,
    NOPE: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_R: gl.constexpr,
    PAGE: gl.constexpr,
    KEPT: gl.constexpr,
):
    descs = (latent_desc, rope_desc, q_desc, q_rope_desc)
    shared = _make_shared(descs)
    plan = (contexts_ptr, prefix_ptr, num_rows)
    rows = (partial_ptr, lse_ptr, out_ptr)
    gl.warp_specialize(
        [
            (_attend, (shared, plan, rows, scale_log2, HEADS, BLOCK_R, PAGE, KEPT, 0)),
            (_attend, (shared, plan, rows, scale_log2, HEADS, BLOCK_R, PAGE, KEPT, 1)),
            (_produce, (shared, plan, descs, pages_ptr, max_pages, NOPE, BLOCK_R, PAGE)),
        ],
        [4, 1],
        [232, 24],
    )


def num_parts(multiprocessors: int, heads: int) -> int:
    """The number of parts that the contexts are cut into: each has a program per 64 heads."""
    return max(1, multiprocessors * ROWS // heads)


def attend_parts(
    q_latent_HRL: torch.Tensor,
    q_RHQ: torch.Tensor,
    rows_KC: torch.Tensor,
    pages_RB: torch.Tensor,
    contexts_R: torch.Tensor,
    page_size: int,
    scale: float,
    parts: Parts,
) -> None:
    """The rows' attended latents into `parts`, everything but its prefix. H is a multiple of 64, and `page_size` one of
    TILE. Every row must have a context of at least one position: the warps would wait forever for an empty tile."""
    heads, rows, latent = q_latent_HRL.shape
    rope, quarter = rows_KC.shape[1] - latent, latent // 4
    _decode_kernel[(parts.num_parts, heads // ROWS)](
        descriptor(q_latent_HRL.view(heads, rows * latent), ROWS, quarter),
        descriptor(rows_KC, TILE, quarter),
        descriptor(rows_KC, TILE, rope),
        rope_descriptor(q_RHQ, ROWS, rope),
        pages_RB,
        contexts_R,
        parts.prefix,
        parts.partial,
        parts.lse,
        parts.whole_HRL,
        rows,
        pages_RB.stride(0),
        scale * math.log2(math.e),
        NOPE=q_RHQ.shape[2] - rope,
        HEADS=heads,
        BLOCK_R=block_of_rows(rows),
        PAGE=page_size,
        KEPT=kept(rows),
        num_warps=4,
        launch_pdl=early(rows),
    )
