"""FP8 products on the GPU: activations quantised per token and 128 columns; `fp8.py` is the reference.

The fast class's product is fp8_linear_gluon.py's, which cuts it along its inputs as well, so that every multiprocessor
reads weights; the terms are added here, in their order.

Shape suffixes: T tokens, O outputs, I inputs, B and C blocks of O and of I.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.fp8 import BLOCK, BlockFP8
from nmoe.worker.kernels.fp8_linear_gluon import product
from nmoe.worker.kernels.products_triton import by_rows, empty_tile, scaled_product

_GROUPS = 16  # of 128 columns, per program of the quantisation


@triton.jit
def scales_of(x):
    """What blocks, float32 [N, 128], are divided by to become FP8, float32 [N]; as in fp8.py's `quantise_rows`."""
    return tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / 448.0


@triton.jit(do_not_specialize=["tokens"])
def _quantise_kernel(x_ptr, out_ptr, scales_ptr, x_stride, tokens, C: tl.constexpr, GROUPS: tl.constexpr):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = group < C
    lane = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + token * x_stride + lane, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = scales_of(x)
    tl.store(out_ptr + token * (C * 128) + lane, (x / scale[:, None]).to(tl.float8e4nv), mask=inside[:, None])
    tl.store(scales_ptr + group.to(tl.int64) * tokens + token, scale, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x_desc,
    x_scales_ptr,
    w_desc,
    w_scales_ptr,
    out_ptr,
    tokens,
    O: tl.constexpr,  # noqa: E741 as everywhere here
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    column = tl.program_id(0) * COLUMNS
    row = tl.program_id(1) * ROWS
    token = row + tl.arange(0, ROWS)
    output = column + tl.arange(0, COLUMNS)
    acc = empty_tile(ROWS, COLUMNS, TRANSPOSED)
    for c in tl.range(0, C, num_stages=STAGES):
        x = x_desc.load([row, c * 128])
        w = w_desc.load([column, c * 128])
        scale = tl.load(x_scales_ptr + c * tokens + token, mask=token < tokens, other=0.0)
        scale *= tl.load(w_scales_ptr + column // 128 * C + c)
        acc += scaled_product(x, w, scale, TRANSPOSED)
    acc = by_rows(acc, TRANSPOSED)
    out = out_ptr + token.to(tl.int64)[:, None] * O + output[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (output < O)[None, :])


@triton.jit(do_not_specialize=["size"])
def _add_kernel(parts_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts_ptr + split * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=at < size)


def quantise(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See fp8.py's `quantise_rows`, but the scales are [C, T]: a tile of tokens finds its own side by side.

    Rows of `x_TI` may lie apart.
    """
    tokens, inputs = x_TI.shape
    values_TI = torch.empty(tokens, inputs, dtype=torch.float8_e4m3fn, device=x_TI.device)
    scales_CT = torch.empty(inputs // BLOCK, tokens, dtype=torch.float32, device=x_TI.device)
    if tokens:
        grid = (tokens, triton.cdiv(inputs // BLOCK, _GROUPS))
        _quantise_kernel[grid](
            x_TI,
            values_TI,
            scales_CT,
            x_TI.stride(0),
            tokens,
            C=inputs // BLOCK,
            GROUPS=_GROUPS,
            launch_pdl=early(tokens),
        )
    return values_TI, scales_CT


def _rows(tokens: int) -> int:
    """Tokens of a tile."""
    return 128 if tokens > 64 else max(16, 1 << (tokens - 1).bit_length())


def linear(x_TI: torch.Tensor, weight: BlockFP8) -> torch.Tensor:
    """x @ weight^T in x's dtype, [T, O]."""
    tokens, outputs = len(x_TI), len(weight.values)
    if not tokens:
        return x_TI.new_empty(0, outputs)
    terms = product(*quantise(x_TI), weight, _rows(tokens), x_TI.dtype)
    if terms.dim() == 2:
        return terms
    out_TO = x_TI.new_empty(tokens, outputs)
    _add_kernel[(triton.cdiv(tokens * outputs, 1024),)](
        terms, out_TO, tokens * outputs, SPLITS=len(terms), BLOCK=1024, launch_pdl=early(tokens)
    )
    return out_TO


def linear_exact(x_TI: torch.Tensor, weight: BlockFP8) -> torch.Tensor:
    """The same, never split along the inputs: a row's bits depend on nothing else. See linear_exact_triton.py."""
    tokens, (outputs, inputs) = len(x_TI), weight.values.shape
    out_TO = x_TI.new_empty(tokens, outputs)
    if not tokens:
        return out_TO
    values_TI, scales_CT = quantise(x_TI)
    rows = _rows(tokens)
    tiles = triton.cdiv(outputs, BLOCK) * triton.cdiv(tokens, rows)
    columns = BLOCK // 2 if tiles < multiprocessors(x_TI.device) else BLOCK
    _linear_kernel[(triton.cdiv(outputs, columns), triton.cdiv(tokens, rows))](
        TensorDescriptor.from_tensor(values_TI, [rows, BLOCK]),
        scales_CT,
        TensorDescriptor.from_tensor(weight.values, [columns, BLOCK]),
        weight.scales,
        out_TO,
        tokens,
        O=outputs,
        C=inputs // BLOCK,
        ROWS=rows,
        COLUMNS=columns,
        STAGES=4,
        TRANSPOSED=rows < 128,
        num_warps=4 if rows <= 32 or columns < BLOCK else 8,
        launch_pdl=early(tokens),
    )
    return out_TO
