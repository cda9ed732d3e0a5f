"""Absorbed latent attention of one query per row over pages, for 16 heads, in Gluon; memory-bound.

    producer, one warp   loads tiles of positions from the pages into a ring, and the queries of two pieces of rows;
                         tells the warpgroup which pieces these are
    one warpgroup        processes the tiles, in position order

Two programs share a multiprocessor. The ring carries over from row to row: a row's queries and first tiles are there
when the row before ends. The first tiles of all are loading before the previous kernel has finished: only the step's
newest positions are written by that kernel, so earlier ones may be read.

mla_decode_triton.py describes how the rows' contexts are cut into equal parts. Shape suffixes as there; layout M of the
tensor cores' products, heads times anything.
"""

import math
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.hopper_gluon import descriptor, wait_for_kernel_before
from nmoe.worker.kernels.items_gluon import Items, make_items, tell, told
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.mla_parts_gluon import part_of, piece_of
from nmoe.worker.kernels.mla_ring_gluon import Ring, load_old_tiles, load_queries, load_tiles, make_ring, rope_queries
from nmoe.worker.kernels.mla_tiles_triton import block_of_rows
from nmoe.worker.kernels.mla_values_gluon import Parts
from nmoe.worker.kernels.mla_warps_gluon import TILE

HEADS = 16
_HEADS, _TILE, _STAGES = gl.constexpr(HEADS), gl.constexpr(TILE), gl.constexpr(2)
_PROGRAMS = 2  # per multiprocessor
_REGISTERS = 128  # per thread when the program starts, all 256 of them; the warpgroup takes most of the others'


class _Shared(NamedTuple):
    """Shared memory."""

    pieces: Items  # of rows: slot in the workspace, first position, and the one after the last; empty at the end
    ring: Ring


@gluon.jit
def _make_shared(descs):
    shared = _Shared(pieces=make_items(1, 3), ring=make_ring(descs, _STAGES, 1, 2, 1))
    fence_async_shared()
    return shared


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
):
    contexts_ptr, prefix_ptr, num_rows = plan
    L: gl.constexpr = 4 * shared.ring.k_latent.shape[2]
    at, stop, row = part_of(prefix_ptr, num_rows, BLOCK_R, 1)
    slot = row + gl.program_id(0)
    pieces = 0
    tiles = 0
    loaded = 0
    if at < stop:
        begin, end, _ = piece_of(contexts_ptr, prefix_ptr, row, at, stop, PAGE)
        tell(shared.pieces, pieces, (slot, begin, end))
        row_pages_ptr = pages_ptr + row.to(gl.int64) * max_pages
        context = gl.load(contexts_ptr + row)
        tiles = load_old_tiles(shared.ring, descs, row_pages_ptr, context, begin, end, _STAGES, PAGE)
        loaded = tiles * _TILE
    wait_for_kernel_before()
    while at < stop:
        begin, end, at = piece_of(contexts_ptr, prefix_ptr, row, at, stop, PAGE)
        if pieces > 0:
            tell(shared.pieces, pieces, (slot, begin, end))
        load_queries(shared.ring, descs, (0, row * L), (row, 0, NOPE), pieces)
        row_pages_ptr = pages_ptr + row.to(gl.int64) * max_pages
        tiles = load_tiles(shared.ring, descs, row_pages_ptr, begin + loaded, end, tiles, PAGE)
        loaded = 0
        pieces += 1
        row += 1
        slot += 1
    tell(shared.pieces, pieces, (0, 0, 0))


@gluon.jit
def _scores(shared, place, stage, M: gl.constexpr):
    """The queries in this place of two times the keys of a tile, [H, tile]."""
    A: gl.constexpr = gl.DotOperandLayout(0, M, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, M, 2)
    q_rope = rope_queries(shared.ring, place).load(A)
    # Two accumulators, because a product waits for the previous one in the same accumulator.
    zeros = gl.zeros([_HEADS, _TILE], gl.float32, M)
    even = mma_v2(q_rope, shared.ring.k_rope.index(stage).permute((1, 0)).load(B), zeros)
    odd = zeros
    for i in gl.static_range(0, 4, 2):
        q = shared.ring.q_latent.index(place * 4 + i).load(A)
        even = mma_v2(q, shared.ring.k_latent.index(stage * 4 + i).permute((1, 0)).load(B), even)
        q = shared.ring.q_latent.index(place * 4 + i + 1).load(A)
        odd = mma_v2(q, shared.ring.k_latent.index(stage * 4 + i + 1).permute((1, 0)).load(B), odd)
    return even + odd


