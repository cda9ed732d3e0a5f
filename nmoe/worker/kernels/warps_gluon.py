"""The experts' products with specialised warps, in Gluon: the building blocks of experts_gluon.py and
experts_fp8_gluon.py.

A program computes tiles of 2 x 128 outputs for some rows of activations, one after another. The weights are the wide
side of the tensor cores' products, the rows the narrow side.

    producer, one warp    loads weights by TMA into a ring of 128 bytes of inputs per stage: 64 in bfloat16, 128 in FP8
    loader, two warps     loads the rows, in FP8 with their scales, from wherever they are, into the same ring
    two warpgroups        compute the products, half of the tile each

The ring carries over from tile to tile, so the memory stays busy while results are stored.

Shape suffixes: N rows of a tile, I inputs of a stage, C stages of a tile.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.expert_weights import TILE
from nmoe.worker.kernels.hopper_gluon import copy_tile, gather

OUTPUTS = 256  # per tile: two blocks of 128, not necessarily adjacent
LOADERS = gl.constexpr(2)  # warps
WORKER_WARPS = gl.constexpr([4, 1, 2])  # the second warpgroup, the producer, the loader


class Form(NamedTuple):
    """A program's share of a multiprocessor, for tiles of `rows` rows. Registers are per thread: at the start, when all
    384 have the same; for the warpgroups, which take some from the others; for producer and loader. Weights are
    requested for `together` stages at once, so that the memory reads adjacent bytes together. `left` multiprocessors
    are left to the shared experts."""

    rows: int
    stages: int
    registers: int
    worker_registers: int
    other_registers: int
    together: int = 1
    left: int = 0

    def programs(self, pieces: int, device: torch.device) -> int:
        """How many programs to launch for at most this many pieces of work."""
        return min(pieces, multiprocessors(device) - self.left)

    def options(self) -> dict[str, int]:
        """Options for launching a kernel."""
        registers = {"WORKER_REGISTERS": self.worker_registers, "OTHER_REGISTERS": self.other_registers}
        ring = {"ROWS": self.rows, "STAGES": self.stages, "TOGETHER": self.together}
        return {**ring, **registers, "maxnreg": self.registers, "num_warps": 4}


class Ring(NamedTuple):
    """A program's shared memory."""

    w: gl.shared_memory_descriptor  # [stages * 4, 64, I]: halves of the first block, halves of the second
    x: gl.shared_memory_descriptor  # [stages, N, I]
    filled: gl.shared_memory_descriptor  # [stages] barriers
    free: gl.shared_memory_descriptor  # [stages] barriers


