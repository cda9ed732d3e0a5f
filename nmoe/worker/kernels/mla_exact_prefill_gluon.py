"""Absorbed latent attention of the exact class for prefills: warps with roles of their own, in Gluon.

The arithmetic of a query is mla_exact_triton.py's. A program takes the queries of a few neighbouring positions (64 rows:
heads times queries), which begin at a multiple of their number, so that all see the same tiles and spans.

    producer, one warp   queries, and tiles of positions from the pages into a ring
    first warpgroup      scores of the next tile on the matrix unit beside the weights of this one; half of the values
    second warpgroup     those weights, through shared memory, with the other half

A tile stays in the ring until both halves of its values are added. After a span each warpgroup merges its half with
those before it, which wait in the program's scratch: both at once would not fit the registers.

What there is is read on the device, as in mla_prefill_triton.py: a launch for the most that a step can have serves
every smaller one. A row with queries and no context is padding: its output is zero.

Shape suffixes: T tokens, R rows of the step, H heads, L latent, P rope dimensions, Q a query's, C = L + P, K rows of the
cache, B pages of a row (padded).
"""

import math
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.worker.chunks import TILE as QUERY_TILE
from nmoe.worker.chunks import Chunks
from nmoe.worker.kernels.mla_decode_triton import multiprocessors
from nmoe.worker.kernels.mla_exact_triton import MOST_SPANS, ROWS, SPAN, TILE, form_of

_SPAN, _MOST_SPANS = gl.constexpr(SPAN), gl.constexpr(MOST_SPANS)
_M = gl.constexpr(ROWS)
_SHARED_BYTES = 227 << 10  # of a multiprocessor of Hopper
_OTHER_BYTES = 10944  # of these, what is neither queries nor ring


class _Shared(NamedTuple):
    """Shared memory. Latents lie in quarters of their columns."""

    q_latent: gl.shared_memory_descriptor  # [4, M, L / 4]
    q_rope: gl.shared_memory_descriptor  # [M, P]
    k_latent: gl.shared_memory_descriptor  # [stages * 4, tile, L / 4]
    k_rope: gl.shared_memory_descriptor  # [stages, tile, P]
    weights: gl.shared_memory_descriptor  # [2, M, tile]: of the positions of a tile
    ones: gl.shared_memory_descriptor  # [tile, 16]
    factors: gl.shared_memory_descriptor  # [2, M]: what the values so far are multiplied by before a tile's are added
    merging: gl.shared_memory_descriptor  # [3, M]: factors of the values before a span and of its own, weight of all
    # Barriers, in pairs (filled, free) but for the ring's
    q_bars: gl.shared_memory_descriptor
    filled: gl.shared_memory_descriptor  # [stages]
    free: gl.shared_memory_descriptor  # [stages]
    weighed: gl.shared_memory_descriptor  # [2]
    weights_free: gl.shared_memory_descriptor  # [2]
    merge_bars: gl.shared_memory_descriptor


class _Group(NamedTuple):
    """A program's piece of work: the queries of a few neighbouring positions."""

    row: gl.tensor
    token: gl.tensor  # of the group's first position, which may lie before the row's
    first: gl.tensor  # position
    low: gl.tensor  # positions asked for are in [low, high)
    high: gl.tensor
    context: gl.tensor  # 0: nothing to attend to
    span: gl.tensor
    is_padding: gl.tensor


