"""The values of attended latents for many rows of many heads, W_UV c, in Gluon.

A program has some columns of a head's values, whose weights stay in its shared memory for all its rows: they start
loading before the wait.

    producer, one warp   loads the weights, and pieces of tiles of rows by TMA into a ring
    two warpgroups       multiply, half of the columns each

An element is added along the latent in one accumulator, as in mla_values_triton.py, so its bits are the same.

Shape suffixes: R rows, H heads, L latent, V value dimensions.
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

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.hopper_gluon import copy_tile, descriptor, wait_for_kernel_before

_ROWS, _COLUMNS, _PIECE = 64, 128, 128  # of a tile: rows and columns of values; latent dimensions of a piece
_STAGES = gl.constexpr(5)
_LEAST = 192  # rows: with 128 the kernel for fewer is as fast


class _Shared(NamedTuple):
    """Shared memory."""

    w: gl.shared_memory_descriptor  # [pieces * 2, 1, columns / 2, piece]: halves of the columns
    x: gl.shared_memory_descriptor  # [stages, rows, piece]
    w_there: gl.shared_memory_descriptor  # [pieces] barriers
    filled: gl.shared_memory_descriptor  # [stages] barriers
    free: gl.shared_memory_descriptor  # [stages] barriers: by both warpgroups


@gluon.jit
def _produce(shared, w_desc, x_desc, num_rows):
    PIECES: gl.constexpr = shared.w.shape[0] // 2
    HALF: gl.constexpr = shared.w.shape[2]
    ROWS: gl.constexpr = shared.x.shape[1]
    PIECE: gl.constexpr = shared.x.shape[2]
    head = gl.program_id(0)
    column = gl.program_id(1) * (2 * HALF)
    for piece in gl.static_range(PIECES):
        there = shared.w_there.index(piece)
        mbarrier.expect(there, 2 * HALF * PIECE * 2)
        for half in gl.static_range(2):
            copy_tile(w_desc, [head, column + half * HALF, piece * PIECE], there, shared.w.index(piece * 2 + half))
    wait_for_kernel_before()
    at = 0
    for row in range(gl.program_id(2) * ROWS, num_rows, gl.num_programs(2) * ROWS):
        for piece in gl.static_range(PIECES):
            stage = at % _STAGES
            mbarrier.wait(shared.free.index(stage), (at // _STAGES & 1) ^ 1)
            mbarrier.expect(shared.filled.index(stage), ROWS * PIECE * 2)
            place = [head * num_rows + row, piece * PIECE]
            copy_tile(x_desc, place, shared.filled.index(stage), shared.x.index(stage))
            at += 1


@gluon.jit
def _multiply(shared, out_ptr, out_row, num_rows, VALUES: gl.constexpr, mine: gl.constexpr):
    """Warpgroup `mine`, 0 or 1."""
    PIECES: gl.constexpr = shared.w.shape[0] // 2
    HALF: gl.constexpr = shared.w.shape[2]
    ROWS: gl.constexpr = shared.x.shape[1]
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [1, 0])
    column = gl.program_id(0) * VALUES + gl.program_id(1) * (2 * HALF) + mine * HALF
    column += gl.arange(0, HALF, gl.SliceLayout(0, STORE))
    lane = gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    at = 0
    for first in range(gl.program_id(2) * ROWS, num_rows, gl.num_programs(2) * ROWS):
        acc = gl.zeros([HALF, ROWS], gl.float32, PRODUCT)
        for piece in gl.static_range(PIECES):
            stage = at % _STAGES
            mbarrier.wait(shared.w_there.index(piece), 0)
            mbarrier.wait(shared.filled.index(stage), at // _STAGES & 1)
            x = shared.x.index(stage).permute((1, 0))
            w = shared.w.index(piece * 2 + mine).reshape([HALF, shared.x.shape[2]])
            acc = warpgroup_mma(w, x, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(shared.free.index(stage), count=1)
            at += 1
        row = first + lane
        values = gl.convert_layout(gl.permute(acc.to(out_ptr.dtype.element_ty), (1, 0)), STORE)
        gl.store(
            out_ptr + row.to(gl.int64)[:, None] * out_row + column[None, :], values, mask=(row < num_rows)[:, None]
        )


@gluon.jit(do_not_specialize=["num_rows"])
def _values_kernel(w_desc, x_desc, out_ptr, num_rows, out_row, VALUES: gl.constexpr, PIECES: gl.constexpr):
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    HALF: gl.constexpr = w_desc.block_type.shape[1]
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    PIECE: gl.constexpr = x_desc.block_type.shape[1]
    shared = _Shared(
        w=gl.allocate_shared_memory(gl.bfloat16, [PIECES * 2, 1, HALF, PIECE], w_desc.layout),
        x=gl.allocate_shared_memory(gl.bfloat16, [_STAGES, ROWS, PIECE], x_desc.layout),
        w_there=gl.allocate_shared_memory(gl.int64, [PIECES, 1], BARRIER),
        filled=gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER),
        free=gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER),
    )
    for i in gl.static_range(PIECES):
        mbarrier.init(shared.w_there.index(i), count=1)
    for i in gl.static_range(_STAGES):
        mbarrier.init(shared.filled.index(i), count=1)
        mbarrier.init(shared.free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (shared, out_ptr, out_row, num_rows, VALUES, 0)),
            (_multiply, (shared, out_ptr, out_row, num_rows, VALUES, 1)),
            (_produce, (shared, w_desc, x_desc, num_rows)),
        ],
        [4, 1],
        [128, 24],
    )


def are_many(rows: int, w_uv_HVL: torch.Tensor) -> bool:
    """Whether `values_of_many` is the way to compute the values of this many rows."""
    heads, values, _ = w_uv_HVL.shape
    return rows >= _LEAST and heads >= 64 and values % _COLUMNS == 0


def values_of_many(latent_HRL: torch.Tensor, w_uv_HVL: torch.Tensor, out_RHV: torch.Tensor) -> None:
    """Values into `out_RHV`, contiguous per row. L, a multiple of 128, is contiguous in the weights."""
    (heads, rows, latent), values = latent_HRL.shape, w_uv_HVL.shape[1]
    blocks = values // _COLUMNS
    groups = max(1, multiprocessors(out_RHV.device) // (heads * blocks))
    _values_kernel[(heads, blocks, min(groups, triton.cdiv(rows, _ROWS)))](
        descriptor(w_uv_HVL, 1, _COLUMNS // 2, _PIECE),
        descriptor(latent_HRL.flatten(0, 1), _ROWS, _PIECE),
        out_RHV,
        rows,
        out_RHV.stride(0),
        VALUES=values,
        PIECES=latent // _PIECE,
        num_warps=4,
        launch_pdl=early(rows),
    )
