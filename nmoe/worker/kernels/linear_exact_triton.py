"""Products of the exact class on the GPU: an element's bits depend on its row and weights only (docs/exact.md).

Every tile adds along the inputs in order, 16 at a time, into one float32 accumulator; measured on Hopper, the tensor
cores then give an element the same bits in tiles of any shape, transposed or not, with wgmma or mma.sync. So the tiles
may depend on the outputs, and nothing is ever split along the inputs. The same holds for cuBLAS once it is forbidden to
split; it is used for more than a few tokens.

Shape suffixes: T tokens, O outputs, I inputs.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.worker.kernels.device import FEW_TOKENS
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.products_triton import add_product, by_rows, empty_tile


class _Tile(NamedTuple):
    columns: int  # outputs
    depth: int
    warps: int
    stages: int
    transposed: bool
    least: int = 0  # minimum number of tiles to fill the multiprocessors; with fewer, the next form is used


_TILES = _Tile(128, 64, 4, 5, True, least=120), _Tile(32, 256, 4, 4, False, least=120), _Tile(16, 256, 2, 4, False)


@contextlib.contextmanager
def _unsplit() -> Iterator[None]:
    """Within this context cuBLAS adds along all inputs in one accumulator. Only cuBLASLt can be
    restricted, through the kinds of reduction it may use; torch fails if that is asked of another library."""
    if torch.backends.cuda.preferred_blas_library() != torch._C._BlasBackend.Cublaslt:  # not in workers: envs.py
        torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k
    matmul.allow_bf16_reduced_precision_reduction = False, False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = allowed


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x_ptr,
    w_desc,
    out_ptr,
    tokens,
    X_STRIDE: tl.constexpr,
    O: tl.constexpr,  # noqa: E741 as everywhere here
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    column = tl.program_id(0) * COLUMNS
    output = column + tl.arange(0, COLUMNS)
    token = tl.arange(0, ROWS)
    exists = (token < tokens)[:, None]
    lane = tl.arange(0, DEPTH)
    x_at = x_ptr + token.to(tl.int64)[:, None] * X_STRIDE + lane[None, :]
    acc = empty_tile(ROWS, COLUMNS, TRANSPOSED)
    for k in tl.range(0, I, DEPTH, num_stages=STAGES):
        if I % DEPTH == 0:
            x = tl.load(x_at + k, mask=exists, other=0.0)
        else:
            x = tl.load(x_at + k, mask=exists & (k + lane < I)[None, :], other=0.0)
        w = w_desc.load([column, k])
        acc = add_product(acc, x, w, TRANSPOSED)
    acc = by_rows(acc, TRANSPOSED)
    out = out_ptr + token.to(tl.int64)[:, None] * O + output[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=exists & (output < O)[None, :])


def linear_into(x_TI: torch.Tensor, weight_OI: torch.Tensor, out_TO: torch.Tensor) -> None:
    """x @ weight^T into `out_TO`. Rows of `x_TI` need not be contiguous; I is a multiple of 8."""
    tokens, (outputs, inputs) = len(x_TI), weight_OI.shape
    if not tokens:
        return
    if tokens > FEW_TOKENS:
        with _unsplit():
            torch.mm(x_TI, weight_OI.t(), out=out_TO)
        return
    tile = next(tile for tile in _TILES if -(-outputs // tile.columns) >= tile.least)
    _linear_kernel[(triton.cdiv(outputs, tile.columns),)](
        x_TI,
        TensorDescriptor.from_tensor(weight_OI, [tile.columns, tile.depth]),
        out_TO,
        tokens,
        X_STRIDE=x_TI.stride(0) if tokens > 1 else inputs,
        O=outputs,
        I=inputs,
        ROWS=FEW_TOKENS,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        STAGES=tile.stages,
        TRANSPOSED=tile.transposed,
        num_warps=tile.warps,
        launch_pdl=early(tokens),
    )


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x @ weight^T, [T, O]; see `linear_into`."""
    out_TO = x_TI.new_empty(len(x_TI), len(weight_OI))
    linear_into(x_TI, weight_OI, out_TO)
    return out_TO