@gluon.jit
def _attend(shared, parts, scale_log2, KEPT: gl.constexpr):
    partial_ptr, lse_ptr = parts
    QUARTER: gl.constexpr = shared.ring.k_latent.shape[2]
    M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, M, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, M, 2)
    head = gl.arange(0, _HEADS, gl.SliceLayout(1, M))
    key = gl.arange(0, _TILE, gl.SliceLayout(0, M))
    column = gl.arange(0, QUARTER, gl.SliceLayout(0, M))
    pieces = 0
    tiles = 0
    slot, begin, end = told(shared.pieces, pieces)
    while begin < end:
        place = pieces & 1
        peak = gl.full([_HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, M))
        weight = gl.zeros([_HEADS], gl.float32, gl.SliceLayout(1, M))
        acc_0 = gl.zeros([_HEADS, QUARTER], gl.float32, M)
        acc_1 = gl.zeros([_HEADS, QUARTER], gl.float32, M)
        acc_2 = gl.zeros([_HEADS, QUARTER], gl.float32, M)
        acc_3 = gl.zeros([_HEADS, QUARTER], gl.float32, M)
        mbarrier.wait(shared.ring.q_bars.index(place), pieces >> 1 & 1)
        for position in range(begin, end, _TILE):
            stage = tiles % _STAGES
            mbarrier.wait(shared.ring.filled.index(stage), tiles // _STAGES & 1)
            s = _scores(shared, place, stage, M)
            s = gl.where((position + key < end)[None, :], s * scale_log2, float("-inf"))
            new_peak = gl.maximum(peak, gl.max(s, 1))
            factor = gl.exp2(peak - new_peak)
            p = gl.exp2(s - new_peak[:, None])
            weight = weight * factor + gl.sum(p, 1)
            peak = new_peak
            p = gl.convert_layout(p.to(gl.bfloat16), A)
            v = shared.ring.k_latent
            acc_0 = mma_v2(p, v.index(stage * 4).load(B), acc_0 * factor[:, None])
            acc_1 = mma_v2(p, v.index(stage * 4 + 1).load(B), acc_1 * factor[:, None])
            acc_2 = mma_v2(p, v.index(stage * 4 + 2).load(B), acc_2 * factor[:, None])
            acc_3 = mma_v2(p, v.index(stage * 4 + 3).load(B), acc_3 * factor[:, None])
            mbarrier.arrive(shared.ring.free.index(stage), count=1)
            tiles += 1
        mbarrier.arrive(shared.ring.q_bars.index(2 + place), count=1)
        at = slot.to(gl.int64) * _HEADS + head
        gl.store(lse_ptr + at, peak + gl.log2(weight))
        out = partial_ptr + at[:, None] * (4 * QUARTER) + column[None, :]
        inverse = (1.0 / weight)[:, None]
        for i in gl.static_range(4):
            quarter = ((acc_0, acc_1, acc_2, acc_3)[i] * inverse).to(partial_ptr.dtype.element_ty)
            gl.store(out + i * QUARTER, quarter, eviction_policy=KEPT)
        pieces += 1
        slot, begin, end = told(shared.pieces, pieces)


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
    num_rows,
    max_pages,
    scale_log2,
    NOPE: gl.constexpr,
    BLOCK_R: gl.constexpr,
    PAGE: gl.constexpr,
    KEPT: gl.constexpr,
):
    descs = (latent_desc, rope_desc, q_desc, q_rope_desc)
    shared = _make_shared(descs)
    plan = (contexts_ptr, prefix_ptr, num_rows)
    gl.warp_specialize(
        [
            (_attend, (shared, (partial_ptr, lse_ptr), scale_log2, KEPT)),
            (_produce, (shared, plan, descs, pages_ptr, max_pages, NOPE, BLOCK_R, PAGE)),
        ],
        [1],
        [40],
    )


def num_parts(multiprocessors: int, heads: int) -> int:
    """The number of parts that the contexts are cut into."""
    return _PROGRAMS * multiprocessors


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
    """The rows' attended latents into `parts`, everything but its prefix and `whole_HRL`. H is 16. Every row must have
    a context of at least one position: the warps would wait forever for an empty tile."""
    heads, rows, latent = q_latent_HRL.shape
    rope, quarter = rows_KC.shape[1] - latent, latent // 4
    _decode_kernel[(parts.num_parts,)](
        descriptor(q_latent_HRL.view(heads, rows * latent), heads, quarter),
        descriptor(rows_KC, TILE, quarter),
        descriptor(rows_KC, TILE, rope),
        descriptor(q_RHQ, 1, heads, rope),
        pages_RB,
        contexts_R,
        parts.prefix,
        parts.partial,
        parts.lse,
        rows,
        pages_RB.stride(0),
        scale * math.log2(math.e),
        NOPE=q_RHQ.shape[2] - rope,
        BLOCK_R=block_of_rows(rows),
        PAGE=page_size,
        KEPT=kept(rows),
        num_warps=4,
        maxnreg=_REGISTERS,
        launch_pdl=early(rows),
    )
