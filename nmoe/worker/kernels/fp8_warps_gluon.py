"""FP8 products by warps with roles of their own, in Gluon: what experts_fp8_gluon.py is made of.

A program computes tiles of 2 x 128 outputs for some rows of activations, one after the other. The weights are the wide
side of the matrix unit's products, the rows the narrow one.

    producer, one warp    weights, by TMA, into a ring of 128 inputs a stage
    loader, two warps     the rows and their scales, from wherever they lie, into the same ring
    two warpgroups        half of the rows each, 64 outputs at a time; while one applies scales, the other multiplies

The ring runs on from tile to tile, so the memory is busy while results are stored. The arithmetic is scaled_product's
in products_triton.py: 128 inputs from zero, times the scales, added in float32 in the order of the inputs.

Shape suffixes: N rows of a tile, C blocks of 128 inputs; layout S of products, outputs times rows.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

OUTPUTS = 256  # of a tile: two blocks of 128, which need not be neighbours
_LOADERS = gl.constexpr(2)  # warps
WORKER_WARPS = gl.constexpr([4, 1, 2])  # the second warpgroup, the producer, the loader
WORKER_REGISTERS = gl.constexpr([216, 56, 56])
_RING_BYTES = 216 << 10
_MOST_STAGES = 6
# Their names before Triton 3.9 are the second ones.
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_gather = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


class Ring(NamedTuple):
    """Shared memory of a program."""

    w: gl.shared_memory_descriptor  # [stages * 4, 64, 128]: halves of the first block, halves of the second
    x: gl.shared_memory_descriptor  # [stages, N, 128]
    scales: gl.shared_memory_descriptor  # [stages, N]: of the rows
    filled: gl.shared_memory_descriptor  # [stages] barriers
    free: gl.shared_memory_descriptor  # [stages] barriers


class Work(NamedTuple):
    """A program's piece of work: a tile of rows, and two blocks of outputs."""

    tile: gl.tensor
    block: gl.tensor  # the first one
    first: gl.tensor  # the same, counted over all weights
    second: gl.tensor


