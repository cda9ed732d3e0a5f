"""x @ weight^T for few tokens, bound by reading the weights; for more tokens, cuBLAS.

A program computes few outputs, so that any shape makes more programs than multiprocessors, and its warps divide the
inputs among themselves. If its weights fit, they are read while the previous kernel still runs.

Shape suffixes: T tokens, O outputs, I inputs.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nmoe.worker.kernels.device import FEW_TOKENS
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.products_triton import load_tiles

_COLUMNS, _PARTS, _DEPTH = 16, 4, 64
_AHEAD = 2048  # inputs; up to this, a program's weights fit into its registers and shared memory
_DEPTH_AHEAD = 256


@triton.jit(do_not_specialize=["tokens"])
def _few_tokens_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    tokens,
    x_stride,
    O: tl.constexpr,  # noqa: E741 as everywhere here
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """`AHEAD`: all of a program's weights, which no kernel writes, start loading before the wait."""
    SPAN: tl.constexpr = I // PARTS
    output = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, ROWS)
    lane = tl.arange(0, PARTS)[:, None, None] * SPAN + tl.arange(0, DEPTH)[None, None, :]
    w_at = w_ptr + output[None, :, None] * I + lane
    x_at = x_ptr + token[None, :, None] * x_stride + lane
    acc = tl.zeros([PARTS, COLUMNS, ROWS], tl.float32)
    written, exists = (output < O)[None, :, None], (token < tokens)[None, :, None]
    if AHEAD:
        weights = load_tiles(w_at, written, SPAN, DEPTH)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
        xs = load_tiles(x_at, exists, SPAN, DEPTH)
        for k in tl.static_range(0, SPAN, DEPTH):
            acc = tl.dot(weights[k // DEPTH], tl.permute(xs[k // DEPTH], (0, 2, 1)), acc)
    else:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
        for k in tl.range(0, SPAN, DEPTH, num_stages=4):
            w = tl.load(w_at + k, mask=written, other=0.0)
            x = tl.load(x_at + k, mask=exists, other=0.0)
            acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc)
    out = out_ptr + token[None, :] * O + output[:, None]
    inside = (token < tokens)[None, :] & (output < O)[:, None]
    tl.store(out, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=inside)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x @ weight^T, [T, O]. Rows of `x_TI` need not be contiguous."""
    tokens, (outputs, inputs) = len(x_TI), weight_OI.shape
    if not 0 < tokens <= FEW_TOKENS or inputs % (_PARTS * _DEPTH):
        return F.linear(x_TI, weight_OI)
    out_TO, ahead = x_TI.new_empty(tokens, outputs), inputs <= _AHEAD
    _few_tokens_kernel[(triton.cdiv(outputs, _COLUMNS),)](
        x_TI,
        weight_OI,
        out_TO,
        tokens,
        x_TI.stride(0),
        O=outputs,
        I=inputs,
        ROWS=FEW_TOKENS,
        COLUMNS=_COLUMNS,
        PARTS=_PARTS,
        DEPTH=math.gcd(inputs // _PARTS, _DEPTH_AHEAD) if ahead else _DEPTH,
        AHEAD=ahead,
        num_warps=_PARTS,
        launch_pdl=early(tokens),
    )
    return out_TO
