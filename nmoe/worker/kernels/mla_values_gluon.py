"""The values of attended latents for few rows, W_UV c, in Gluon. The latents are given, or they are still in the parts
from decode attention: then a row's parts are combined in order, and rounded as latents are.

A program has some columns of a head's values, whose weights stay in its shared memory for all its rows: they start
loading before the wait. It requests all parts of a tile of rows at once, as many as its registers hold: the fewer rows,
the more parts of each. While one tile is multiplied, the next one's parts are loading.

An element is added along the latent in one accumulator, as in mla_values_triton.py, so its bits are the same.

Shape suffixes: R rows, H heads, L latent, V value dimensions; of a tile N rows, P parts at a time. Layouts: M of parts
[N, P, L], F of their factors [N, P].
"""

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.hopper_gluon import copy_tile, descriptor, wait_for_kernel_before

_HELD = 8  # parts of 512 that a warp's registers hold


class Parts(NamedTuple):
    """Attended latents of decode rows; see mla_decode_triton.py for how their contexts are cut."""

    num_parts: int
    prefix: torch.Tensor  # [R + 1] int32: number of pages of the rows before
    partial: torch.Tensor  # [R + num_parts, H, L] bfloat16
    lse: torch.Tensor  # [R + num_parts, H] float32: log2 of the sum of weights
    # Latents of rows that are within one part, if not in `partial`; of all rows once these are combined.
    whole_HRL: torch.Tensor | None


@gluon.jit
def _rows(plan, row, num_rows, SOME_WHOLE: gl.constexpr):
    """The index of each row's first part; how many parts to combine, zero for a whole row; and which rows are whole.
    The plan is older than the previous kernel, so it is read before the wait."""
    prefix_ptr, num_parts = plan
    exists = row < num_rows
    if prefix_ptr is None:
        rows = (row, row * 0, exists)
    else:
        chunk = (gl.load(prefix_ptr + num_rows) + num_parts - 1) // num_parts
        first = gl.load(prefix_ptr + row, mask=exists, other=0) // chunk
        last = (gl.load(prefix_ptr + row + 1, mask=exists, other=0) + chunk - 1) // chunk
        whole = exists & (last - first == 1) & SOME_WHOLE
        rows = (row + first, gl.where(exists & (whole == 0), last - first, 0), whole)
    return rows


@gluon.jit
def _load_parts(source, rows, start, LATENT: gl.constexpr, HEADS: gl.constexpr, M: gl.constexpr, F: gl.constexpr):
    """The rows' parts from the `start`th on, and log2 of their sums of weights."""
    partial_ptr, lse_ptr = source
    first, count, _ = rows
    PARTS: gl.constexpr = M.size_per_thread[1]
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, M))
    part = start + gl.arange(0, PARTS, gl.SliceLayout(0, gl.SliceLayout(2, M)))[None, :]
    slot = (gl.convert_layout(first, ROW)[:, None] + part).to(gl.int64)
    lane = gl.arange(0, LATENT, gl.SliceLayout(0, gl.SliceLayout(1, M)))[None, None, :]
    there = (part < gl.convert_layout(count, ROW)[:, None])[:, :, None] & (lane >= 0)
    partial = gl.load(partial_ptr + (slot * (HEADS * LATENT))[:, :, None] + lane, mask=there, other=0.0).to(gl.float32)
    part = start + gl.arange(0, PARTS, gl.SliceLayout(0, F))[None, :]
    lse_ptr += (first[:, None] + part) * HEADS
    return partial, gl.load(lse_ptr, mask=part < count[:, None], other=float("-inf"))


@gluon.jit
def _ask(source, whole, rows, first_row, LATENT: gl.constexpr, HEADS: gl.constexpr, M: gl.constexpr, F: gl.constexpr):
    """Start loading what a tile of rows needs: the first parts, as by `_load_parts`, and latents [N, L] of the whole
    rows. The former is empty if no row has parts, the latter if no row is whole."""
    whole_ptr, whole_row = whole
    parts = ()
    latents = ()
    if source[0] is not None:
        parts = _load_parts(source, rows, 0, LATENT, HEADS, M, F)
    if whole_ptr is not None:
        X: gl.constexpr = gl.SliceLayout(1, M)
        row = first_row + gl.arange(0, rows[0].shape[0], gl.SliceLayout(1, X))
        lane = gl.arange(0, LATENT, gl.SliceLayout(0, X))[None, :]
        is_whole = gl.convert_layout(rows[2], gl.SliceLayout(1, X))[:, None] & (lane >= 0)
        at = whole_ptr + row.to(gl.int64)[:, None] * whole_row + lane
        latents = (gl.load(at, mask=is_whole, other=0.0),)  # type: ignore[assignment]
    return parts, latents


