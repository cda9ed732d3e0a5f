"""Products in FP8 on the GPU with specialised warps, in Gluon: for more than a few tokens, where cuBLAS is not faster;
see fp8_triton.py.

    producer, one warp    loads weights, tokens and their scales by TMA into a ring of 128 inputs per stage
    two warpgroups        compute the products, each for half of a tile's tokens; with few tokens, the weights are the
                          wide side of the tensor cores' products

Programs compute one tile after another. The ring carries over from tile to tile, so the memory stays busy while results
are stored, and its first weights are loading before the previous kernel has finished. The arithmetic is that of
scaled_product in products_triton.py: 128 inputs summed from zero, times the scales, added in float32 in input order.

Shape suffixes: T tokens, O outputs, I inputs, C blocks of I; of a tile N tokens; layout S of products.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.fp8 import BLOCK, BlockFP8, Quantised
from nmoe.worker.kernels.hopper_gluon import copy_tile, wait_for_kernel_before
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.warps_gluon import store, store_rows


class _Ring(NamedTuple):
    """A program's shared memory."""

    w: gl.shared_memory_descriptor  # [stages, O, 128]
    x: gl.shared_memory_descriptor  # [stages, N, 128]
    scales: gl.shared_memory_descriptor  # [stages, N]
    filled: gl.shared_memory_descriptor  # [stages] barriers
    free: gl.shared_memory_descriptor  # [stages] barriers


class _Piece(NamedTuple):
    """A program's piece of work: a tile, and the range of its input blocks."""

    row: gl.tensor  # the first token
    block: gl.tensor  # of outputs
    split: gl.tensor
    first: gl.tensor  # first block of inputs
    steps: gl.tensor


@gluon.jit
def _make_ring(w_desc, x_desc, scales_desc, STAGES: gl.constexpr):
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    OUTPUTS: gl.constexpr = w_desc.block_type.shape[0]
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    ring = _Ring(
        w=gl.allocate_shared_memory(w_desc.dtype, [STAGES, OUTPUTS, 128], w_desc.layout),
        x=gl.allocate_shared_memory(x_desc.dtype, [STAGES, ROWS, 128], x_desc.layout),
        scales=gl.allocate_shared_memory(gl.float32, [STAGES, scales_desc.block_type.shape[0]], scales_desc.layout),
        filled=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        free=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.filled.index(i), count=1)
        mbarrier.init(ring.free.index(i), count=2)
    fence_async_shared()
    return ring


@gluon.jit
def _piece(item, row_tiles, C: gl.constexpr, SPLITS: gl.constexpr, PER_SPLIT: gl.constexpr, ROWS: gl.constexpr):
    split = item % SPLITS
    row = item // SPLITS % row_tiles * ROWS
    block = item // SPLITS // row_tiles
    first = split * PER_SPLIT
    return _Piece(row, block, split, first, gl.minimum(PER_SPLIT, C - first))


