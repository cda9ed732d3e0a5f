"""Absorbed latent attention of one query per row over pages, on the GPU; `mla.py`'s `absorbed_decode` is the reference.
The kernel here takes 16 heads, which memory bounds; mla_decode_gluon.py's takes multiples of 64.

The rows' contexts, laid end to end in pages, are cut into as many equal parts as there are programs, wherever a row
ends (so every program reads the same number of pages, whatever the lengths), and a second kernel puts each row's parts
together in their order. Everything is derived on the device from the contexts, so the launch is the same for any
lengths and can be replayed from a graph. The piece of row r in part p has the workspace slot r + p: along the cut, each
piece advances the row, the part or both. A row of 64 heads or more that lies in one part needs no second kernel.

Shape suffixes: R rows, H heads, L latent, P rope dimensions, C = L + P, K rows of the cache, B pages of a row (padded).
"""

import math

import torch
import triton
import triton.language as tl

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.mla_decode_gluon import attend_parts
from nmoe.worker.kernels.mla_tiles_triton import (
    add_tile,
    block_of_rows,
    cache_row,
    contexts_of,
    load_ropes,
    no_tiles,
    row_of,
    store_plan,
)
from nmoe.worker.kernels.mla_warps_gluon import ROWS

_TILE = 32  # positions that a program holds at a time; two programs share a multiprocessor
_STAGES = 5
_FEW_HEADS = 16
_HEADS_TOGETHER = 8  # of a program that combines


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions_ptr"])
def _contexts_kernel(positions_ptr, contexts_ptr, prefix_ptr, num_rows, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """contexts = positions + 1; prefix[r] = pages of all rows before r."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    context = contexts_of(positions_ptr, num_rows, BLOCK)
    store_plan(contexts_ptr, prefix_ptr, context, PAGE, num_rows, BLOCK)


@triton.jit(do_not_specialize=["num_rows", "max_pages"], do_not_specialize_on_alignment=["pages_ptr"])
def _decode_kernel(
    q_latent_ptr,
    q_ptr,
    rows_ptr,
    pages_ptr,
    contexts_ptr,
    prefix_ptr,
    partial_ptr,
    lse_ptr,
    num_rows,
    max_pages,
    scale_log2,
    Q_STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The step's plan is older than the kernel before this one, so it is read before the wait.
    head = tl.arange(0, HEADS)
    latent = tl.arange(0, LATENT)
    rope = tl.arange(0, ROPE)
    token = tl.arange(0, TILE)
    total = tl.load(prefix_ptr + num_rows)
    chunk = tl.cdiv(total, tl.num_programs(0))
    part = tl.program_id(0)
    at = part * chunk
    stop = tl.minimum(at + chunk, total)
    row = row_of(prefix_ptr, at, num_rows, BLOCK_R)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    while at < stop:
        first = tl.load(prefix_ptr + row)
        last = tl.minimum(tl.load(prefix_ptr + row + 1), stop)
        begin = (at - first) * PAGE
        end = tl.minimum((last - first) * PAGE, tl.load(contexts_ptr + row))
        q_latent = tl.load(q_latent_ptr + (head[:, None] * num_rows + row).to(tl.int64) * LATENT + latent[None, :])
        q_rope = load_ropes(q_ptr, row, head, Q_STRIDE, NOPE, ROPE)
        peak, weight, acc = no_tiles(HEADS, LATENT)
        for position in tl.range(begin, end, TILE, num_stages=STAGES):
            base = rows_ptr + cache_row(pages_ptr, row, max_pages, position, PAGE) * (LATENT + ROPE)
            k_latent = tl.load(base + token[:, None] * (LATENT + ROPE) + latent[None, :])
            k_rope = tl.load(base + token[:, None] * (LATENT + ROPE) + LATENT + rope[None, :])
            s = tl.dot(q_latent, tl.trans(k_latent))
            s = tl.dot(q_rope, tl.trans(k_rope), s)
            s = tl.where((position + token < end)[None, :], s * scale_log2, float("-inf"))
            peak, weight, acc = add_tile(peak, weight, acc, s, k_latent)
        slot = (row + part).to(tl.int64) * HEADS + head
        tl.store(lse_ptr + slot, peak + tl.log2(weight))
        tl.store(partial_ptr + slot[:, None] * LATENT + latent[None, :], acc / weight[:, None])
        at = last
        row += 1


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _combine_kernel(
    partial_ptr,
    lse_ptr,
    prefix_ptr,
    out_ptr,
    num_rows,
    num_parts,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    LEAST: tl.constexpr,
):
    """A row in at least `LEAST` parts, so many heads one after the other, some of the latent: `PARTS` at a time."""
    row = tl.program_id(0)
    latent = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.cdiv(tl.load(prefix_ptr + num_rows), num_parts)  # the plan: see above
    first = tl.load(prefix_ptr + row) // chunk
    last = tl.cdiv(tl.load(prefix_ptr + row + 1), chunk)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    if last - first >= LEAST:
        for head in range(tl.program_id(1) * BLOCK_H, tl.program_id(1) * BLOCK_H + BLOCK_H):
            peak = float("-inf")
            weight = 0.0
            acc = tl.zeros([COLUMNS], tl.float32)
            for start in range(first, last, PARTS):
                part = start + tl.arange(0, PARTS)
                there = part < last
                slot = (row + part).to(tl.int64) * HEADS + head
                lse = tl.load(lse_ptr + slot, mask=there, other=float("-inf"))
                values = tl.load(partial_ptr + slot[:, None] * LATENT + latent[None, :], mask=there[:, None], other=0.0)
                new_peak = tl.maximum(peak, tl.max(lse, 0))
                alpha = tl.exp2(peak - new_peak)
                beta = tl.exp2(lse - new_peak)
                acc = acc * alpha + tl.sum(values * beta[:, None], 0)
                weight = weight * alpha + tl.sum(beta, 0)
                peak = new_peak
            out = out_ptr + (head * num_rows + row).to(tl.int64) * LATENT + latent
            tl.store(out, (acc / weight).to(out_ptr.dtype.element_ty))


def page_prefix(positions_R: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From the rows' last positions: their contexts, int32 [R], and the running sum of their pages, int32 [R + 1]."""
    rows = len(positions_R)
    contexts_R = positions_R.new_empty(rows, dtype=torch.int32)
    prefix = positions_R.new_empty(rows + 1, dtype=torch.int32)
    block = block_of_rows(rows)
    _contexts_kernel[(1,)](positions_R, contexts_R, prefix, rows, PAGE=page_size, BLOCK=block, launch_pdl=early(rows))
    return contexts_R, prefix


def absorbed_decode(
    q_latent_HRL: torch.Tensor,
    q_RHQ: torch.Tensor,
    rows_KC: torch.Tensor,
    pages_RB: torch.Tensor,
    contexts_R: torch.Tensor,
    prefix: torch.Tensor,
    page_size: int,
    scale: float,
) -> torch.Tensor:
    """Attended latents [H, R, L] of one query per row; every row has a context of at least one position.

    `q_latent_HRL`: W_UK^T q_nope; the last P dimensions of `q_RHQ` are the roped queries. `pages_RB` int32 or int64.
    `contexts_R` and `prefix` are `page_prefix`'s; they are read before this waits, so some kernel ran in between.
    """
    heads, rows, latent = q_latent_HRL.shape
    few = heads == _FEW_HEADS
    programs = multiprocessors(rows_KC.device)
    parts = 2 * programs if few else max(1, programs * ROWS // heads)
    partial = torch.empty(rows + parts, heads, latent, dtype=torch.float32, device=rows_KC.device)
    lse = torch.empty(rows + parts, heads, dtype=torch.float32, device=rows_KC.device)
    out_HRL = torch.empty_like(q_latent_HRL)
    given = (q_latent_HRL, q_RHQ, rows_KC, pages_RB, contexts_R, prefix, page_size, scale, parts, partial, lse)
    if few:
        _attend_parts(*given)
    else:
        attend_parts(*given, out_HRL)
    # With more rows than parts most rows lie in one, and their programs here find nothing to do: so there are few.
    block = 1 if few or rows < parts else _HEADS_TOGETHER
    at_once = min(64, triton.next_power_of_2(parts // rows + 2))
    columns = min(latent, 8192 // at_once)
    _combine_kernel[(rows, heads // block, latent // columns)](
        partial,
        lse,
        prefix,
        out_HRL,
        rows,
        parts,
        HEADS=heads,
        LATENT=latent,
        PARTS=at_once,
        COLUMNS=columns,
        BLOCK_H=block,
        LEAST=1 if few else 2,
        launch_pdl=early(rows),
    )
    return out_HRL


def _attend_parts(
    q_latent_HRL: torch.Tensor,
    q_RHQ: torch.Tensor,
    rows_KC: torch.Tensor,
    pages_RB: torch.Tensor,
    contexts_R: torch.Tensor,
    prefix: torch.Tensor,
    page_size: int,
    scale: float,
    parts: int,
    partial: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """See mla_decode_gluon.py; for 16 heads."""
    heads, rows, latent = q_latent_HRL.shape
    rope = rows_KC.shape[1] - latent
    _decode_kernel[(parts,)](
        q_latent_HRL,
        q_RHQ,
        rows_KC,
        pages_RB,
        contexts_R,
        prefix,
        partial,
        lse,
        rows,
        pages_RB.stride(0),
        scale * math.log2(math.e),
        Q_STRIDE=q_RHQ.stride(0),
        BLOCK_R=block_of_rows(rows),
        HEADS=heads,
        NOPE=q_RHQ.shape[2] - rope,
        ROPE=rope,
        LATENT=latent,
        PAGE=page_size,
        TILE=_TILE,
        STAGES=_STAGES,
        num_warps=4,
        launch_pdl=early(rows),
    )