@gluon.jit
def _add_parts(peak, weight, lse, M: gl.constexpr):
    """Add parts to those before them. Returns the total peak and weight, [N]; the factors for what was added before,
    [N], and for these parts, [N, P, 1]."""
    new_peak = gl.maximum(peak, gl.max(lse, 1))
    before = gl.exp2(peak - new_peak)
    here = gl.exp2(lse - new_peak[:, None])
    weight = weight * before + gl.sum(here, 1)
    return new_peak, weight, before, gl.convert_layout(here, gl.SliceLayout(2, M))[:, :, None]


@gluon.jit
def _put_together(
    asked,
    source,
    rows,
    LATENT: gl.constexpr,
    HEADS: gl.constexpr,
    SOME_WHOLE: gl.constexpr,
    M: gl.constexpr,
    F: gl.constexpr,
):
    """The latents of a tile's rows, [N, L] in bfloat16."""
    parts, latents = asked
    _, count, is_whole = rows
    if source[0] is None:
        together = latents[0]
    else:
        ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, M))
        PARTS: gl.constexpr = M.size_per_thread[1]
        peak = gl.full(count.shape, float("-inf"), gl.float32, gl.SliceLayout(1, F))
        weight = gl.zeros(count.shape, gl.float32, gl.SliceLayout(1, F))
        peak, weight, before, here = _add_parts(peak, weight, parts[1], M)
        acc = gl.sum(parts[0] * here, 1)
        for start in range(PARTS, gl.max(count, 0), PARTS):
            partial, lse = _load_parts(source, rows, start, LATENT, HEADS, M, F)
            peak, weight, before, here = _add_parts(peak, weight, lse, M)
            acc = acc * gl.convert_layout(before, ROW)[:, None] + gl.sum(partial * here, 1)
        together = (acc * gl.convert_layout(1.0 / weight, ROW)[:, None]).to(gl.bfloat16)
        if SOME_WHOLE:
            together = gl.where(gl.convert_layout(is_whole, ROW)[:, None], latents[0], together)
    return together


@gluon.jit
def _store(out_ptr, out_row, row, num_rows, column, VALUES: gl.constexpr, values, REPEATS: gl.constexpr):
    """Store a tile's values, [COLUMNS, REPEATS N], to rows from `row` on and columns from `column` on."""
    COLUMNS: gl.constexpr = values.shape[0]
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [COLUMNS // 16, 1], [1, 0])
    lane = gl.arange(0, values.shape[1], gl.SliceLayout(1, STORE))
    row += lane // REPEATS
    column += gl.arange(0, COLUMNS, gl.SliceLayout(0, STORE))
    exists = ((row < num_rows) & (lane % REPEATS == 0))[:, None] & (column < VALUES)[None, :]
    values = gl.convert_layout(gl.permute(values.to(out_ptr.dtype.element_ty), (1, 0)), STORE)
    gl.store(out_ptr + row.to(gl.int64)[:, None] * out_row + column[None, :], values, mask=exists)


@gluon.jit(do_not_specialize=["num_rows", "num_parts"])
def _values_kernel(
    w_desc,
    whole_ptr,
    prefix_ptr,
    partial_ptr,
    lse_ptr,
    out_ptr,
    num_rows,
    num_parts,
    whole_row,
    whole_head,
    out_row,
    HEADS: gl.constexpr,
    VALUES: gl.constexpr,
    ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    VECTOR: gl.constexpr,
):
    """Without `whole_ptr` all rows are in parts; without `prefix_ptr`, `partial_ptr` and `lse_ptr` none is."""
    COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    LATENT: gl.constexpr = w_desc.block_type.shape[2]
    WARPS: gl.constexpr = COLUMNS // 16
    WIDTH: gl.constexpr = ROWS if ROWS > 8 else 8  # of the product; fewer rows are repeated
    REPEATS: gl.constexpr = WIDTH // ROWS
    WARPS_N: gl.constexpr = ROWS if ROWS < WARPS else WARPS
    LANES: gl.constexpr = PARTS if PARTS < 32 else 32
    M: gl.constexpr = gl.BlockedLayout([1, PARTS, VECTOR], [1, 1, 32], [WARPS_N, 1, WARPS // WARPS_N], [2, 1, 0])
    F: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WIDTH, LATENT], gl.bfloat16)
    w = gl.allocate_shared_memory(gl.bfloat16, [1, COLUMNS, LATENT], w_desc.layout)
    x = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, LATENT], SHARED)
    w_there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(w_there, count=1)
    fence_async_shared()
    head = gl.program_id(0)
    column = gl.program_id(1) * COLUMNS
    mbarrier.expect(w_there, COLUMNS * LATENT * 2)
    copy_tile(w_desc, [head, column, 0], w_there, w)
    if partial_ptr is not None:
        partial_ptr += head.to(gl.int64) * LATENT
        lse_ptr += head
    if whole_ptr is not None:
        whole_ptr += head.to(gl.int64) * whole_head
    plan = (prefix_ptr, num_parts)
    source = (partial_ptr, lse_ptr)
    whole = (whole_ptr, whole_row)
    first_row = gl.program_id(2) * ROWS
    lane = gl.arange(0, ROWS, gl.SliceLayout(1, F))
    rows = _rows(plan, first_row + lane, num_rows, whole_ptr is not None)
    wait_for_kernel_before()
    asked = _ask(source, whole, rows, first_row, LATENT, HEADS, M, F)
    while first_row < num_rows:
        x_NL = _put_together(asked, source, rows, LATENT, HEADS, whole_ptr is not None, M, F)
        if REPEATS > 1:
            x_NL = gl.expand_dims(x_NL, 1).broadcast_to([ROWS, REPEATS, LATENT]).reshape([WIDTH, LATENT])
        x.store(x_NL)
        fence_async_shared()
        mbarrier.wait(w_there, 0)
        acc = gl.zeros([COLUMNS, WIDTH], gl.float32, PRODUCT)
        adding = warpgroup_mma(w.reshape([COLUMNS, LATENT]), x.permute((1, 0)), acc, is_async=True)
        next_row = first_row + gl.num_programs(2) * ROWS
        rows = _rows(plan, next_row + lane, num_rows, whole_ptr is not None)
        asked = _ask(source, whole, rows, next_row, LATENT, HEADS, M, F)
        acc = warpgroup_mma_wait(0, deps=[adding])
        _store(out_ptr + head * VALUES, out_row, first_row, num_rows, column, VALUES, acc, REPEATS)
        first_row = next_row