@gluon.jit
def make_ring(w_desc, ROWS: gl.constexpr, STAGES: gl.constexpr):
    """A program's shared memory, initialised for its warps; `w_desc` is from `descriptor`."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    INPUTS: gl.constexpr = w_desc.block_type.shape[1]
    X: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, INPUTS], w_desc.dtype)
    ring = Ring(
        w=gl.allocate_shared_memory(w_desc.dtype, [STAGES * 4, 64, INPUTS], w_desc.layout),
        x=gl.allocate_shared_memory(w_desc.dtype, [STAGES, ROWS, INPUTS], X),
        filled=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        free=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
    )
    for i in gl.static_range(STAGES):
        # Arrivals from the producer and every thread of the loader; from both warpgroups.
        mbarrier.init(ring.filled.index(i), count=1 + 32 * LOADERS)
        mbarrier.init(ring.free.index(i), count=2)
    fence_async_shared()
    return ring


@gluon.jit
def make_scales(ROWS: gl.constexpr, STAGES: gl.constexpr):
    """The additional part of an FP8 program's ring: the rows' scales, [stages, N]."""
    return gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))


@gluon.jit
def produce(
    ring, w_desc, blocks, at, C: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr
):
    """Producer: load the weights of two blocks of outputs, numbered as they are stored: in groups of GROUP outputs
    (expert_weights.py), or, if that is 0, in rows. C is a multiple of TOGETHER. `at` is the number of stages so far,
    passed in and returned."""
    first, second = blocks
    for c in range(0, C, TOGETHER):
        for i in gl.static_range(TOGETHER):
            mbarrier.wait(ring.free.index((at + i) % STAGES), ((at + i) // STAGES & 1) ^ 1)
            mbarrier.expect(ring.filled.index((at + i) % STAGES), 4 * 64 * 128)
        for part in gl.static_range(4):
            if part < 2:
                output = first * 128 + part * 64
            else:
                output = second * 128 + (part - 2) * 64
            for i in gl.static_range(TOGETHER):
                stage = (at + i) % STAGES
                if GROUP > 0:
                    where = [(output // GROUP * C + c + i) * GROUP + output % GROUP, 0]
                else:
                    where = [output, (c + i) * ring.w.shape[2]]
                copy_tile(w_desc, where, ring.filled.index(stage), ring.w.index(stage * 4 + part))
        at += TOGETHER
    return at


@gluon.jit
def row_lanes(ring):
    """The loader's lanes over a tile's rows: for their values, and for their scales."""
    ROWS: gl.constexpr = ring.x.shape[1]
    EACH: gl.constexpr = ring.x.shape[2] // 8
    VALUES: gl.constexpr = gl.BlockedLayout([1, EACH], [4, 8], [LOADERS, 1], [1, 0])
    SCALES: gl.constexpr = gl.BlockedLayout([1], [32], [LOADERS], [0])
    return gl.arange(0, ROWS, gl.SliceLayout(1, VALUES)), gl.arange(0, ROWS, SCALES)


@gluon.jit
def load_rows(ring, scales, rows, row_scales, block_stride, at, C: gl.constexpr, STAGES: gl.constexpr):
    """Loader: load a tile's rows. `rows`: pointers to each row's first inputs, and which rows exist; `row_scales`: the
    same for their scales in FP8, which are `block_stride` apart; in bfloat16 `scales` is None. `at` as in `produce`."""
    INPUTS: gl.constexpr = ring.x.shape[2]
    x_ptr, exists = rows
    scale_ptr, has_scale = row_scales
    lane = gl.arange(0, INPUTS, gl.SliceLayout(0, x_ptr.type.layout.parent))
    values_ptr = x_ptr[:, None] + lane[None, :]
    mask = exists[:, None] & (lane >= 0)[None, :]
    for c in range(C):
        stage = at % STAGES
        mbarrier.wait(ring.free.index(stage), (at // STAGES & 1) ^ 1)
        gather(ring.x.index(stage), values_ptr + c * INPUTS, mask=mask)
        if scales is not None:
            gather(scales.index(stage), scale_ptr, mask=has_scale)
            scale_ptr += block_stride
        async_copy.mbarrier_arrive(ring.filled.index(stage), increment_count=False)
        at += 1
    return at


@gluon.jit
def store(out_ptr, exists, column, columns, values, KEPT: gl.constexpr):
    """Store 64 outputs of some rows, `values` [64, rows], to columns from `column` on that are below `columns`, in the
    rows at `out_ptr` that exist; both are in the layout of `store_rows`."""
    LAYOUT: gl.constexpr = out_ptr.type.layout.parent
    lane = column + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    values = gl.convert_layout(gl.permute(values.to(out_ptr.dtype.element_ty), (1, 0)), LAYOUT)
    mask = exists[:, None] & (lane < columns)[None, :]
    gl.store(out_ptr[:, None] + lane[None, :], values, mask=mask, eviction_policy=KEPT)


@gluon.jit
def store_rows(first, ROWS: gl.constexpr, BYTES: gl.constexpr):
    """ROWS rows from `first` on, in the layout in which a warpgroup stores values of BYTES bytes."""
    PER_ROW: gl.constexpr = 64 * BYTES // 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16 // BYTES], [32 // PER_ROW, PER_ROW], [4, 1], [1, 0])
    return first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))


def descriptor(rows: torch.Tensor) -> TensorDescriptor:
    """For copying half a block of outputs, and a stage's inputs, from a weight [O, I] or the experts' `stored_rows`."""
    fp8 = rows.dtype == torch.float8_e4m3fn
    block = [TILE, 128 if fp8 else 64]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv if fp8 else gl.bfloat16)
    return TensorDescriptor.from_tensor(rows, block, layout)
