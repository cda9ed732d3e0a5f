"""Absorbed latent attention of the exact class for prefills, with specialised warps, in Gluon.

The arithmetic of a query is that of mla_exact_triton.py. A program takes the queries of a few neighbouring positions
(64 rows: heads times queries), starting at a multiple of their number, so that all see the same tiles and spans; how
its warps divide the work is described in mla_warps_gluon.py. After a span each warpgroup merges its half of the values
with those before it, which are kept in the program's scratch: both together would not fit in registers.

A program takes another group of queries whenever it has loaded one, the last group of a row first: its producer draws
from a counter and tells the warpgroups. If they were dealt round-robin, the first programs would get the longest group
of every round: over four prompts of 2,000 tokens, a quarter more than their share.

The amount of work is read on the device, as in mla_prefill_triton.py: a launch sized for the largest possible step
serves every smaller one. A row with queries and no context is padding: its output is zero.

Shape suffixes: T tokens, R rows of the step, H heads, L latent, P rope dimensions, Q a query's, C = L + P, K rows of
the cache, B pages of a row (padded).
"""

import math
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from nmoe.worker.chunks import TILE as QUERY_TILE
from nmoe.worker.chunks import Chunks
from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.hopper_gluon import descriptor
from nmoe.worker.kernels.items_gluon import make_items, tell, told
from nmoe.worker.kernels.mla_exact_triton import MOST_SPANS, SPAN, form_of
from nmoe.worker.kernels.mla_ring_gluon import load_queries, load_tiles
from nmoe.worker.kernels.mla_warps_gluon import (
    ROWS,
    TILE,
    attend_span,
    make_shared,
    rope_descriptor,
    stages_of,
)

_M, _TILE = gl.constexpr(ROWS), gl.constexpr(TILE)
_POINTERS = [f"{name}_ptr" for name in ("starts", "firsts", "tile_row", "tile_start", "num_tiles")]
_SPAN, _MOST_SPANS = gl.constexpr(SPAN), gl.constexpr(MOST_SPANS)


class _Group(NamedTuple):
    """A program's piece of work: the queries of a few neighbouring positions."""

    row: gl.tensor
    token: gl.tensor  # index of the group's first position, which may precede the row's
    first: gl.tensor  # position
    low: gl.tensor  # requested positions are in [low, high)
    high: gl.tensor
    context: gl.tensor  # 0: nothing to attend to
    span: gl.tensor
    is_padding: gl.tensor


@gluon.jit
def _count(cut, QUERIES: gl.constexpr, PER_TILE: gl.constexpr):
    """The number of groups, some of them empty: a tile of queries that starts between two groups' bounds overlaps one
    group more than fits."""
    return gl.load(cut[4]) * (PER_TILE // QUERIES + 1)


@gluon.jit
def _group(item, count, cut, QUERIES: gl.constexpr, PER_TILE: gl.constexpr):
    starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, _ = cut
    GROUPS: gl.constexpr = PER_TILE // QUERIES + 1
    tile = (count - 1 - item) // GROUPS
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
    items,
    cut,
    descs,
    source,
    NOPE: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_H: gl.constexpr,
    PER_TILE: gl.constexpr,
    PAGE: gl.constexpr,
):
    pages_ptr, max_pages, next_ptr = source
    QUERIES: gl.constexpr = _M // BLOCK_H
    count = _count(cut, QUERIES, PER_TILE)
    head = gl.program_id(1) * BLOCK_H
    item = gl.program_id(0)
    nth = 0
    groups = 0
    at = 0
    while item < count:
        tell(items, nth, (item,))
        nth += 1
        group = _group(item, count, cut, QUERIES, PER_TILE)
        item = gl.num_programs(0) + gl.atomic_add(next_ptr + gl.program_id(1), 1, sem="relaxed")
        if group.context > 0:
            where, rope_where = (group.token * HEADS + head, 0), (group.token, head, NOPE)
            load_queries(shared.ring, descs, where, rope_where, groups)
            groups += 1
        row_pages_ptr = pages_ptr + group.row.to(gl.int64) * max_pages
        at = load_tiles(shared.ring, descs, row_pages_ptr, 0, group.context, at, PAGE)
    tell(items, nth, (item,))


@gluon.jit
def _put(value, column, group, out_ptr, HEADS: gl.constexpr, BLOCK_H: gl.constexpr, L: gl.constexpr):
    """Store the result of a group's queries in some columns, starting at `column`."""
    lane = gl.arange(0, _M, gl.SliceLayout(1, value.type.layout))
    columns = column + gl.arange(0, value.shape[1], gl.SliceLayout(0, value.type.layout))
    position = group.first + lane // BLOCK_H
    row = (group.token + lane // BLOCK_H).to(gl.int64) * HEADS + gl.program_id(1) * BLOCK_H + lane % BLOCK_H
    exists = (position >= group.low) & (position < group.high)
    value = value.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + row[:, None] * L + columns[None, :], value, mask=exists[:, None] & (columns >= 0)[None, :])


@gluon.jit
def _merge(
    acc, column, factors, begin, group, merged_ptr, out_ptr, HEADS: gl.constexpr, BLOCK_H: gl.constexpr, L: gl.constexpr
):
    """Merge a span's accumulated values of some columns with those before; after the last span, store the result.
    `factors`: of the values before, of the span's values, and the total weight."""
    before, here, weight = factors
    lane = gl.arange(0, _M, gl.SliceLayout(1, acc.type.layout))[:, None]
    nth = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))[None, :]
    # An 8 x 8 block held by a warp is contiguous in the scratch.
    place = column * _M + nth // 8 * (8 * _M) + lane * 8 + nth % 8
    old = gl.load(merged_ptr + place, mask=(place >= 0) & (begin > 0), other=0.0)
    acc = old * before[:, None] + acc * here[:, None]
    if begin + group.span < group.context:
        gl.store(merged_ptr + place, acc)
    else:
        _put(acc * (1.0 / weight)[:, None], column, group, out_ptr, HEADS, BLOCK_H, L)


