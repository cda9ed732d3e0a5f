"""Absorbed latent attention of one query per row over pages, for many heads, with specialised warps, in Gluon.

With 64 heads per program the tensor cores are the bound, not memory, so the work is divided as in mla_warps_gluon.py.
mla_decode_triton.py describes how the rows' contexts are cut into equal parts; a row within one part is finished here.

Shape suffixes: R rows, H heads, L latent, P rope dimensions, C = L + P, K rows of the cache, B pages of a row (padded).
"""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.hopper_gluon import wait_for_kernel_before
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.mla_tiles_triton import block_of_rows
from nmoe.worker.kernels.mla_values_gluon import Parts
from nmoe.worker.kernels.mla_warps_gluon import (
    ROWS,
    TILE,
    attend_span,
    descriptor,
    load_queries,
    load_ropes,
    load_tiles,
    make_shared,
    rope_descriptor,
    stages_of,
)

_M, _TILE = gl.constexpr(ROWS), gl.constexpr(TILE)


@gluon.jit
def part_of(prefix_ptr, num_rows, BLOCK_R: gl.constexpr, WARPS: gl.constexpr):
    """The program's part [at, stop) of all rows' concatenated pages, and the row in which it starts."""
    total = gl.load(prefix_ptr + num_rows)
    pages = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
    at = gl.program_id(0) * pages
    index = gl.arange(0, BLOCK_R, gl.BlockedLayout([1], [32], [WARPS], [0]))
    ends = gl.load(prefix_ptr + 1 + index, mask=index < num_rows, other=2147483647)
    return at, gl.minimum(at + pages, total), gl.sum((ends <= at).to(gl.int32), 0)


@gluon.jit
def piece_of(contexts_ptr, prefix_ptr, row, at, stop, PAGE: gl.constexpr):
    """The positions [begin, end) of a row that start at page `at` of all rows' pages and precede page `stop`; and the
    page after them."""
    first = gl.load(prefix_ptr + row)
    last = gl.minimum(gl.load(prefix_ptr + row + 1), stop)
    return (at - first) * PAGE, gl.minimum((last - first) * PAGE, gl.load(contexts_ptr + row)), last


@gluon.jit
def _produce(
    shared,
    plan,
    descs,
    pages_ptr,
    max_pages,
    NOPE: gl.constexpr,
    BLOCK_R: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
):
    contexts_ptr, prefix_ptr, num_rows = plan
    latent_desc, rope_desc, q_desc, q_rope_desc = descs
    L: gl.constexpr = 4 * shared.k_latent.shape[2]
    at, stop, row = part_of(prefix_ptr, num_rows, BLOCK_R, 1)
    pieces = 0
    tiles = 0
    while at < stop:
        begin, end, at = piece_of(contexts_ptr, prefix_ptr, row, at, stop, PAGE)
        load_queries(shared, q_desc, gl.program_id(1) * _M, row * L, pieces)
        load_ropes(shared, q_rope_desc, row, gl.program_id(1) * _M, NOPE)
        row_pages_ptr = pages_ptr + row.to(gl.int64) * max_pages
        tiles = load_tiles(shared, latent_desc, rope_desc, row_pages_ptr, begin, end, tiles, PAGE, STAGES)
        pieces += 1
        row += 1


@gluon.jit
def _attend(
    shared,
    plan,
    rows,
    scale_log2,
    HEADS: gl.constexpr,
    BLOCK_R: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1."""
    contexts_ptr, prefix_ptr, num_rows = plan
    partial_ptr, lse_ptr, out_ptr = rows
    QUARTER: gl.constexpr = shared.k_latent.shape[2]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 16])  # noqa: E741
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    head = gl.program_id(1) * _M
    lane_S = gl.arange(0, _M, gl.SliceLayout(1, S))
    lane_O = gl.arange(0, _M, gl.SliceLayout(1, O))
    column = 2 * mine * QUARTER + gl.arange(0, QUARTER, gl.SliceLayout(0, O))[None, :]
    at, stop, row = part_of(prefix_ptr, num_rows, BLOCK_R, 4)
    pieces = 0
    tiles = 0
    turn = 0
    their_turn = 0
    turns = (turn, their_turn)
    while at < stop:
        begin, end, at = piece_of(contexts_ptr, prefix_ptr, row, at, stop, PAGE)
        whole = (begin == 0) & (at == gl.load(prefix_ptr + row + 1))
        mbarrier.wait(shared.q_bars.index(0), pieces & 1)
        count = (end - begin + _TILE - 1) // _TILE
        last = lane_S * 0 + end - 1
        peak, weights, acc_0, acc_1, turns = attend_span(
            shared, tiles, begin, count, last, turns, scale_log2, mine, STAGES
        )
        tiles += count
        mbarrier.arrive(shared.q_bars.index(1), count=1)
        slot = (row + gl.program_id(0)).to(gl.int64) * HEADS + head
        if mine == 0:
            weight = gl.convert_layout(gl.max(weights, 1), gl.SliceLayout(1, S))
            gl.store(lse_ptr + slot + lane_S, peak + gl.log2(weight))
            mbarrier.wait(shared.merge_bars.index(1), (pieces & 1) ^ 1)
            shared.merging.index(2).store(1.0 / weight)
            mbarrier.arrive(shared.merge_bars.index(0), count=1)
        mbarrier.wait(shared.merge_bars.index(0), pieces & 1)
        factor = shared.merging.index(2).load(gl.SliceLayout(1, O))[:, None]
        mbarrier.arrive(shared.merge_bars.index(1), count=1)
        if whole:
            place = ((head + lane_O).to(gl.int64) * num_rows + row)[:, None] * (4 * QUARTER) + column
            gl.store(out_ptr + place, (acc_0 * factor).to(out_ptr.dtype.element_ty), eviction_policy=KEPT)
            gl.store(out_ptr + place + QUARTER, (acc_1 * factor).to(out_ptr.dtype.element_ty), eviction_policy=KEPT)
        else:
            place = (slot + lane_O)[:, None] * (4 * QUARTER) + column
            gl.store(partial_ptr + place, acc_0 * factor, eviction_policy=KEPT)
            gl.store(partial_ptr + place + QUARTER, acc_1 * factor, eviction_policy=KEPT)
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
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
):
    shared = make_shared(q_desc, q_rope_desc, latent_desc, rope_desc, STAGES)
    plan = (contexts_ptr, prefix_ptr, num_rows)
    rows = (partial_ptr, lse_ptr, out_ptr)
    descs = (latent_desc, rope_desc, q_desc, q_rope_desc)
    wait_for_kernel_before()
    gl.warp_specialize(
        [
            (_attend, (shared, plan, rows, scale_log2, HEADS, BLOCK_R, PAGE, STAGES, KEPT, 0)),
            (_attend, (shared, plan, rows, scale_log2, HEADS, BLOCK_R, PAGE, STAGES, KEPT, 1)),
            (_produce, (shared, plan, descs, pages_ptr, max_pages, NOPE, BLOCK_R, PAGE, STAGES)),
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
    """The rows' attended latents into `parts`, everything but its prefix. H is a multiple of 64. Every row must have a
    context of at least one position: the warps would wait forever for an empty tile."""
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
        STAGES=stages_of(rows_KC.shape[1]),
        KEPT=kept(rows),
        num_warps=4,
        launch_pdl=early(rows),
    )
