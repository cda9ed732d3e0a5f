"""Absorbed latent attention of one query per row over pages, on the GPU; `mla.py`'s `absorbed_decode` is the reference.
mla_decode_few_gluon.py has the kernel for 16 heads, mla_decode_gluon.py the one for multiples of 64.

The rows' contexts, concatenated in pages, are cut into one equal part per program, regardless of where rows end (so
every program reads the same number of pages, whatever the lengths). mla_values_gluon.py combines each row's parts in
order and computes its values. Everything is derived on the device from the contexts, so the launch is the same for any
lengths and can be replayed from a graph. The piece of row r in part p uses workspace slot r + p: along the cuts, each
piece advances the row, the part or both.

Shape suffixes: R rows, H heads, L latent, P rope dimensions, C = L + P, K rows of the cache, B pages of a row (padded).
"""

import torch
import triton
import triton.language as tl

from nmoe.worker.kernels import mla_decode_few_gluon, mla_decode_gluon
from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.mla_tiles_triton import block_of_rows, contexts_of, store_plan
from nmoe.worker.kernels.mla_values_gluon import Parts, values_of_parts


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
    partial = torch.empty(rows + count, heads, latent, dtype=torch.float32, device=rows_KC.device)
    lse = torch.empty(rows + count, heads, dtype=torch.float32, device=rows_KC.device)
    parts = Parts(count, prefix, partial, lse, None if few else torch.empty_like(q_latent_HRL))
    kernel.attend_parts(q_latent_HRL, q_RHQ, rows_KC, pages_RB, contexts_R, page_size, scale, parts)
    values_of_parts(parts, w_uv_HVL, out_RHV)