@gluon.jit
def _merge_factors(shared, spans, merged, span_peak, span_weight, mine: gl.constexpr, O: gl.constexpr):  # noqa: E741
    """The factors for `_merge` after span number `spans`, which the first warpgroup computes for both; and the peak and
    weight of everything merged so far, which it keeps."""
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
def _attend(
    shared,
    items,
    cut,
    rows,
    scale_log2,
    HEADS: gl.constexpr,
    BLOCK_H: gl.constexpr,
    PER_TILE: gl.constexpr,
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1: weighs every other tile of a span, and adds up half of the columns of all values."""
    merged_ptr, out_ptr = rows
    QUERIES: gl.constexpr = _M // BLOCK_H
    QUARTER: gl.constexpr = shared.ring.k_latent.shape[2]
    L: gl.constexpr = 4 * QUARTER
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 16])  # noqa: E741
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    lane_S = gl.arange(0, _M, gl.SliceLayout(1, S))
    count = _count(cut, QUERIES, PER_TILE)
    nth = 0
    groups = 0
    spans = 0
    at = 0
    turn = 0
    their_turn = 0
    turns = (turn, their_turn)
    item = told(items, nth)[0]
    while item < count:
        group = _group(item, count, cut, QUERIES, PER_TILE)
        if group.context > 0:
            mbarrier.wait(shared.ring.q_bars.index(0), groups & 1)
        last = group.first + lane_S // BLOCK_H
        no_weight = gl.zeros([_M], gl.float32, gl.SliceLayout(1, S))
        merged = (no_weight + float("-inf"), no_weight)
        for begin in range(0, group.context, group.span):
            tiles = (gl.minimum(group.span, group.context - begin) + _TILE - 1) // _TILE
            span_peak, span_weight, acc_0, acc_1, turns = attend_span(
                shared, at, begin, tiles, last, turns, scale_log2, mine
            )
            at += tiles
            mbarrier.arrive(shared.ring.q_bars.index(1), count=1, pred=begin + group.span >= group.context)
            factors, merged = _merge_factors(shared, spans, merged, span_peak, span_weight, mine, O)
            spans += 1
            column = 2 * mine * QUARTER
            _merge(acc_0, column, factors, begin, group, merged_ptr, out_ptr, HEADS, BLOCK_H, L)
            column += QUARTER
            _merge(acc_1, column, factors, begin, group, merged_ptr, out_ptr, HEADS, BLOCK_H, L)
        groups += (group.context > 0).to(gl.int32)
        if group.is_padding:
            nothing = gl.zeros([_M, 2 * QUARTER], gl.float32, O)
            _put(nothing, 2 * mine * QUARTER, group, out_ptr, HEADS, BLOCK_H, L)
        nth += 1
        item = told(items, nth)[0]


@gluon.jit(do_not_specialize=["max_pages"], do_not_specialize_on_alignment=[*_POINTERS, "pages_ptr"])
def _prefill_kernel(
    latent_desc,
    rope_desc,
    q_desc,
    q_rope_desc,
    pages_ptr,
    scratch_ptr,
    next_ptr,
    out_ptr,
    starts_ptr,
    firsts_ptr,
    tile_row_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    max_pages,
    scale_log2,
    NOPE: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_H: gl.constexpr,
    PER_TILE: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
):
    items = make_items(2)
    descs = (latent_desc, rope_desc, q_desc, q_rope_desc)
    shared = make_shared(descs, STAGES)
    QUARTER: gl.constexpr = latent_desc.block_type.shape[1]
    program = gl.program_id(0) * gl.num_programs(1) + gl.program_id(1)
    merged_ptr = scratch_ptr + program.to(gl.int64) * (_M * 4 * QUARTER)
    cut = (starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, num_tiles_ptr)
    rows = (merged_ptr, out_ptr)
    source = (pages_ptr, max_pages, next_ptr)
    gl.warp_specialize(
        [
            (_attend, (shared, items, cut, rows, scale_log2, HEADS, BLOCK_H, PER_TILE, 0)),
            (_attend, (shared, items, cut, rows, scale_log2, HEADS, BLOCK_H, PER_TILE, 1)),
            (_produce, (shared, items, cut, descs, source, NOPE, HEADS, BLOCK_H, PER_TILE, PAGE)),
        ],
        [4, 1],
        [232, 24],
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
        descriptor(rows_KC, TILE, quarter),
        descriptor(rows_KC, TILE, rope),
        descriptor(q_latent_THL.flatten(0, 1), ROWS, quarter),
        rope_descriptor(q_THQ, form.heads, rope),
        pages_RB,
        scratch,
        torch.zeros(blocks, dtype=torch.int32, device=rows_KC.device),
        out_THL,
        chunks.starts,
        chunks.firsts,
        chunks.tile_row,
        chunks.tile_start,
        chunks.num_tiles,
        pages_RB.stride(0),
        scale * math.log2(math.e),
        NOPE=q_THQ.shape[2] - rope,
        HEADS=heads,
        BLOCK_H=form.heads,
        PER_TILE=QUERY_TILE,
        PAGE=page_size,
        STAGES=stages_of(rows_KC.shape[1]),
        num_warps=4,
        enable_fp_fusion=False,
    )