def values_of_few(latent_RHL: torch.Tensor, w_uv_HVL: torch.Tensor, out_RHV: torch.Tensor) -> None:
    """See mla_values_triton.py."""
    _launch(latent_RHL, None, w_uv_HVL, out_RHV, 64)


def values_of_parts(parts: Parts, w_uv_HVL: torch.Tensor, out_RHV: torch.Tensor) -> None:
    """Values into `out_RHV`, contiguous per row. L is contiguous in the weights."""
    whole_RHL = None if parts.whole_HRL is None else parts.whole_HRL.transpose(0, 1)
    rows, heads, values = out_RHV.shape
    # Parts are read once per block of columns; but one row of few heads makes too few programs.
    few = 8 * rows * heads <= multiprocessors(out_RHV.device)
    _launch(whole_RHL, parts, w_uv_HVL, out_RHV, 128 if values >= 128 and not few else 64)


def _launch(
    whole_RHL: torch.Tensor | None, parts: Parts | None, w_uv_HVL: torch.Tensor, out_RHV: torch.Tensor, columns: int
) -> None:
    """Launch with `columns` columns of values per program."""
    (rows, heads, values), latent, warps = out_RHV.shape, w_uv_HVL.shape[2], columns // 16
    blocks = triton.cdiv(values, columns)
    groups = max(1, multiprocessors(out_RHV.device) // (heads * blocks))
    held = _HELD * warps
    at_once = min(held, max(2, triton.next_power_of_2(parts.num_parts // rows + 1))) if parts else 2
    together = min(held // at_once, triton.next_power_of_2(triton.cdiv(rows, groups)))
    _values_kernel[(heads, blocks, min(groups, triton.cdiv(rows, together)))](
        descriptor(w_uv_HVL, 1, columns, latent),
        whole_RHL,
        parts.prefix if parts else None,
        parts.partial if parts else None,
        parts.lse if parts else None,
        out_RHV,
        rows,
        parts.num_parts if parts else 0,
        0 if whole_RHL is None else whole_RHL.stride(0),
        0 if whole_RHL is None else whole_RHL.stride(1),
        out_RHV.stride(0),
        HEADS=heads,
        VALUES=values,
        ROWS=together,
        PARTS=at_once,
        VECTOR=max(1, min(4, latent * min(together, warps) // (32 * warps))),
        num_warps=warps,
        launch_pdl=early(rows),
    )
