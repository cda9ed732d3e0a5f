"""Absorbed latent attention of one query per row over pages, on the GPU; `mla.py`'s `absorbed_decode` is the reference.
The kernel here takes 16 heads, which memory bounds; mla_decode_gluon.py's takes multiples of 64.

The rows' contexts, laid end to end in pages, are cut into as many equal parts as there are programs, wherever a row
ends (so every program reads the same number of pages, whatever the lengths). mla_values_gluon.py puts each row's parts
together in their order and makes values of them. Everything is derived on the device from the contexts, so the launch
is the same for any lengths and can be replayed from a graph. The piece of row r in part p has the workspace slot r + p:
along the cut, each piece advances the row, the part or both.

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
from nmoe.worker.kernels.mla_values_gluon import Parts, values_of_parts
from nmoe.worker.kernels.mla_warps_gluon import ROWS

_TILE = 32  # positions that a program holds at a time; two programs share a multiprocessor
_STAGES = 5
_FEW_HEADS = 16


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
    w_uv_HVL: torch.Tensor,
    out_RHV: torch.Tensor,
) -> None:
    """The values of one query per row into `out_RHV`, a row's side by side; every row has a context of at least one
    position.

    `q_latent_HRL`: W_UK^T q_nope; the last P dimensions of `q_RHQ` are the roped queries. `pages_RB` int32 or int64.
    `contexts_R` and `prefix` are `page_prefix`'s; they are read before this waits, so some kernel ran in between.
    """
    heads, rows, latent = q_latent_HRL.shape
    few = heads == _FEW_HEADS
    programs = multiprocessors(rows_KC.device)
    count = 2 * programs if few else max(1, programs * ROWS // heads)
    partial = torch.empty(rows + count, heads, latent, dtype=torch.float32, device=rows_KC.device)
    lse = torch.empty(rows + count, heads, dtype=torch.float32, device=rows_KC.device)
    parts = Parts(count, prefix, partial, lse, None if few else torch.empty_like(q_latent_HRL))
    attend = _attend_parts if few else attend_parts
    attend(q_latent_HRL, q_RHQ, rows_KC, pages_RB, contexts_R, page_size, scale, parts)
    values_of_parts(parts, w_uv_HVL, out_RHV)


def _attend_parts(
    q_latent_HRL: torch.Tensor,
    q_RHQ: torch.Tensor,
    rows_KC: torch.Tensor,
    pages_RB: torch.Tensor,
    contexts_R: torch.Tensor,
    page_size: int,
    scale: float,
    parts: Parts,
) -> None:
    """See mla_decode_gluon.py; for 16 heads."""
    heads, rows, latent = q_latent_HRL.shape
    rope = rows_KC.shape[1] - latent
    _decode_kernel[(parts.num_parts,)](
        q_latent_HRL,
        q_RHQ,
        rows_KC,
        pages_RB,
        contexts_R,
        parts.prefix,
        parts.partial,
        parts.lse,
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