@gluon.jit
def make_ring(w_desc, ROWS: gl.constexpr, STAGES: gl.constexpr):
    """The shared memory of a program, ready for its warps."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    X: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 128], gl.float8e4nv)
    SCALES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    ring = Ring(
        w=gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 4, 64, 128], w_desc.layout),
        x=gl.allocate_shared_memory(gl.float8e4nv, [STAGES, ROWS, 128], X),
        scales=gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], SCALES),
        filled=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        free=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
    )
    for i in gl.static_range(STAGES):
        # The producer and every thread of the loader; both warpgroups.
        mbarrier.init(ring.filled.index(i), count=1 + 32 * _LOADERS)
        mbarrier.init(ring.free.index(i), count=2)
    fence_async_shared()
    return ring


@gluon.jit
def produce(ring, w_desc, work, at, C: gl.constexpr, STAGES: gl.constexpr):
    """Producer: a tile's weights; `at`: how many stages there were so far, given and returned."""
    for c in range(C):
        stage = at % STAGES
        mbarrier.wait(ring.free.index(stage), (at // STAGES & 1) ^ 1)
        filled = ring.filled.index(stage)
        mbarrier.expect(filled, 4 * 64 * 128)
        for i in gl.static_range(2):
            _copy(w_desc, [work.first * 128 + i * 64, c * 128], filled, ring.w.index(stage * 4 + i))
            _copy(w_desc, [work.second * 128 + i * 64, c * 128], filled, ring.w.index(stage * 4 + 2 + i))
        at += 1
    return at


@gluon.jit
def row_lanes(ROWS: gl.constexpr):
    """The loader's lanes over a tile's rows: for their values, and for their scales."""
    VALUES: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [_LOADERS, 1], [1, 0])
    SCALES: gl.constexpr = gl.BlockedLayout([1], [32], [_LOADERS], [0])
    return gl.arange(0, ROWS, gl.SliceLayout(1, VALUES)), gl.arange(0, ROWS, SCALES)


@gluon.jit
def load_rows(ring, rows, row_scales, block_stride, at, C: gl.constexpr, STAGES: gl.constexpr):
    """Loader: a tile's rows. `rows`: where the first block of each lies, and which exist; `row_scales` the same of the
    scales, which lie `block_stride` apart. `at` as in `produce`."""
    x_ptr, exists = rows
    scale_ptr, has_scale = row_scales
    lane = gl.arange(0, 128, gl.SliceLayout(0, gl.BlockedLayout([1, 16], [4, 8], [_LOADERS, 1], [1, 0])))
    values_ptr = x_ptr[:, None] + lane[None, :]
    mask = exists[:, None] & (lane >= 0)[None, :]
    for c in range(C):
        stage = at % STAGES
        mbarrier.wait(ring.free.index(stage), (at // STAGES & 1) ^ 1)
        _gather(ring.x.index(stage), values_ptr + c * 128, mask=mask)
        _gather(ring.scales.index(stage), scale_ptr, mask=has_scale)
        async_copy.mbarrier_arrive(ring.filled.index(stage), increment_count=False)
        scale_ptr += block_stride
        at += 1
    return at


@gluon.jit
def _add(ring, stage, part: gl.constexpr, x, scale, acc, product):
    """`acc` [64, N / 2] and 128 inputs of 64 outputs, `part` of the stage's four, times the rows `x` times `scale`.
    `product`: registers for the product, given and returned."""
    w = ring.w.index(stage * 4 + part)
    product = warpgroup_mma_wait(0, deps=[warpgroup_mma(w, x, product, use_acc=False, is_async=True)])
    # The second wait waits for nothing: it keeps the addition before the next product, which takes the same registers.
    return warpgroup_mma_wait(0, deps=[acc + product * scale[None, :], product])


@gluon.jit
def multiply(ring, w_scales_ptr, work, at, C: gl.constexpr, STAGES: gl.constexpr, mine: gl.constexpr):
    """Warpgroup `mine`: both blocks' outputs for its half of the rows, as four of float32 [64, N / 2]. `at` as in
    `produce`."""
    HALF: gl.constexpr = ring.x.shape[1] // 2
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    first_ptr = w_scales_ptr + work.first * C
    second_ptr = w_scales_ptr + work.second * C
    first_0 = gl.zeros([64, HALF], gl.float32, S)
    first_1 = gl.zeros([64, HALF], gl.float32, S)
    second_0 = gl.zeros([64, HALF], gl.float32, S)
    second_1 = gl.zeros([64, HALF], gl.float32, S)
    product = gl.zeros([64, HALF], gl.float32, S)
    next_first = gl.load(first_ptr)
    next_second = gl.load(second_ptr)
    for c in range(C):
        stage = at % STAGES
        first_scale = next_first
        second_scale = next_second
        ahead = gl.minimum(c + 1, C - 1)
        next_first = gl.load(first_ptr + ahead)
        next_second = gl.load(second_ptr + ahead)
        mbarrier.wait(ring.filled.index(stage), at // STAGES & 1)
        fence_async_shared()  # the loader's copies are not TMA's
        x = ring.x.index(stage).slice(mine * HALF, HALF).permute((1, 0))
        scales = ring.scales.index(stage).slice(mine * HALF, HALF).load(gl.SliceLayout(0, S))
        scale = scales * first_scale
        first_0, product = _add(ring, stage, 0, x, scale, first_0, product)
        first_1, product = _add(ring, stage, 1, x, scale, first_1, product)
        scale = scales * second_scale
        second_0, product = _add(ring, stage, 2, x, scale, second_0, product)
        second_1, product = _add(ring, stage, 3, x, scale, second_1, product)
        mbarrier.arrive(ring.free.index(stage), count=1)
        at += 1
    return first_0, first_1, second_0, second_1, at


@gluon.jit
def store(out_ptr, exists, column, columns, values):
    """64 outputs of a warpgroup's rows, `values` [64, N / 2], from `column` on where they are below `columns`, in the
    rows that begin at `out_ptr` and exist; both have the layout `store_rows` gives."""
    LAYOUT: gl.constexpr = out_ptr.type.layout.parent
    lane = column + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    values = gl.convert_layout(gl.permute(values.to(out_ptr.dtype.element_ty), (1, 0)), LAYOUT)
    gl.store(out_ptr[:, None] + lane[None, :], values, mask=exists[:, None] & (lane < columns)[None, :])


@gluon.jit
def store_rows(ring, tile, mine: gl.constexpr, BYTES: gl.constexpr):
    """A warpgroup's rows of a tile, as it stores values of so many bytes."""
    HALF: gl.constexpr = ring.x.shape[1] // 2
    PER_ROW: gl.constexpr = 64 * BYTES // 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16 // BYTES], [32 // PER_ROW, PER_ROW], [4, 1], [1, 0])
    return (2 * tile + mine) * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))


@gluon.jit
def wait_for_kernel_before():
    """`gdc_wait` and `gdc_launch_dependents`; see early.py."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; // dummy $0",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


def stages_of(rows: int) -> int:
    """How many stages a ring for tiles of so many rows has."""
    return min(_MOST_STAGES, _RING_BYTES // ((OUTPUTS + rows) * 128 + rows * 4))


def descriptor(weight_OI: torch.Tensor) -> TensorDescriptor:
    """For copies of one warpgroup's part of a block, of all weights' outputs."""
    layout = gl.NVMMASharedLayout.get_default_for([64, 128], gl.float8e4nv)
    return TensorDescriptor.from_tensor(weight_OI, [64, 128], layout)