@gluon.jit
def _group(
    item, starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, num_tiles, QUERIES: gl.constexpr, PER_TILE: gl.constexpr
):
    # A tile of queries that begins between two groups' bounds has parts of one group more.
    GROUPS: gl.constexpr = PER_TILE // QUERIES + 1
    tile = num_tiles - 1 - item // GROUPS
    row = gl.load(tile_row_ptr + tile)
    token = gl.load(starts_ptr + row)
    length = gl.load(starts_ptr + row + 1) - token
    is_padding = gl.load(firsts_ptr + row) + length == 0
    position = gl.maximum(gl.load(firsts_ptr + row), 0)
    low = position + gl.load(tile_start_ptr + tile)
    high = gl.minimum(low + PER_TILE, position + length)
    first = (low // QUERIES + GROUPS - 1 - item % GROUPS) * QUERIES
    context = gl.where((first < high) & (is_padding == 0), gl.minimum(first + QUERIES, high), 0)
    span = _SPAN + first * 0
    for _ in gl.static_range(16):
        span = gl.where(span * _MOST_SPANS < first + 1, span * 2, span)
    return _Group(row, token + first - position, first, low, high, context, span, is_padding)


@gluon.jit
def _produce(
    shared,
    cut,
    latent_desc,
    rope_desc,
    q_desc,
    pages_ptr,
    max_pages,
    HEADS: gl.constexpr,
    BLOCK_H: gl.constexpr,
    PER_TILE: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
):
    QUERIES: gl.constexpr = _M // BLOCK_H
    TILE: gl.constexpr = shared.k_latent.shape[1]
    QUARTER: gl.constexpr = shared.k_latent.shape[2]
    ROPE: gl.constexpr = shared.k_rope.shape[2]
    starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, num_tiles_ptr = cut
    num_tiles = gl.load(num_tiles_ptr)
    groups = 0
    at = 0
    for item in range(gl.program_id(0), num_tiles * (PER_TILE // QUERIES + 1), gl.num_programs(0)):
        group = _group(item, starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, num_tiles, QUERIES, PER_TILE)
        if group.context > 0:
            mbarrier.wait(shared.q_bars.index(1), (groups & 1) ^ 1)
            mbarrier.expect(shared.q_bars.index(0), _M * 4 * QUARTER * 2)
            q_row = group.token * HEADS + gl.program_id(1) * BLOCK_H
            for i in gl.static_range(4):
                to = shared.q_latent.index(i)
                tma.async_copy_global_to_shared(q_desc, [q_row, i * QUARTER], shared.q_bars.index(0), to)
            groups += 1
        for position in range(0, group.context, TILE):
            stage = at % STAGES
            page = gl.load(pages_ptr + group.row.to(gl.int64) * max_pages + position // PAGE)
            k_row = page.to(gl.int32) * PAGE + position % PAGE
            mbarrier.wait(shared.free.index(stage), (at // STAGES & 1) ^ 1)
            filled = shared.filled.index(stage)
            mbarrier.expect(filled, TILE * (4 * QUARTER + ROPE) * 2)
            for i in gl.static_range(4):
                to = shared.k_latent.index(stage * 4 + i)
                tma.async_copy_global_to_shared(latent_desc, [k_row, i * QUARTER], filled, to)
            tma.async_copy_global_to_shared(rope_desc, [k_row, 4 * QUARTER], filled, shared.k_rope.index(stage))
            at += 1


@gluon.jit
def _scores(shared, at, STAGES: gl.constexpr):
    """The queries times the keys of the ring's tile number `at`, [M, tile], begun."""
    TILE: gl.constexpr = shared.k_latent.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    stage = at % STAGES
    mbarrier.wait(shared.filled.index(stage), at // STAGES & 1)
    s = warpgroup_mma_init(gl.zeros([_M, TILE], gl.float32, S))
    for i in gl.static_range(4):
        keys = shared.k_latent.index(stage * 4 + i).permute((1, 0))
        s = warpgroup_mma(shared.q_latent.index(i), keys, s, use_acc=i > 0, is_async=True)
    return warpgroup_mma(shared.q_rope, shared.k_rope.index(stage).permute((1, 0)), s, is_async=True)


@gluon.jit
def _weigh(shared, at, s, position, last, peak, scale_log2):
    """The weights of a tile's positions from its scores, into shared memory; the new peak, and the factor of what was
    added before."""
    TILE: gl.constexpr = shared.k_latent.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    key = position + gl.arange(0, TILE, gl.SliceLayout(0, S))
    s = gl.where(key[None, :] <= last[:, None], s * scale_log2, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, 1))
    factor = gl.exp2(peak - new_peak)
    p = gl.exp2(s - new_peak[:, None]).to(gl.bfloat16)
    slot = at % 2
    mbarrier.wait(shared.weights_free.index(slot), (at // 2 & 1) ^ 1)
    shared.weights.index(slot).store(p)
    shared.factors.index(slot).store(factor)
    fence_async_shared()
    mbarrier.arrive(shared.weighed.index(slot), count=1)
    return new_peak, factor


@gluon.jit
def _add(shared, at, weight_sum, acc_0, acc_1, STAGES: gl.constexpr):
    """A tile's weights, and its values times these in the first half of their columns, added: begun."""
    p = shared.weights.index(at % 2)
    first = at % STAGES * 4
    weight_sum = warpgroup_mma(p, shared.ones, weight_sum, is_async=True)
    acc_0 = warpgroup_mma(p, shared.k_latent.index(first), acc_0, is_async=True)
    acc_1 = warpgroup_mma(p, shared.k_latent.index(first + 1), acc_1, is_async=True)
    return weight_sum, acc_0, acc_1


@gluon.jit
def _merge(
    acc,
    lane,
    column,
    before,
    here,
    weight,
    begin,
    group,
    position_of_lane,
    merged_ptr,
    out_ptr,
    out_rows,
    L: gl.constexpr,
):
    """A span's accumulated values of some columns, added to those before; those of the last span are the result."""
    COLUMNS: gl.constexpr = acc.shape[1]
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, acc.type.layout))[None, :]
    place = lane[:, None] * L + columns
    old = gl.load(merged_ptr + place, mask=(place >= 0) & (begin > 0), other=0.0)
    acc = old * before[:, None] + acc * here[:, None]
    if begin + group.span < group.context:
        gl.store(merged_ptr + place, acc)
    else:
        exists = (position_of_lane >= group.low) & (position_of_lane < group.high)
        value = (acc * (1.0 / weight)[:, None]).to(out_ptr.dtype.element_ty)
        gl.store(out_ptr + out_rows[:, None] * L + columns, value, mask=exists[:, None] & (columns >= 0))


@gluon.jit
def _zero(out_ptr, out_rows, position_of_lane, group, column, COLUMNS: gl.constexpr, L: gl.constexpr, O: gl.constexpr):  # noqa: E741
    """The result of a group's queries in some columns, if they are padding."""
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, O))[None, :]
    exists = (position_of_lane >= group.low) & (position_of_lane < group.high)
    zeros = gl.zeros([_M, COLUMNS], out_ptr.dtype.element_ty, O)
    gl.store(out_ptr + out_rows[:, None] * L + columns, zeros, mask=exists[:, None] & (columns >= 0))


@gluon.jit
def _attend_first(
    shared,
    cut,
    q_ptr,
    merged_ptr,
    out_ptr,
    scale_log2,
    Q_STRIDE: gl.constexpr,
    NOPE: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_H: gl.constexpr,
    PER_TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The first warpgroup: scores, weights, and the first half of the values."""
    QUERIES: gl.constexpr = _M // BLOCK_H
    TILE: gl.constexpr = shared.k_latent.shape[1]
    QUARTER: gl.constexpr = shared.k_latent.shape[2]
    ROPE: gl.constexpr = shared.k_rope.shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 16])  # noqa: E741
    W: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    LOADS: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // ROPE, ROPE // 8], [4, 1], [1, 0])
    starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, num_tiles_ptr = cut
    lane_S = gl.arange(0, _M, gl.SliceLayout(1, S))
    lane_O = gl.arange(0, _M, gl.SliceLayout(1, O))
    lane_Q = gl.arange(0, _M, gl.SliceLayout(1, LOADS))
    rope = gl.arange(0, ROPE, gl.SliceLayout(0, LOADS))
    head = gl.program_id(1) * BLOCK_H
    num_tiles = gl.load(num_tiles_ptr)
    groups = 0
    spans = 0
    at = 0
    for item in range(gl.program_id(0), num_tiles * (PER_TILE // QUERIES + 1), gl.num_programs(0)):
        group = _group(item, starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, num_tiles, QUERIES, PER_TILE)
        position_O = group.first + lane_O // BLOCK_H
        rows_O = (group.token + lane_O // BLOCK_H).to(gl.int64) * HEADS + head + lane_O % BLOCK_H
        if group.context > 0:
            position_Q = group.first + lane_Q // BLOCK_H
            q_at = (group.token + lane_Q // BLOCK_H).to(gl.int64) * Q_STRIDE
            q_at += (head + lane_Q % BLOCK_H) * (NOPE + ROPE) + NOPE
            exists = (position_Q >= group.low) & (position_Q < group.high)
            q_rope = gl.load(
                q_ptr + q_at[:, None] + rope[None, :], mask=exists[:, None] & (rope >= 0)[None, :], other=0.0
            )
            shared.q_rope.store(q_rope)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.wait(shared.q_bars.index(0), groups & 1)
        peak = gl.full([_M], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        weight = gl.zeros([_M], gl.float32, gl.SliceLayout(1, S))
        last = group.first + lane_S // BLOCK_H
        for begin in range(0, group.context, group.span):
            stop = gl.minimum(begin + group.span, group.context)
            span_peak = gl.full([_M], float("-inf"), gl.float32, gl.SliceLayout(1, S))
            span_sum = gl.zeros([_M, 16], gl.float32, W)
            acc_0 = gl.zeros([_M, QUARTER], gl.float32, O)
            acc_1 = gl.zeros([_M, QUARTER], gl.float32, O)
            s = warpgroup_mma_wait(0, deps=[_scores(shared, at, STAGES)])
            span_peak, _ = _weigh(shared, at, s, begin, last, span_peak, scale_log2)
            for position in range(begin + TILE, stop, TILE):
                scoring = _scores(shared, at + 1, STAGES)
                adding = _add(shared, at, span_sum, acc_0, acc_1, STAGES)
                s = warpgroup_mma_wait(3, deps=[scoring])  # the three products just begun go on
                span_peak, factor = _weigh(shared, at + 1, s, position, last, span_peak, scale_log2)
                span_sum, acc_0, acc_1 = warpgroup_mma_wait(0, deps=adding)
                mbarrier.arrive(shared.free.index(at % STAGES), count=1)
                span_sum *= gl.convert_layout(factor, gl.SliceLayout(1, W))[:, None]
                factor_O = gl.convert_layout(factor, gl.SliceLayout(1, O))[:, None]
                acc_0 *= factor_O
                acc_1 *= factor_O
                at += 1
            adding = _add(shared, at, span_sum, acc_0, acc_1, STAGES)
            span_sum, acc_0, acc_1 = warpgroup_mma_wait(0, deps=adding)
            mbarrier.arrive(shared.free.index(at % STAGES), count=1)
            mbarrier.arrive(shared.q_bars.index(1), count=1, pred=begin + group.span >= group.context)
            at += 1
            span_weight_S = gl.convert_layout(gl.max(span_sum, 1), gl.SliceLayout(1, S))
            new_peak = gl.maximum(peak, span_peak)
            before = gl.exp2(peak - new_peak)
            here = gl.exp2(span_peak - new_peak)
            weight = weight * before + span_weight_S * here
            peak = new_peak
            mbarrier.wait(shared.merge_bars.index(1), (spans & 1) ^ 1)
            shared.merging.index(0).store(before)
            shared.merging.index(1).store(here)
            shared.merging.index(2).store(weight)
            mbarrier.arrive(shared.merge_bars.index(0), count=1)
            spans += 1
            before_O = gl.convert_layout(before, gl.SliceLayout(1, O))
            here_O = gl.convert_layout(here, gl.SliceLayout(1, O))
            weight_O = gl.convert_layout(weight, gl.SliceLayout(1, O))
            _merge(
                acc_0,
                lane_O,
                0,
                before_O,
                here_O,
                weight_O,
                begin,
                group,
                position_O,
                merged_ptr,
                out_ptr,
                rows_O,
                4 * QUARTER,
            )
            _merge(
                acc_1,
                lane_O,
                QUARTER,
                before_O,
                here_O,
                weight_O,
                begin,
                group,
                position_O,
                merged_ptr,
                out_ptr,
                rows_O,
                4 * QUARTER,
            )
        groups += (group.context > 0).to(gl.int32)
        if group.is_padding:
            _zero(out_ptr, rows_O, position_O, group, 0, 2 * QUARTER, 4 * QUARTER, O)


@gluon.jit
def _attend_second(
    shared,
    cut,
    merged_ptr,
    out_ptr,
    HEADS: gl.constexpr,
    BLOCK_H: gl.constexpr,
    PER_TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The second warpgroup: the second half of the values."""
    QUERIES: gl.constexpr = _M // BLOCK_H
    TILE: gl.constexpr = shared.k_latent.shape[1]
    QUARTER: gl.constexpr = shared.k_latent.shape[2]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 16])  # noqa: E741
    starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, num_tiles_ptr = cut
    lane = gl.arange(0, _M, gl.SliceLayout(1, O))
    head = gl.program_id(1) * BLOCK_H
    num_tiles = gl.load(num_tiles_ptr)
    spans = 0
    at = 0
    for item in range(gl.program_id(0), num_tiles * (PER_TILE // QUERIES + 1), gl.num_programs(0)):
        group = _group(item, starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, num_tiles, QUERIES, PER_TILE)
        position_O = group.first + lane // BLOCK_H
        rows = (group.token + lane // BLOCK_H).to(gl.int64) * HEADS + head + lane % BLOCK_H
        for begin in range(0, group.context, group.span):
            stop = gl.minimum(begin + group.span, group.context)
            acc_0 = warpgroup_mma_init(gl.zeros([_M, QUARTER], gl.float32, O))
            acc_1 = warpgroup_mma_init(gl.zeros([_M, QUARTER], gl.float32, O))
            for position in range(begin, stop, TILE):
                stage = at % STAGES
                slot = at % 2
                mbarrier.wait(shared.filled.index(stage), at // STAGES & 1)
                mbarrier.wait(shared.weighed.index(slot), at // 2 & 1)
                factor = shared.factors.index(slot).load(gl.SliceLayout(1, O))[:, None]
                so_far_0, so_far_1 = warpgroup_mma_wait(0, deps=[acc_0, acc_1])
                mbarrier.arrive(shared.free.index((at + STAGES - 1) % STAGES), count=1, pred=position > begin)
                mbarrier.arrive(shared.weights_free.index((at + 1) % 2), count=1, pred=position > begin)
                p = shared.weights.index(slot)
                acc_0 = warpgroup_mma(p, shared.k_latent.index(stage * 4 + 2), so_far_0 * factor, is_async=True)
                acc_1 = warpgroup_mma(p, shared.k_latent.index(stage * 4 + 3), so_far_1 * factor, is_async=True)
                at += 1
            span_0, span_1 = warpgroup_mma_wait(0, deps=[acc_0, acc_1])
            mbarrier.arrive(shared.free.index((at + STAGES - 1) % STAGES), count=1)
            mbarrier.arrive(shared.weights_free.index((at + 1) % 2), count=1)
            mbarrier.wait(shared.merge_bars.index(0), spans & 1)
            before = shared.merging.index(0).load(gl.SliceLayout(1, O))
            here = shared.merging.index(1).load(gl.SliceLayout(1, O))
            weight = shared.merging.index(2).load(gl.SliceLayout(1, O))
            mbarrier.arrive(shared.merge_bars.index(1), count=1)
            spans += 1
            _merge(
                span_0,
                lane,
                2 * QUARTER,
                before,
                here,
                weight,
                begin,
                group,
                position_O,
                merged_ptr,
                out_ptr,
                rows,
                4 * QUARTER,
            )
            _merge(
                span_1,
                lane,
                3 * QUARTER,
                before,
                here,
                weight,
                begin,
                group,
                position_O,
                merged_ptr,
                out_ptr,
                rows,
                4 * QUARTER,
            )
        if group.is_padding:
            _zero(out_ptr, rows, position_O, group, 2 * QUARTER, 2 * QUARTER, 4 * QUARTER, O)


@gluon.jit(do_not_specialize_on_alignment=["pages_ptr", "starts_ptr", "firsts_ptr", "tile_row_ptr", "tile_start_ptr"])
def _prefill_kernel(
    latent_desc,
    rope_desc,
    q_desc,
    q_ptr,
    pages_ptr,
    scratch_ptr,
    out_ptr,
    starts_ptr,
    firsts_ptr,
    tile_row_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    max_pages,
    scale_log2,
    Q_STRIDE: gl.constexpr,
    NOPE: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_H: gl.constexpr,
    PER_TILE: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
):
    TILE: gl.constexpr = latent_desc.block_type.shape[0]
    QUARTER: gl.constexpr = latent_desc.block_type.shape[1]
    ROPE: gl.constexpr = rope_desc.block_type.shape[1]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_M, TILE], gl.bfloat16)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, 16], gl.bfloat16)
    Q_ROPE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_M, ROPE], gl.bfloat16)
    REGISTERS: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    shared = _Shared(
        q_latent=gl.allocate_shared_memory(gl.bfloat16, [4, _M, QUARTER], q_desc.layout),
        q_rope=gl.allocate_shared_memory(gl.bfloat16, [_M, ROPE], Q_ROPE),
        k_latent=gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, TILE, QUARTER], latent_desc.layout),
        k_rope=gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, ROPE], rope_desc.layout),
        weights=gl.allocate_shared_memory(gl.bfloat16, [2, _M, TILE], WEIGHTS),
        ones=gl.allocate_shared_memory(gl.bfloat16, [TILE, 16], ONES),
        factors=gl.allocate_shared_memory(gl.float32, [2, _M], ROWS),
        merging=gl.allocate_shared_memory(gl.float32, [3, _M], ROWS),
        q_bars=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        filled=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        free=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        weighed=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        weights_free=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        merge_bars=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
    )
    for i in gl.static_range(2):
        mbarrier.init(shared.q_bars.index(i), count=1)
        mbarrier.init(shared.merge_bars.index(i), count=1)
        mbarrier.init(shared.weighed.index(i), count=1)
        mbarrier.init(shared.weights_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.filled.index(i), count=1)
        mbarrier.init(shared.free.index(i), count=2)  # by both warpgroups
    shared.ones.store(gl.full([TILE, 16], 1.0, gl.bfloat16, REGISTERS))
    fence_async_shared()
    program = gl.program_id(0) * gl.num_programs(1) + gl.program_id(1)
    merged_ptr = scratch_ptr + program.to(gl.int64) * (_M * 4 * QUARTER)
    cut = (starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, num_tiles_ptr)
    gl.warp_specialize(
        [
            (
                _attend_first,
                (shared, cut, q_ptr, merged_ptr, out_ptr, scale_log2, Q_STRIDE, NOPE, HEADS, BLOCK_H, PER_TILE, STAGES),
            ),
            (_attend_second, (shared, cut, merged_ptr, out_ptr, HEADS, BLOCK_H, PER_TILE, STAGES)),
            (
                _produce,
                (
                    shared,
                    cut,
                    latent_desc,
                    rope_desc,
                    q_desc,
                    pages_ptr,
                    max_pages,
                    HEADS,
                    BLOCK_H,
                    PER_TILE,
                    PAGE,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [216, 24],
    )


def exact_prefill(
    q_latent_THL: torch.Tensor,
    q_THQ: torch.Tensor,
    rows_KC: torch.Tensor,
    pages_RB: torch.Tensor,
    chunks: Chunks,
    page_size: int,
    scale: float,
    out_THL: torch.Tensor,
) -> None:
    """Attended latents of the chunks' queries into `out_THL`."""
    heads, latent = q_latent_THL.shape[1:]
    rope, form = rows_KC.shape[1] - latent, form_of(heads)
    blocks, quarter = heads // form.heads, latent // 4
    programs = max(1, multiprocessors(rows_KC.device) // blocks)
    scratch = torch.empty(programs * blocks * ROWS, latent, dtype=torch.float32, device=rows_KC.device)
    _prefill_kernel[(programs, blocks)](
        _descriptor(rows_KC, TILE, quarter),
        _descriptor(rows_KC, TILE, rope),
        _descriptor(q_latent_THL.flatten(0, 1), ROWS, quarter),
        q_THQ,
        pages_RB,
        scratch,
        out_THL,
        chunks.starts,
        chunks.firsts,
        chunks.tile_row,
        chunks.tile_start,
        chunks.num_tiles,
        pages_RB.stride(0),
        scale * math.log2(math.e),
        Q_STRIDE=q_THQ.stride(0),
        NOPE=q_THQ.shape[2] - rope,
        HEADS=heads,
        BLOCK_H=form.heads,
        PER_TILE=QUERY_TILE,
        PAGE=page_size,
        STAGES=stages_of(rows_KC.shape[1]),
        num_warps=4,
        enable_fp_fusion=False,
    )


def stages_of(width: int) -> int:
    """How many tiles of cache rows of such a width the ring holds."""
    return min(8, (_SHARED_BYTES - _OTHER_BYTES - ROWS * width * 2) // (TILE * width * 2))


def _descriptor(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)
