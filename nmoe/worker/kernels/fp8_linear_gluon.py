"""FP8 products by warps with roles of their own, in Gluon, for fp8_triton.py's `linear`; see fp8_warps_gluon.py.

Shape suffixes as in fp8_triton.py.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.fp8 import BLOCK, BlockFP8
from nmoe.worker.kernels.fp8_warps_gluon import (
    OUTPUTS,
    WORKER_REGISTERS,
    WORKER_WARPS,
    Work,
    descriptor,
    load_rows,
    make_ring,
    multiply,
    produce,
    quantise_rows,
    row_lanes,
    stages_of,
    store,
    store_rows,
    wait_for_kernel_before,
)

_OUTPUTS = gl.constexpr(OUTPUTS)
_LEAST_BLOCKS = 4  # of inputs, in a split


class _Cut(NamedTuple):
    """What there is to do, and how it is cut into pieces."""

    items: gl.tensor
    tokens: gl.tensor
    tiles: gl.tensor  # of tokens
    outputs: gl.tensor
    blocks: gl.tensor  # of the inputs
    per_split: gl.tensor  # of these


@gluon.jit
def _work(item, cut):
    """Piece of work `item`: two neighbouring blocks of outputs, a tile of tokens, a part of the inputs."""
    pairs = (cut.outputs + _OUTPUTS - 1) // _OUTPUTS
    block = item % pairs * 2
    begin = item // pairs // cut.tiles * cut.per_split
    second = gl.minimum(block + 1, (cut.outputs + 127) // 128 - 1)
    end = gl.minimum(begin + cut.per_split, cut.blocks)
    return Work(item // pairs % cut.tiles, block, block, second, begin, end)


@gluon.jit
def _produce(ring, w_desc, cut, STAGES: gl.constexpr):
    at = 0
    for item in range(gl.program_id(0), cut.items, gl.num_programs(0)):
        at = produce(ring, w_desc, _work(item, cut), at, STAGES)


@gluon.jit
def _load(ring, x, cut, STAGES: gl.constexpr):
    wait_for_kernel_before()
    x_ptr, x_scales_ptr, x_stride = x
    lane, scale_lane = row_lanes(ring.x.shape[1])
    at = 0
    for item in range(gl.program_id(0), cut.items, gl.num_programs(0)):
        work = _work(item, cut)
        token = work.tile * ring.x.shape[1] + lane
        rows = (x_ptr + token.to(gl.int64) * x_stride, token < cut.tokens)
        if x_scales_ptr is None:
            at = quantise_rows(ring, rows, work, at, STAGES)
        else:
            token = work.tile * ring.x.shape[1] + scale_lane
            at = load_rows(ring, rows, (x_scales_ptr + token, token < cut.tokens), cut.tokens, work, at, STAGES)


@gluon.jit
def _multiply(ring, w_scales_ptr, out_ptr, cut, STAGES: gl.constexpr, mine: gl.constexpr):
    """Warpgroup `mine`, 0 or 1: its half of a tile's tokens."""
    at = 0
    for item in range(gl.program_id(0), cut.items, gl.num_programs(0)):
        work = _work(item, cut)
        first_0, first_1, second_0, second_1, at = multiply(ring, w_scales_ptr, work, at, cut.blocks, STAGES, mine)
        token = store_rows(ring, work.tile, mine, out_ptr.dtype.element_ty.primitive_bitwidth // 8)
        split = work.begin // cut.per_split
        rows_ptr = out_ptr + (split * cut.tokens + token).to(gl.int64) * cut.outputs
        exists = token < cut.tokens
        store(rows_ptr, exists, work.block * 128, cut.outputs, first_0)
        store(rows_ptr, exists, work.block * 128 + 64, cut.outputs, first_1)
        store(rows_ptr, exists, work.block * 128 + 128, cut.outputs, second_0)
        store(rows_ptr, exists, work.block * 128 + 192, cut.outputs, second_1)


@gluon.jit(do_not_specialize=["items", "tokens", "tiles", "blocks", "per_split"])
def _linear_kernel(
    x_ptr,
    x_scales_ptr,
    w_desc,
    w_scales_ptr,
    out_ptr,
    x_stride,
    items,
    tokens,
    tiles,
    outputs,
    blocks,
    per_split,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The weights begin to come before the kernel before has ended; what it has to do with comes after the activations,
    for which the loader waits. Sizes are no constants: one kernel serves all weights."""
    ring = make_ring(w_desc, ROWS, STAGES)
    x = (x_ptr, x_scales_ptr, x_stride)
    cut = _Cut(items, tokens, tiles, outputs, blocks, per_split)
    gl.warp_specialize(
        [
            (_multiply, (ring, w_scales_ptr, out_ptr, cut, STAGES, 0)),
            (_multiply, (ring, w_scales_ptr, out_ptr, cut, STAGES, 1)),
            (_produce, (ring, w_desc, cut, STAGES)),
            (_load, (ring, x, cut, STAGES)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )


def product(
    values_TI: torch.Tensor, scales_CT: torch.Tensor | None, weight: BlockFP8, rows: int, dtype: torch.dtype
) -> torch.Tensor:
    """Quantised activations @ weight^T in tiles of so many rows: [T, O] of `dtype`, or float32 terms [splits, T, O].
    Without scales the activations are bfloat16; rows of either may lie apart."""
    tokens, (outputs, inputs) = len(values_TI), weight.values.shape
    blocks, programs = inputs // BLOCK, multiprocessors(values_TI.device)
    tiles, pairs = -(-tokens // rows), -(-outputs // OUTPUTS)
    per_split = max(_LEAST_BLOCKS, -(-blocks // max(1, programs // (tiles * pairs))))
    splits = -(-blocks // per_split)
    shape, dtype = ((tokens, outputs), dtype) if splits == 1 else ((splits, tokens, outputs), torch.float32)
    out = torch.empty(shape, dtype=dtype, device=values_TI.device)
    items = splits * tiles * pairs
    _linear_kernel[(min(programs, items),)](
        values_TI,
        scales_CT,
        descriptor(weight.values),
        weight.scales,
        out,
        values_TI.stride(0),
        items,
        tokens,
        tiles,
        outputs,
        blocks,
        per_split,
        ROWS=rows,
        STAGES=stages_of(rows),
        num_warps=4,
        launch_pdl=early(tokens),
    )
    return out
