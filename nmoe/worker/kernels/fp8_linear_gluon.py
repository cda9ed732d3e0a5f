"""FP8 products by warps with roles of their own, in Gluon, for fp8_triton.py's `linear`; see fp8_warps_gluon.py.

Shape suffixes as in fp8_triton.py.
"""

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
    row_lanes,
    stages_of,
    store,
    store_rows,
    wait_for_kernel_before,
)

_OUTPUTS = gl.constexpr(OUTPUTS)
_LEAST_BLOCKS = 4  # of inputs, in a split


@gluon.jit
def _work(item, num_tiles, per_split, C: gl.constexpr, O: gl.constexpr):  # noqa: E741 as everywhere here
    """Piece of work `item`: two neighbouring blocks of outputs, a tile of tokens, a part of the inputs."""
    PAIRS: gl.constexpr = (O + _OUTPUTS - 1) // _OUTPUTS
    block = item % PAIRS * 2
    tile = item // PAIRS % num_tiles
    begin = item // PAIRS // num_tiles * per_split
    second = gl.minimum(block + 1, (O + 127) // 128 - 1)
    return Work(tile, block, block, second, begin, gl.minimum(begin + per_split, C))


@gluon.jit
def _produce(ring, w_desc, cut, C: gl.constexpr, O: gl.constexpr, STAGES: gl.constexpr):  # noqa: E741
    items, num_tiles, per_split = cut
    at = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        at = produce(ring, w_desc, _work(item, num_tiles, per_split, C, O), at, STAGES)


@gluon.jit
def _load(ring, x, tokens, cut, C: gl.constexpr, O: gl.constexpr, STAGES: gl.constexpr):  # noqa: E741
    wait_for_kernel_before()
    x_ptr, x_scales_ptr = x
    items, num_tiles, per_split = cut
    lane, scale_lane = row_lanes(ring.x.shape[1])
    at = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        work = _work(item, num_tiles, per_split, C, O)
        token = work.tile * ring.x.shape[1] + lane
        rows = (x_ptr + token.to(gl.int64) * (C * 128), token < tokens)
        token = work.tile * ring.x.shape[1] + scale_lane
        at = load_rows(ring, rows, (x_scales_ptr + token, token < tokens), tokens, work, at, STAGES)


@gluon.jit
def _multiply(
    ring,
    w_scales_ptr,
    out_ptr,
    tokens,
    cut,
    C: gl.constexpr,
    O: gl.constexpr,  # noqa: E741
    STAGES: gl.constexpr,
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1: its half of a tile's tokens."""
    items, num_tiles, per_split = cut
    at = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        work = _work(item, num_tiles, per_split, C, O)
        first_0, first_1, second_0, second_1, at = multiply(ring, w_scales_ptr, work, at, C, STAGES, mine)
        token = store_rows(ring, work.tile, mine, out_ptr.dtype.element_ty.primitive_bitwidth // 8)
        split = work.begin // per_split
        rows_ptr = out_ptr + (split * tokens + token).to(gl.int64) * O
        store(rows_ptr, token < tokens, work.block * 128, O, first_0)
        store(rows_ptr, token < tokens, work.block * 128 + 64, O, first_1)
        store(rows_ptr, token < tokens, work.block * 128 + 128, O, second_0)
        store(rows_ptr, token < tokens, work.block * 128 + 192, O, second_1)


@gluon.jit(do_not_specialize=["tokens", "items", "num_tiles", "per_split"])
def _linear_kernel(
    x_ptr,
    x_scales_ptr,
    w_desc,
    w_scales_ptr,
    out_ptr,
    tokens,
    items,
    num_tiles,
    per_split,
    C: gl.constexpr,
    O: gl.constexpr,  # noqa: E741
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The weights begin to come before the kernel before has ended; what it has to do with comes after the activations,
    for which the loader waits."""
    ring = make_ring(w_desc, ROWS, STAGES)
    x = (x_ptr, x_scales_ptr)
    cut = (items, num_tiles, per_split)
    gl.warp_specialize(
        [
            (_multiply, (ring, w_scales_ptr, out_ptr, tokens, cut, C, O, STAGES, 0)),
            (_multiply, (ring, w_scales_ptr, out_ptr, tokens, cut, C, O, STAGES, 1)),
            (_produce, (ring, w_desc, cut, C, O, STAGES)),
            (_load, (ring, x, tokens, cut, C, O, STAGES)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )


def product(
    values_TI: torch.Tensor, scales_CT: torch.Tensor, weight: BlockFP8, rows: int, dtype: torch.dtype
) -> torch.Tensor:
    """Quantised activations @ weight^T in tiles of so many rows: [T, O] of `dtype`, or float32 terms [splits, T, O]."""
    tokens, (outputs, inputs) = len(values_TI), weight.values.shape
    blocks, programs = inputs // BLOCK, multiprocessors(values_TI.device)
    num_tiles, pairs = -(-tokens // rows), -(-outputs // OUTPUTS)
    per_split = max(_LEAST_BLOCKS, -(-blocks // max(1, programs // (num_tiles * pairs))))
    splits = -(-blocks // per_split)
    shape, dtype = ((tokens, outputs), dtype) if splits == 1 else ((splits, tokens, outputs), torch.float32)
    out = torch.empty(shape, dtype=dtype, device=values_TI.device)
    items = splits * num_tiles * pairs
    _linear_kernel[(min(programs, items),)](
        values_TI,
        scales_CT,
        descriptor(weight.values),
        weight.scales,
        out,
        tokens,
        items,
        num_tiles,
        per_split,
        C=blocks,
        O=outputs,
        ROWS=rows,
        STAGES=stages_of(rows),
        num_warps=4,
        launch_pdl=early(tokens),
    )
    return out