@gluon.jit
def _produce(
    ring,
    descs,
    scales_stride,
    row_tiles,
    items,
    C: gl.constexpr,
    SPLITS: gl.constexpr,
    PER_SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Producer. It waits for the previous kernel; the other warps wait for its data."""
    w_desc, x_desc, scales_desc = descs
    ROWS: gl.constexpr = ring.x.shape[1]
    OUTPUTS: gl.constexpr = ring.w.shape[1]
    BYTES: gl.constexpr = (OUTPUTS + ROWS) * 128 + ring.scales.shape[1] * 4
    item = gl.program_id(0)
    piece = _piece(item, row_tiles, C, SPLITS, PER_SPLIT, ROWS)
    ahead = gl.minimum(piece.steps, STAGES)
    for i in range(ahead):
        mbarrier.expect(ring.filled.index(i), BYTES)
        copy_tile(w_desc, [piece.block * OUTPUTS, (piece.first + i) * 128], ring.filled.index(i), ring.w.index(i))
    wait_for_kernel_before()
    at = 0
    while item < items:
        piece = _piece(item, row_tiles, C, SPLITS, PER_SPLIT, ROWS)
        for c in range(piece.first, piece.first + piece.steps):
            stage = at % STAGES
            filled = ring.filled.index(stage)
            if at >= ahead:
                mbarrier.wait(ring.free.index(stage), (at // STAGES & 1) ^ 1)
                mbarrier.expect(filled, BYTES)
                copy_tile(w_desc, [piece.block * OUTPUTS, c * 128], filled, ring.w.index(stage))
            copy_tile(x_desc, [piece.row, c * 128], filled, ring.x.index(stage))
            copy_tile(scales_desc, [c * scales_stride + piece.row], filled, ring.scales.index(stage))
            at += 1
        item += gl.num_programs(0)


@gluon.jit
def _multiply(ring, w_scales_ptr, piece, at, C: gl.constexpr, STAGES: gl.constexpr, mine: gl.constexpr):
    """Warpgroup `mine`: the tile's outputs for its half of the tokens, as [64 outputs, N / 2] or, for 128 tokens, as
    [64 tokens, outputs]. `at` is the number of stages so far, passed in and returned."""
    OUTPUTS: gl.constexpr = ring.w.shape[1]
    HALF: gl.constexpr = ring.x.shape[1] // 2
    NARROW: gl.constexpr = OUTPUTS if HALF == 64 else HALF
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 32])
    w_scales_ptr += piece.block * OUTPUTS // 128 * C
    last = piece.first + piece.steps - 1
    acc = gl.zeros([64, NARROW], gl.float32, S)
    product = gl.zeros([64, NARROW], gl.float32, S)
    next_scale = gl.load(w_scales_ptr + piece.first)
    for c in range(piece.first, piece.first + piece.steps):
        stage = at % STAGES
        w_scale = next_scale
        next_scale = gl.load(w_scales_ptr + gl.minimum(c + 1, last))
        mbarrier.wait(ring.filled.index(stage), at // STAGES & 1)
        w = ring.w.index(stage)
        x = ring.x.index(stage).slice(mine * HALF, HALF)
        scales = ring.scales.index(stage).slice(mine * HALF, HALF)
        if HALF == 64:
            scale = (scales.load(gl.SliceLayout(1, S)) * w_scale)[:, None]
            product = warpgroup_mma(x, w.permute((1, 0)), product, use_acc=False, is_async=True)
        else:
            scale = (scales.load(gl.SliceLayout(0, S)) * w_scale)[None, :]
            product = warpgroup_mma(w, x.permute((1, 0)), product, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(ring.free.index(stage), count=1)
        # The second wait never blocks: it keeps the sum ahead of the next product, which reuses these registers.
        acc, product = warpgroup_mma_wait(0, deps=[acc + product * scale, product])
        at += 1
    return acc, at


@gluon.jit
def _store_many(out_ptr, tokens, piece, row, acc, O: gl.constexpr):  # noqa: E741 as everywhere here
    """Store 64 tokens, starting at `row`."""
    S: gl.constexpr = acc.type.layout
    token = row + gl.arange(0, 64, gl.SliceLayout(1, S))
    output = piece.block * acc.shape[1] + gl.arange(0, acc.shape[1], gl.SliceLayout(0, S))
    at = out_ptr + (piece.split * tokens + token).to(gl.int64)[:, None] * O + output[None, :]
    gl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (output < O)[None, :])


@gluon.jit
def _compute(
    ring,
    w_scales_ptr,
    out_ptr,
    sizes,
    C: gl.constexpr,
    O: gl.constexpr,  # noqa: E741
    SPLITS: gl.constexpr,
    PER_SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1. `sizes`: numbers of tokens, of tiles of tokens, and of pieces of work."""
    tokens, row_tiles, items = sizes
    ROWS: gl.constexpr = ring.x.shape[1]
    BYTES: gl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth // 8
    at = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        piece = _piece(item, row_tiles, C, SPLITS, PER_SPLIT, ROWS)
        acc, at = _multiply(ring, w_scales_ptr, piece, at, C, STAGES, mine)
        row = piece.row + mine * (ROWS // 2)
        if ROWS == 128:
            _store_many(out_ptr, tokens, piece, row, acc, O)
        else:
            token = store_rows(row, ROWS // 2, BYTES)
            rows_ptr = out_ptr + (piece.split * tokens + token).to(gl.int64) * O
            store(rows_ptr, token < tokens, piece.block * 64, O, acc, KEPT)


@gluon.jit(do_not_specialize=["tokens", "scales_stride", "row_tiles", "items"])
def _linear_kernel(
    x_desc,
    scales_desc,
    w_desc,
    w_scales_ptr,
    out_ptr,
    tokens,
    scales_stride,
    row_tiles,
    items,
    O: gl.constexpr,  # noqa: E741
    C: gl.constexpr,
    SPLITS: gl.constexpr,
    PER_SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    """x @ w^T, or its terms, one per split, [SPLITS, T, O]."""
    ring = _make_ring(w_desc, x_desc, scales_desc, STAGES)
    descs = (w_desc, x_desc, scales_desc)
    sizes = (tokens, row_tiles, items)
    gl.warp_specialize(
        [
            (_compute, (ring, w_scales_ptr, out_ptr, sizes, C, O, SPLITS, PER_SPLIT, STAGES, KEPT, 0)),
            (_compute, (ring, w_scales_ptr, out_ptr, sizes, C, O, SPLITS, PER_SPLIT, STAGES, KEPT, 1)),
            (_produce, (ring, descs, scales_stride, row_tiles, items, C, SPLITS, PER_SPLIT, STAGES)),
        ],
        [4, 1],
        [WORKER_REGISTERS, OTHER_REGISTERS],
    )


class Form(NamedTuple):
    """A tile, its stages of 128 inputs in the ring, and registers per thread; see `Form` in warps_gluon.py."""

    outputs: int
    rows: int
    stages: int
    registers: int
    worker_registers: int
    other_registers: int

    def tiles(self, tokens: int, outputs: int) -> int:
        """The number of tiles."""
        return -(-tokens // self.rows) * -(-outputs // self.outputs)


# benchmarks/LOG.md has timings of these and other forms.
SOME = Form(64, 64, 12, 88, 104, 40)
MANY = Form(128, 128, 6, 152, 200, 40)


def _layout(rows: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, BLOCK], gl.float8e4nv)


def linear_by_warps(x: Quantised, weight: BlockFP8, out: torch.Tensor, form: Form, per_split: int) -> None:
    """x @ weight^T into `out`, [T, O] of any dtype; or, if `per_split` is less than the number of input blocks, each
    split's product, float32 [splits, T, O]. T is not 0, I is a multiple of 128, O is arbitrary."""
    tokens, (outputs, inputs) = len(x.x_TI), weight.values.shape
    splits = triton.cdiv(inputs // BLOCK, per_split)
    items = form.tiles(tokens, outputs) * splits
    in_a_row = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    _linear_kernel[(min(items, multiprocessors(out.device)),)](
        TensorDescriptor.from_tensor(x.values_PI, [form.rows, BLOCK], _layout(form.rows)),
        TensorDescriptor.from_tensor(x.scales_CP.view(-1), [form.rows], in_a_row),
        TensorDescriptor.from_tensor(weight.values, [form.outputs, BLOCK], _layout(form.outputs)),
        weight.scales,
        out,
        tokens,
        x.scales_CP.stride(0),
        triton.cdiv(tokens, form.rows),
        items,
        O=outputs,
        C=inputs // BLOCK,
        SPLITS=splits,
        PER_SPLIT=per_split,
        STAGES=form.stages,
        KEPT=kept(tokens),
        WORKER_REGISTERS=form.worker_registers,
        OTHER_REGISTERS=form.other_registers,
        num_warps=4,
        maxnreg=form.registers,
        launch_pdl=early(tokens),
    )
