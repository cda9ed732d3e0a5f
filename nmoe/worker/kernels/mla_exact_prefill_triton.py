"""Absorbed latent attention of the exact class for prefills: a few neighbouring queries read the same tiles.

The arithmetic of a query is mla_exact_triton.py's, whose functions this calls; groups of queries begin at absolute
positions, so that all of a group's queries see the same tiles and spans. First the rows' contexts are gathered from
their pages, then programs take the groups in turn, the last of a row first.

What there is is read on the device, as in mla_prefill_triton.py: a launch for the most that a step can have serves
every smaller one. A row with queries and no context is padding: its output is zero.

Shape suffixes: T tokens, J positions of all contexts in the workspace, R rows of the step, H heads, L latent, P rope
dimensions, Q a query's, C = L + P, K rows of the cache, B pages of a row (padded).
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.worker.chunks import BLOCK, TILE, Chunks
from nmoe.worker.kernels.mla_decode_triton import multiprocessors
from nmoe.worker.kernels.mla_exact_triton import ROWS, attend, empty_span, form_of, merge, span_length

_CUT = ["starts", "firsts", "offsets", "tile_row", "tile_start", "num_tiles", "block_row", "block_start", "num_blocks"]
_POINTERS = [f"{name}_ptr" for name in _CUT]


@triton.jit(do_not_specialize=["max_pages"], do_not_specialize_on_alignment=[*_POINTERS, "pages_ptr"])
def _gather_kernel(
    rows_ptr,
    pages_ptr,
    out_ptr,
    starts_ptr,
    firsts_ptr,
    offsets_ptr,
    block_row_ptr,
    block_start_ptr,
    num_blocks_ptr,
    max_pages,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A block of positions of one row; zeros past its context."""
    block = tl.program_id(0)
    if block < tl.load(num_blocks_ptr):
        row = tl.load(block_row_ptr + block)
        context = tl.load(firsts_ptr + row) + tl.load(starts_ptr + row + 1) - tl.load(starts_ptr + row)
        position = tl.load(block_start_ptr + block) + tl.arange(0, BLOCK_J)
        exists = position < context
        page = tl.load(pages_ptr + row.to(tl.int64) * max_pages + position // PAGE, mask=exists, other=0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        held = rows_ptr + (page * PAGE + position % PAGE)[:, None] * WIDTH + column[None, :]
        place = (tl.load(offsets_ptr + row) + position).to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(out_ptr + place, tl.load(held, mask=exists[:, None], other=0.0))


@triton.jit(do_not_specialize_on_alignment=_POINTERS)
def _groups_kernel(
    q_latent_ptr,
    q_ptr,
    k_latent_desc,
    k_rope_desc,
    scratch_ptr,
    out_ptr,
    starts_ptr,
    firsts_ptr,
    offsets_ptr,
    tile_row_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    scale_log2,
    Q_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    QUERIES: tl.constexpr,
    PER_TILE: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    TILE: tl.constexpr,
    MERGED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Prefill: a group's queries over all their spans; what is merged so far waits in the program's scratch."""
    M: tl.constexpr = QUERIES * BLOCK_H
    lane = tl.arange(0, M)
    head = tl.program_id(1) * BLOCK_H + lane % BLOCK_H
    latent = tl.arange(0, LATENT)
    rope = tl.arange(0, ROPE)
    column = tl.arange(0, MERGED)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    merged_at = scratch_ptr + (2 * program * M + lane).to(tl.int64)[:, None] * LATENT
    span_at = merged_at + M * LATENT
    # A tile of queries that begins between two groups' bounds has parts of one group more.
    GROUPS: tl.constexpr = PER_TILE // QUERIES + 1
    num_tiles = tl.load(num_tiles_ptr)
    for item in range(tl.program_id(0), num_tiles * GROUPS, tl.num_programs(0)):
        tile = num_tiles - 1 - item // GROUPS
        row = tl.load(tile_row_ptr + tile)
        q_first = tl.load(starts_ptr + row)
        q_len = tl.load(starts_ptr + row + 1) - q_first
        k_first = tl.load(offsets_ptr + row)
        is_padding = tl.load(firsts_ptr + row) + q_len == 0
        row_first = tl.maximum(tl.load(firsts_ptr + row), 0)
        tile_first = row_first + tl.load(tile_start_ptr + tile)
        end = tl.minimum(tile_first + PER_TILE, row_first + q_len)
        first = (tile_first // QUERIES + GROUPS - 1 - item % GROUPS) * QUERIES
        last = first + lane // BLOCK_H
        token = q_first + last - row_first
        exists = ((last >= tile_first) & (last < end))[:, None]
        q_at = token.to(tl.int64) * Q_STRIDE + head * (NOPE + ROPE) + NOPE
        rows_at = (token.to(tl.int64) * HEADS + head)[:, None] * LATENT
        q_latent = tl.load(q_latent_ptr + rows_at + latent[None, :], mask=exists, other=0.0)
        q_rope = tl.load(q_ptr + q_at[:, None] + rope[None, :], mask=exists, other=0.0)
        context = tl.where((first < end) & (is_padding == 0), tl.minimum(first + QUERIES, end), 0)
        span = span_length(first + 1)
        peak = tl.full([M], float("-inf"), tl.float32)
        weight = tl.zeros([M], tl.float32)
        for begin in range(0, context, span):
            stop = tl.minimum(begin + span, context)
            span_peak, span_weight, span_acc = empty_span(M, LATENT)
            for position in tl.range(begin, stop, TILE, num_stages=STAGES):
                k_latent = k_latent_desc.load([k_first + position, 0])
                k_rope = k_rope_desc.load([k_first + position, LATENT])
                span_peak, span_weight, span_acc = attend(
                    span_peak,
                    span_weight,
                    span_acc,
                    q_latent,
                    q_rope,
                    k_latent,
                    k_rope,
                    position,
                    last,
                    scale_log2,
                    TILE,
                )
            # Both accs at once would not fit the registers: a few columns at a time.
            tl.store(span_at + latent[None, :], span_acc)
            tl.debug_barrier()
            peak, weight, before, here = merge(peak, weight, span_peak, tl.max(span_weight, 1))
            for start in range(0, LATENT, MERGED):
                old = tl.load(merged_at + start + column[None, :], mask=(lane >= 0)[:, None] & (begin > 0), other=0.0)
                acc = old * before + tl.load(span_at + start + column[None, :]) * here
                if stop < context:
                    tl.store(merged_at + start + column[None, :], acc)
                else:
                    value = (acc / weight[:, None]).to(out_ptr.dtype.element_ty)
                    tl.store(out_ptr + rows_at + start + column[None, :], value, mask=exists)
            tl.debug_barrier()
        if is_padding:
            zeros = tl.zeros([M, LATENT], out_ptr.dtype.element_ty)
            tl.store(out_ptr + rows_at + latent[None, :], zeros, mask=exists)


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
    width, form = rows_KC.shape[1], form_of(heads, page_size)
    context_JC = rows_KC.new_empty(chunks.positions, width)
    columns = math.gcd(width, 64)
    _gather_kernel[(len(chunks.block_row), width // columns)](
        rows_KC,
        pages_RB,
        context_JC,
        chunks.starts,
        chunks.firsts,
        chunks.offsets,
        chunks.block_row,
        chunks.block_start,
        chunks.num_blocks,
        pages_RB.stride(0),
        WIDTH=width,
        COLUMNS=columns,
        PAGE=page_size,
        BLOCK_J=BLOCK,
    )
    blocks = heads // form.heads
    programs = max(1, multiprocessors(rows_KC.device) // blocks)
    scratch = torch.empty(2 * programs * blocks * ROWS, latent, dtype=torch.float32, device=rows_KC.device)
    _groups_kernel[(programs, blocks)](
        q_latent_THL,
        q_THQ,
        TensorDescriptor.from_tensor(context_JC, [form.tile, latent]),
        TensorDescriptor.from_tensor(context_JC, [form.tile, width - latent]),
        scratch,
        out_THL,
        chunks.starts,
        chunks.firsts,
        chunks.offsets,
        chunks.tile_row,
        chunks.tile_start,
        chunks.num_tiles,
        scale * math.log2(math.e),
        Q_STRIDE=q_THQ.stride(0),
        HEADS=heads,
        BLOCK_H=form.heads,
        QUERIES=ROWS // form.heads,
        PER_TILE=TILE,
        NOPE=q_THQ.shape[2] - (width - latent),
        ROPE=width - latent,
        LATENT=latent,
        TILE=form.tile,
        MERGED=min(64, latent),
        STAGES=form.prefill_stages,
        num_warps=8,
        enable_fp_fusion=False,
    )
