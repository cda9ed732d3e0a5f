"""FP8 products on the GPU: activations quantised per token and 128 columns; `fp8.py` is the reference.

Products of few tokens are computed here, those of more tokens by the warps of fp8_gluon.py, or by cuBLAS if there are
tiles for most multiprocessors. If there are not, a product is also split along its inputs, so that every multiprocessor
reads weights, and the parts are added in order; the exact class uses the smaller tiles here instead.

Shape suffixes: T tokens, O outputs, I inputs, B and C blocks of O and of I.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.worker.kernels.device import FEW_TOKENS, multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.fp8 import ALIGNED_ROWS, BLOCK, Activations, BlockFP8, Quantised
from nmoe.worker.kernels.fp8_gluon import MANY, SOME, Form, linear_by_warps
from nmoe.worker.kernels.products_triton import by_rows, empty_tile, scaled_product

_GROUPS = 16  # of 128 columns, per program of the quantisation
_ADDED = 512  # elements, per program of the sum of the splits
# Measured at DeepSeek-V3's shapes; benchmarks/LOG.md has the table.
_SPLITS_OF_LIBRARY = 2  # cuBLAS is slower for a product that could be split further
_LEAST_TILES = 0.4  # per multiprocessor, for an exact product by warps


@triton.jit
def scales_of(x):
    """The divisors that convert blocks, float32 [N, 128], to FP8, float32 [N]; as in fp8.py's `quantise_rows`."""
    return tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / 448.0


@triton.jit
def store_quantised(x, group, inside, values_ptr, scales_ptr, token, scales_stride, C: tl.constexpr):
    """Quantise and store blocks of a token, float32 [N, 128], numbered `group` [N], where `inside`: see `Quantised`."""
    scale = scales_of(x)
    at = values_ptr + token * (C * 128) + group[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(at, (x / scale[:, None]).to(tl.float8e4nv), mask=inside[:, None])
    tl.store(scales_ptr + group.to(tl.int64) * scales_stride + token, scale, mask=inside)


@triton.jit(do_not_specialize=["scales_stride"])
def _quantise_kernel(x_ptr, out_ptr, scales_ptr, x_stride, scales_stride, C: tl.constexpr, GROUPS: tl.constexpr):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = group < C
    lane = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + token * x_stride + lane, mask=inside[:, None], other=0.0).to(tl.float32)
    store_quantised(x, group, inside, out_ptr, scales_ptr, token, scales_stride, C)


