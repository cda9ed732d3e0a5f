"""What the warps of an exact prefill (mla_exact_prefill_gluon.py) do: their roles, and how they hand over.

    producer, one warp   queries, and tiles of positions from the pages into a ring
    two warpgroups       the tiles of a span in turns: while one finds a tile's weights from its scores, the other has
                         the matrix unit; each adds up half of the columns of the values of all tiles

Tile by tile in the order of the positions: its weights follow from the largest score so far, which comes from the
warpgroup that had the tile before, with that tile's weights, through shared memory. A tile stays in the ring until both
halves of its values are added. After a span each warpgroup merges its half with those before it, which wait in the
program's scratch: both at once would not fit the registers.

Shape suffixes: layouts S of scores, O of values (rows over the lanes alike), W of the sums of weights.
"""

from typing import NamedTuple

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

from nmoe.worker.kernels.mla_exact_triton import MOST_SPANS, ROWS, SPAN, TILE

_SPAN, _MOST_SPANS = gl.constexpr(SPAN), gl.constexpr(MOST_SPANS)
_M, _TILE = gl.constexpr(ROWS), gl.constexpr(TILE)


class Shared(NamedTuple):
    """Shared memory. Latents lie in quarters of their columns."""

    q_latent: gl.shared_memory_descriptor  # [4, M, L / 4]
    q_rope: gl.shared_memory_descriptor  # [M, P]
    k_latent: gl.shared_memory_descriptor  # [stages * 4, tile, L / 4]
    k_rope: gl.shared_memory_descriptor  # [stages, tile, P]
    weights: gl.shared_memory_descriptor  # [2, M, tile]: of the positions of a tile
    ones: gl.shared_memory_descriptor  # [tile, 8]
    factors: gl.shared_memory_descriptor  # [2, M]: what the values so far are multiplied by before a tile's are added
    peaks: gl.shared_memory_descriptor  # [2, M]: the largest scaled score of a span up to a tile
    merging: gl.shared_memory_descriptor  # [3, M]: factors of the values before a span and of its own, weight of all
    # Barriers
    q_bars: gl.shared_memory_descriptor  # [3]: latents are there; both are free; ropes are there
    filled: gl.shared_memory_descriptor  # [stages]
    free: gl.shared_memory_descriptor  # [stages]
    weighed: gl.shared_memory_descriptor  # [2]
    weights_free: gl.shared_memory_descriptor  # [2]
    merge_bars: gl.shared_memory_descriptor  # [2]: there, free


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
def _group(item, cut, num_tiles, QUERIES: gl.constexpr, PER_TILE: gl.constexpr):
    starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, _ = cut
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
def produce(
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
    """Brings queries and tiles, one warp."""
    QUERIES: gl.constexpr = _M // BLOCK_H
    QUARTER: gl.constexpr = shared.k_latent.shape[2]
    ROPE: gl.constexpr = shared.k_rope.shape[2]
    num_tiles = gl.load(cut[4])
    groups = 0
    at = 0
    for item in range(gl.program_id(0), num_tiles * (PER_TILE // QUERIES + 1), gl.num_programs(0)):
        group = _group(item, cut, num_tiles, QUERIES, PER_TILE)
        if group.context > 0:
            mbarrier.wait(shared.q_bars.index(1), (groups & 1) ^ 1)
            mbarrier.expect(shared.q_bars.index(0), _M * 4 * QUARTER * 2)
            q_row = group.token * HEADS + gl.program_id(1) * BLOCK_H
            for i in gl.static_range(4):
                to = shared.q_latent.index(i)
                tma.async_copy_global_to_shared(q_desc, [q_row, i * QUARTER], shared.q_bars.index(0), to)
            groups += 1
        for position in range(0, group.context, _TILE):
            stage = at % STAGES
            page = gl.load(pages_ptr + group.row.to(gl.int64) * max_pages + position // PAGE)
            k_row = page.to(gl.int32) * PAGE + position % PAGE
            mbarrier.wait(shared.free.index(stage), (at // STAGES & 1) ^ 1)
            filled = shared.filled.index(stage)
            mbarrier.expect(filled, _TILE * (4 * QUARTER + ROPE) * 2)
            for i in gl.static_range(4):
                to = shared.k_latent.index(stage * 4 + i)
                tma.async_copy_global_to_shared(latent_desc, [k_row, i * QUARTER], filled, to)
            tma.async_copy_global_to_shared(rope_desc, [k_row, 4 * QUARTER], filled, shared.k_rope.index(stage))
            at += 1


@gluon.jit
def _scores(shared, at, STAGES: gl.constexpr):
    """The queries times the keys of the ring's tile number `at`, [M, tile], begun."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    stage = at % STAGES
    mbarrier.wait(shared.filled.index(stage), at // STAGES & 1)
    s = warpgroup_mma_init(gl.zeros([_M, _TILE], gl.float32, S))
    for i in gl.static_range(4):
        keys = shared.k_latent.index(stage * 4 + i).permute((1, 0))
        s = warpgroup_mma(shared.q_latent.index(i), keys, s, use_acc=i > 0, is_async=True)
    return warpgroup_mma(shared.q_rope, shared.k_rope.index(stage).permute((1, 0)), s, is_async=True)


@gluon.jit
def _weigh(shared, turn, s, position, last, peak, scale_log2, mine: gl.constexpr):
    """The weights of a tile's positions from its scores, with the new peak and the factor of what was added before,
    where both warpgroups find them. `turn`: how many tiles this warpgroup has weighed."""
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
    """The values of the ring's tile number `at` times the weights that warpgroup `whose` has found, in this one's half
    of the columns, added to what was there times the tile's factor: begun. The first warpgroup adds the weights too."""
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
    """A tile that the other warpgroup has weighed, added; then both its weights and its place are free for this one."""
    adding = _add(shared, at, 1 - mine, mine, span_sum, acc_0, acc_1, factor, STAGES)
    span_sum, acc_0, acc_1 = warpgroup_mma_wait(0, deps=adding)
    mbarrier.arrive(shared.weights_free.index(1 - mine), count=1)
    mbarrier.arrive(shared.free.index(at % STAGES), count=1)
    return span_sum, acc_0, acc_1


@gluon.jit
def _add_own(shared, at, has_next, s, factor, mine: gl.constexpr, span_sum, acc_0, acc_1, STAGES: gl.constexpr):
    """A tile that this warpgroup has weighed, added, and the scores of its next one, if the span has one."""
    # Nothing but products may touch their sums while any is under way: so each branch waits for its own.
    if has_next:
        adding, adding_0, adding_1 = _add(shared, at, mine, mine, span_sum, acc_0, acc_1, factor, STAGES)
        scoring = _scores(shared, at + 2, STAGES)
        s, span_sum, acc_0, acc_1 = warpgroup_mma_wait(0, deps=[scoring, adding, adding_0, adding_1])
    else:
        adding, adding_0, adding_1 = _add(shared, at, mine, mine, span_sum, acc_0, acc_1, factor, STAGES)
        span_sum, acc_0, acc_1 = warpgroup_mma_wait(0, deps=[adding, adding_0, adding_1])
    mbarrier.arrive(shared.free.index(at % STAGES), count=1)
    return s, span_sum, acc_0, acc_1


@gluon.jit
def _load_ropes(shared, q_ptr, group, head, Q_STRIDE: gl.constexpr, NOPE: gl.constexpr, BLOCK_H: gl.constexpr):
    """The roped part of a group's queries, into shared memory."""
    ROPE: gl.constexpr = shared.k_rope.shape[2]
    LOADS: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // ROPE, ROPE // 8], [4, 1], [1, 0])
    lane = gl.arange(0, _M, gl.SliceLayout(1, LOADS))
    rope = gl.arange(0, ROPE, gl.SliceLayout(0, LOADS))
    position = group.first + lane // BLOCK_H
    place = (group.token + lane // BLOCK_H).to(gl.int64) * Q_STRIDE + (head + lane % BLOCK_H) * (NOPE + ROPE) + NOPE
    exists = (position >= group.low) & (position < group.high)
    q_rope = gl.load(q_ptr + place[:, None] + rope[None, :], mask=exists[:, None] & (rope >= 0)[None, :], other=0.0)
    shared.q_rope.store(q_rope)
    fence_async_shared()
    mbarrier.arrive(shared.q_bars.index(2), count=1)


@gluon.jit
def _merge(acc, column, factors, begin, group, lane, position, rows, merged_ptr, out_ptr, L: gl.constexpr):
    """A span's accumulated values of some columns, added to those before; those of the last span are the result.
    `factors`: of those before, of the span's, and the weight of all."""
    before, here, weight = factors
    columns = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))[None, :]
    place = lane[:, None] * L + columns
    old = gl.load(merged_ptr + place, mask=(place >= 0) & (begin > 0), other=0.0)
    acc = old * before[:, None] + acc * here[:, None]
    if begin + group.span < group.context:
        gl.store(merged_ptr + place, acc)
    else:
        exists = (position >= group.low) & (position < group.high)
        value = (acc * (1.0 / weight)[:, None]).to(out_ptr.dtype.element_ty)
        gl.store(out_ptr + rows[:, None] * L + columns, value, mask=exists[:, None] & (columns >= 0))


@gluon.jit
def _zero(out_ptr, out_rows, position_of_lane, group, column, COLUMNS: gl.constexpr, L: gl.constexpr, O: gl.constexpr):  # noqa: E741
    """The result of a group's queries in some columns, if they are padding."""
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, O))[None, :]
    exists = (position_of_lane >= group.low) & (position_of_lane < group.high)
    zeros = gl.zeros([_M, COLUMNS], out_ptr.dtype.element_ty, O)
    gl.store(out_ptr + out_rows[:, None] * L + columns, zeros, mask=exists[:, None] & (columns >= 0))


@gluon.jit
def _attend_span(shared, at, begin, tiles, last, turns, scale_log2, mine: gl.constexpr, STAGES: gl.constexpr):
    """The peak of a span of `tiles` tiles, of which the ring's number `at` is the first; the sum of its weights (of the
    first warpgroup), and this one's half of its values, in two parts. `turns`: how many tiles this warpgroup has
    weighed, and of those that the other one has weighed, added; given and returned."""
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
        # First what the other warpgroup waits for.
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


@gluon.jit
def _merge_factors(shared, spans, merged, span_peak, span_weight, mine: gl.constexpr, O: gl.constexpr):  # noqa: E741
    """What `_merge` multiplies by after span number `spans`, which the first warpgroup finds for both; and the peak and
    weight of all that is merged then, which it keeps."""
    peak, weight = merged
    if mine == 0:
        new_peak = gl.maximum(peak, span_peak)
        before = gl.exp2(peak - new_peak)
        here = gl.exp2(span_peak - new_peak)
        weight = weight * before + gl.convert_layout(gl.max(span_weight, 1), peak.type.layout) * here
        peak = new_peak
        mbarrier.wait(shared.merge_bars.index(1), (spans & 1) ^ 1)
        shared.merging.index(0).store(before)
        shared.merging.index(1).store(here)
        shared.merging.index(2).store(weight)
        mbarrier.arrive(shared.merge_bars.index(0), count=1)
    mbarrier.wait(shared.merge_bars.index(0), spans & 1)
    factors = (
        shared.merging.index(0).load(gl.SliceLayout(1, O)),
        shared.merging.index(1).load(gl.SliceLayout(1, O)),
        shared.merging.index(2).load(gl.SliceLayout(1, O)),
    )
    mbarrier.arrive(shared.merge_bars.index(1), count=1)
    return factors, (peak, weight)


@gluon.jit
def attend(
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
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1: weighs every other tile of a span, and adds up half of the columns of all values."""
    QUERIES: gl.constexpr = _M // BLOCK_H
    QUARTER: gl.constexpr = shared.k_latent.shape[2]
    L: gl.constexpr = 4 * QUARTER
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 16])  # noqa: E741
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    lane_S = gl.arange(0, _M, gl.SliceLayout(1, S))
    lane_O = gl.arange(0, _M, gl.SliceLayout(1, O))
    head = gl.program_id(1) * BLOCK_H
    num_tiles = gl.load(cut[4])
    groups = 0
    spans = 0
    at = 0
    turns = (groups, spans)
    for item in range(gl.program_id(0), num_tiles * (PER_TILE // QUERIES + 1), gl.num_programs(0)):
        group = _group(item, cut, num_tiles, QUERIES, PER_TILE)
        position_O = group.first + lane_O // BLOCK_H
        rows_O = (group.token + lane_O // BLOCK_H).to(gl.int64) * HEADS + head + lane_O % BLOCK_H
        if group.context > 0:
            if mine == 0:
                mbarrier.wait(shared.q_bars.index(1), (groups & 1) ^ 1)
                _load_ropes(shared, q_ptr, group, head, Q_STRIDE, NOPE, BLOCK_H)
            mbarrier.wait(shared.q_bars.index(0), groups & 1)
            mbarrier.wait(shared.q_bars.index(2), groups & 1)
        last = group.first + lane_S // BLOCK_H
        nothing = gl.zeros([_M], gl.float32, gl.SliceLayout(1, S))
        merged = (nothing + float("-inf"), nothing)
        for begin in range(0, group.context, group.span):
            tiles = (gl.minimum(group.span, group.context - begin) + _TILE - 1) // _TILE
            span_peak, span_weight, acc_0, acc_1, turns = _attend_span(
                shared, at, begin, tiles, last, turns, scale_log2, mine, STAGES
            )
            at += tiles
            mbarrier.arrive(shared.q_bars.index(1), count=1, pred=begin + group.span >= group.context)
            factors, merged = _merge_factors(shared, spans, merged, span_peak, span_weight, mine, O)
            spans += 1
            column = 2 * mine * QUARTER
            _merge(acc_0, column, factors, begin, group, lane_O, position_O, rows_O, merged_ptr, out_ptr, L)
            column += QUARTER
            _merge(acc_1, column, factors, begin, group, lane_O, position_O, rows_O, merged_ptr, out_ptr, L)
        groups += (group.context > 0).to(gl.int32)
        if group.is_padding:
            _zero(out_ptr, rows_O, position_O, group, 2 * mine * QUARTER, 2 * QUARTER, L, O)
