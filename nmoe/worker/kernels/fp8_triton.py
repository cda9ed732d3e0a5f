"""FP8 products on the GPU: activations quantised per token and 128 columns; `fp8.py` is the reference.

A product of few tokens is cut along its inputs as well, so that every multiprocessor reads weights; the pieces are
added in their order.

Shape suffixes: T tokens, O outputs, I inputs, B and C blocks of O and of I.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.fp8 import BLOCK, BlockFP8
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
    PER_SPLIT: tl.constexpr,
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
    split = tl.program_id(2)
    acc = empty_tile(ROWS, COLUMNS, TRANSPOSED)
    for c in tl.range(split * PER_SPLIT, tl.minimum(split * PER_SPLIT + PER_SPLIT, C), num_stages=STAGES):
        x = x_desc.load([row, c * 128])
        w = w_desc.load([column, c * 128])
        scale = tl.load(x_scales_ptr + c * tokens + token, mask=token < tokens, other=0.0)
        scale *= tl.load(w_scales_ptr + column // 128 * C + c)
        acc += scaled_product(x, w, scale, TRANSPOSED)
    acc = by_rows(acc, TRANSPOSED)
    out = out_ptr + (split.to(tl.int64) * tokens + token)[:, None] * O + output[None, :]
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
    blocks, tiles = weight.scales.shape[1], _tiles(x_TI, weight, BLOCK)
    most = max(1, 2 * multiprocessors(x_TI.device) // max(1, tiles))
    return _product(x_TI, weight, BLOCK, max(4, triton.cdiv(blocks, most)))


def linear_exact(x_TI: torch.Tensor, weight: BlockFP8) -> torch.Tensor:
    """The same, never split along the inputs: a row's bits depend on nothing else. See linear_exact_triton.py."""
    narrow = _tiles(x_TI, weight, BLOCK) < multiprocessors(x_TI.device)
    return _product(x_TI, weight, BLOCK // 2 if narrow else BLOCK, weight.scales.shape[1])


def _tiles(x_TI: torch.Tensor, weight: BlockFP8, columns: int) -> int:
    return -(-len(weight.values) // columns) * -(-len(x_TI) // _rows(len(x_TI)))


def _product(x_TI: torch.Tensor, weight: BlockFP8, columns: int, per_split: int) -> torch.Tensor:
    """In tiles of `columns` outputs, `per_split` blocks of the inputs in each."""
    tokens, (outputs, inputs) = len(x_TI), weight.values.shape
    out_TO = x_TI.new_empty(tokens, outputs)
    if not tokens:
        return out_TO
    values_TI, scales_CT = quantise(x_TI)
    rows, blocks = _rows(tokens), inputs // BLOCK
    splits = triton.cdiv(blocks, per_split)
    into = out_TO if splits == 1 else x_TI.new_empty(splits, tokens, outputs, dtype=torch.float32)
    _linear_kernel[(triton.cdiv(outputs, columns), triton.cdiv(tokens, rows), splits)](
        TensorDescriptor.from_tensor(values_TI, [rows, BLOCK]),
        scales_CT,
        TensorDescriptor.from_tensor(weight.values, [columns, BLOCK]),
        weight.scales,
        into,
        tokens,
        O=outputs,
        C=blocks,
        PER_SPLIT=per_split,
        ROWS=rows,
        COLUMNS=columns,
        STAGES=4,
        TRANSPOSED=rows < 128,
        num_warps=4 if rows <= 32 or columns < BLOCK else 8,
        launch_pdl=early(tokens),
    )
    if splits > 1:
        _add_kernel[(triton.cdiv(tokens * outputs, 1024),)](
            into, out_TO, tokens * outputs, SPLITS=splits, BLOCK=1024, launch_pdl=early(tokens)
        )
    return out_TO
