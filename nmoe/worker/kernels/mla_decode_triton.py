"""Absorbed latent attention of one query per row over pages, on the GPU; `mla.py`'s `absorbed_decode` is the reference.
mla_decode_few_gluon.py has the kernel for 16 heads, mla_decode_gluon.py the one for multiples of 64.

The rows' contexts, concatenated in pages, are cut into one equal part per program, regardless of where rows end (so
every program reads the same number of pages, whatever the lengths). mla_values_gluon.py combines each row's parts in
order and computes its values; where these are a large product, of many rows and heads, parts are combined before it.
Everything is derived on the device from the contexts, so the launch is the same for any lengths and can be replayed
from a graph. The piece of row r in part p uses workspace slot r + p: along the cuts, each piece advances the row, the
part or both.

Shape suffixes: R rows, H heads, L latent, P rope dimensions, C = L + P, K rows of the cache, B pages of a row (padded).
"""

import torch
import triton
import triton.language as tl

from nmoe.worker.kernels import mla_decode_few_gluon, mla_decode_gluon
from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.mla_tiles_triton import block_of_rows, contexts_of, row_of, store_plan
from nmoe.worker.kernels.mla_values_gluon import Parts, values_of_parts
from nmoe.worker.kernels.mla_values_many_gluon import are_many, values_of_many

_COMBINED = 8  # heads of a row whose parts a program combines, with a warp each


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions_ptr"])
def _contexts_kernel(positions_ptr, contexts_ptr, prefix_ptr, num_rows, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """contexts = positions + 1; prefix[r] = pages of all rows before r."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    context = contexts_of(positions_ptr, num_rows, BLOCK)
    store_plan(contexts_ptr, prefix_ptr, context, PAGE, num_rows, BLOCK)


def page_prefix(positions_R: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From the rows' last positions: their contexts, int32 [R], and the running sum of their pages, int32 [R + 1]."""
    rows = len(positions_R)
    contexts_R = positions_R.new_empty(rows, dtype=torch.int32)
    prefix = positions_R.new_empty(rows + 1, dtype=torch.int32)
    block = block_of_rows(rows)
    _contexts_kernel[(1,)](positions_R, contexts_R, prefix, rows, PAGE=page_size, BLOCK=block, launch_pdl=early(rows))
    return contexts_R, prefix


@triton.jit
def _load_part(partial_ptr, lse_ptr, slot, head, HEADS: tl.constexpr, LATENT: tl.constexpr):
    """Some heads' values [H, L] and log2 of their sums of weights [H], in a slot of the workspace."""
    at = slot.to(tl.int64) * HEADS + head
    partial = tl.load(partial_ptr + at[:, None] * LATENT + tl.arange(0, LATENT)[None, :])
    return partial.to(tl.float32), tl.load(lse_ptr + at)


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    prefix_ptr,
    partial_ptr,
    lse_ptr,
    whole_ptr,
    num_rows,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Some heads of the row that begins in this program's part and goes on in the next one, if there is such a row."""
    part = tl.program_id(0)
    pages = tl.cdiv(tl.load(prefix_ptr + num_rows), tl.num_programs(0))
    after = (part + 1) * pages
    row = tl.minimum(row_of(prefix_ptr, after, num_rows, BLOCK_R), num_rows - 1)
    begin, end = tl.load(prefix_ptr + row), tl.load(prefix_ptr + row + 1)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    if (begin < after) & (after < end) & (begin >= part * pages):
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        first, lse = _load_part(partial_ptr, lse_ptr, row + part, head, HEADS, LATENT)
        second, next_lse = _load_part(partial_ptr, lse_ptr, row + part + 1, head, HEADS, LATENT)
        peak = tl.maximum(lse, next_lse)
        before, here = tl.exp2(lse - peak), tl.exp2(next_lse - peak)
        weight = before + here
        acc = first * before[:, None] + second * here[:, None]
        for piece in range(part + 2, tl.cdiv(end, pages)):
            partial, lse = _load_part(partial_ptr, lse_ptr, row + piece, head, HEADS, LATENT)
            new_peak = tl.maximum(peak, lse)
            before, here = tl.exp2(peak - new_peak), tl.exp2(lse - new_peak)
            acc = acc * before[:, None] + partial * here[:, None]
            weight = weight * before + here
            peak = new_peak
        out = whole_ptr + (head.to(tl.int64) * num_rows + row)[:, None] * LATENT + tl.arange(0, LATENT)[None, :]
        tl.store(out, (acc / weight[:, None]).to(whole_ptr.dtype.element_ty), eviction_policy=KEPT)


def _combine(parts: Parts, heads: int, whole_HRL: torch.Tensor) -> None:
    """Combine the parts of every row that has several, into the whole ones' place."""
    rows, latent = whole_HRL.shape[1:]
    _combine_kernel[(parts.num_parts, heads // _COMBINED)](
        parts.prefix,
        parts.partial,
        parts.lse,
        whole_HRL,
        rows,
        HEADS=heads,
        LATENT=latent,
        BLOCK_H=_COMBINED,
        BLOCK_R=block_of_rows(rows),
        KEPT=kept(rows),
        num_warps=_COMBINED,
        launch_pdl=early(rows),
    )


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
    """The values of one query per row into `out_RHV`, contiguous per row. Every row must have a context of at least one
    position.

    `q_latent_HRL`: W_UK^T q_nope; the last P dimensions of `q_RHQ` are the roped queries. `pages_RB` int32 or int64.
    `contexts_R` and `prefix` are from `page_prefix`; they are read before the wait, so some kernel must run in between.
    """
    heads, rows, latent = q_latent_HRL.shape
    few = heads == mla_decode_few_gluon.HEADS
    kernel = mla_decode_few_gluon if few else mla_decode_gluon
    count = kernel.num_parts(multiprocessors(rows_KC.device), heads)
    partial = q_latent_HRL.new_empty(rows + count, heads, latent)
    lse = q_latent_HRL.new_empty(rows + count, heads, dtype=torch.float32)
    parts = Parts(count, prefix, partial, lse, None if few else torch.empty_like(q_latent_HRL))
    kernel.attend_parts(q_latent_HRL, q_RHQ, rows_KC, pages_RB, contexts_R, page_size, scale, parts)
    if parts.whole_HRL is not None and are_many(rows, w_uv_HVL):
        _combine(parts, heads, parts.whole_HRL)
        values_of_many(parts.whole_HRL, w_uv_HVL, out_RHV)
    else:
        values_of_parts(parts, w_uv_HVL, out_RHV)