@triton.jit(do_not_specialize=["tokens", "scales_stride"])
def _linear_kernel(
    x_desc,
    x_scales_ptr,
    w_desc,
    w_scales_ptr,
    out_ptr,
    tokens,
    scales_stride,
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
        scale = tl.load(x_scales_ptr + c * scales_stride + token, mask=token < tokens, other=0.0)
        scale *= tl.load(w_scales_ptr + column // 128 * C + c)
        acc += scaled_product(x, w, scale, TRANSPOSED)
    acc = by_rows(acc, TRANSPOSED)
    out = out_ptr + (split.to(tl.int64) * tokens + token)[:, None] * O + output[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (output < O)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _add_kernel(parts_ptr, out_ptr, tokens, O: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    size = tokens.to(tl.int64) * O
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts_ptr + split * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=at < size)


def room_for(x_TI: torch.Tensor) -> Quantised:
    """Allocate its quantised form."""
    tokens, inputs = x_TI.shape
    rows = triton.cdiv(tokens, ALIGNED_ROWS) * ALIGNED_ROWS
    values_PI = x_TI.new_empty(rows, inputs, dtype=torch.float8_e4m3fn)
    return Quantised(x_TI, values_PI, x_TI.new_empty(inputs // BLOCK, rows, dtype=torch.float32))


def quantise(x: Activations) -> Quantised:
    """See fp8.py's `quantise_rows`. Rows need not be contiguous; does nothing if already quantised."""
    if isinstance(x, Quantised):
        return x
    (tokens, inputs), out = x.shape, room_for(x)
    if tokens:
        grid = (tokens, triton.cdiv(inputs // BLOCK, _GROUPS))
        _quantise_kernel[grid](
            x,
            out.values_PI,
            out.scales_CP,
            x.stride(0),
            out.scales_CP.stride(0),
            C=inputs // BLOCK,
            GROUPS=_GROUPS,
            launch_pdl=early(tokens),
        )
    return out


def linear(x: Activations, weight: BlockFP8) -> torch.Tensor:
    """x @ weight^T in x's dtype, [T, O]."""
    quantised, (outputs, inputs) = quantise(x), weight.values.shape
    tokens, blocks, programs = len(quantised.x_TI), inputs // BLOCK, multiprocessors(weight.values.device)
    if tokens <= FEW_TOKENS:
        most = max(1, 2 * programs // triton.cdiv(outputs, BLOCK))
        return _by_tiles(quantised, weight, BLOCK, max(4, triton.cdiv(blocks, most)))
    form = SOME if tokens <= SOME.rows else MANY
    splits = max(1, programs // form.tiles(tokens, outputs))
    if form is MANY and splits <= _SPLITS_OF_LIBRARY and _library_takes(weight):
        return _library_product(quantised, weight)
    return _by_warps(quantised, weight, form, triton.cdiv(blocks, splits))


def linear_exact(x: Activations, weight: BlockFP8) -> torch.Tensor:
    """`linear`, never split along the inputs: a row's bits depend on nothing else. See linear_exact_triton.py."""
    quantised, (outputs, inputs) = quantise(x), weight.values.shape
    tokens, blocks, programs = len(quantised.x_TI), inputs // BLOCK, multiprocessors(weight.values.device)
    if FEW_TOKENS < tokens <= SOME.rows:
        return _by_warps(quantised, weight, SOME, blocks)
    if tokens > FEW_TOKENS and MANY.tiles(tokens, outputs) >= _LEAST_TILES * programs:
        return _by_warps(quantised, weight, MANY, blocks)
    narrow = tokens > FEW_TOKENS or triton.cdiv(outputs, BLOCK) < programs
    return _by_tiles(quantised, weight, BLOCK // 2 if narrow else BLOCK, blocks)


def _by_tiles(x: Quantised, weight: BlockFP8, columns: int, per_split: int) -> torch.Tensor:
    """Compute in tiles of `columns` outputs, with `per_split` blocks of inputs each."""
    tokens, (outputs, inputs) = len(x.x_TI), weight.values.shape
    rows, blocks = FEW_TOKENS if tokens <= FEW_TOKENS else 128, inputs // BLOCK
    splits = triton.cdiv(blocks, per_split)
    into = _room(x, outputs, splits)
    if tokens:
        _linear_kernel[(triton.cdiv(outputs, columns), triton.cdiv(tokens, rows), splits)](
            TensorDescriptor.from_tensor(x.values_PI, [rows, BLOCK]),
            x.scales_CP,
            TensorDescriptor.from_tensor(weight.values, [columns, BLOCK]),
            weight.scales,
            into,
            tokens,
            x.scales_CP.stride(0),
            O=outputs,
            C=blocks,
            PER_SPLIT=per_split,
            ROWS=rows,
            COLUMNS=columns,
            STAGES=4,
            TRANSPOSED=rows < 128,
            num_warps=4,
            launch_pdl=early(tokens),
        )
    return _summed(into, x.x_TI.dtype)


def _by_warps(x: Quantised, weight: BlockFP8, form: Form, per_split: int) -> torch.Tensor:
    """Compute in the tiles of fp8_gluon.py."""
    outputs, inputs = weight.values.shape
    into = _room(x, outputs, triton.cdiv(inputs // BLOCK, per_split))
    linear_by_warps(x, weight, into, form, per_split)
    return _summed(into, x.x_TI.dtype)


def _room(x: Quantised, outputs: int, splits: int) -> torch.Tensor:
    """Allocate the product, [T, O], or each split's, float32 [splits, T, O]."""
    tokens = len(x.x_TI)
    if splits == 1:
        return x.x_TI.new_empty(tokens, outputs)
    return x.x_TI.new_empty(splits, tokens, outputs, dtype=torch.float32)


def _summed(into: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The product, from what `_room` allocated."""
    if into.dim() == 2:
        return into
    splits, tokens, outputs = into.shape
    out_TO = into.new_empty(tokens, outputs, dtype=dtype)
    if tokens:
        _add_kernel[(triton.cdiv(tokens * outputs, _ADDED),)](
            into, out_TO, tokens, O=outputs, SPLITS=splits, BLOCK=_ADDED, launch_pdl=early(tokens)
        )
    return out_TO


def _library_takes(weight: BlockFP8) -> bool:
    """cuBLAS needs rows of scales in multiples of 16 bytes, and a multiple of 16 outputs."""
    outputs, inputs = weight.values.shape
    return inputs % (4 * BLOCK) == 0 and outputs % 16 == 0


def _library_product(x: Quantised, weight: BlockFP8) -> torch.Tensor:
    """cuBLAS's product: its neighbouring multiprocessors share what they read, for half the L2 reads of our tiles."""
    out_PO = F.scaled_mm(
        x.values_PI,
        weight.values.t(),
        x.scales_CP.t(),
        F.ScalingType.BlockWise1x128,
        weight.scales.t(),
        F.ScalingType.BlockWise128x128,
        output_dtype=x.x_TI.dtype,
    )
    return out_PO[: len(x.x_TI)]
