"""Absorbed latent attention of the exact class for prefills: warps with roles of their own, in Gluon.

The arithmetic of a query is mla_exact_triton.py's. A program takes the queries of a few neighbouring positions (64
rows: heads times queries), which begin at a multiple of their number, so that all see the same tiles and spans; what
its warps do is in mla_exact_warps_gluon.py. Groups of queries go to the programs in turn, the last of a row first.

What there is is read on the device, as in mla_prefill_triton.py: a launch for the most that a step can have serves
every smaller one. A row with queries and no context is padding: its output is zero.

Shape suffixes: T tokens, R rows of the step, H heads, L latent, P rope dimensions, Q a query's, C = L + P, K rows of
the cache, B pages of a row (padded).
"""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe.worker.chunks import TILE as QUERY_TILE
from nmoe.worker.chunks import Chunks
from nmoe.worker.kernels.mla_decode_triton import multiprocessors
from nmoe.worker.kernels.mla_exact_triton import ROWS, TILE, form_of
from nmoe.worker.kernels.mla_exact_warps_gluon import Shared, attend, produce

_M, _TILE = gl.constexpr(ROWS), gl.constexpr(TILE)
_SHARED_BYTES = 227 << 10  # of a multiprocessor of Hopper
_OTHER_BYTES = 10_992  # of these, what is neither queries nor ring


@gluon.jit(do_not_specialize_on_alignment=["pages_ptr", "starts_ptr", "firsts_ptr", "tile_row_ptr", "tile_start_ptr"])
def _prefill_kernel(
    latent_desc,
    rope_desc,
    q_desc,
    q_ptr,
    pages_ptr,
    scratch_ptr,
    out_ptr,
    starts_ptr,
    firsts_ptr,
    tile_row_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    max_pages,
    scale_log2,
    Q_STRIDE: gl.constexpr,
    NOPE: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_H: gl.constexpr,
    PER_TILE: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
):
    QUARTER: gl.constexpr = latent_desc.block_type.shape[1]
    ROPE: gl.constexpr = rope_desc.block_type.shape[1]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_M, _TILE], gl.bfloat16)
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_TILE, 8], gl.bfloat16)
    Q_ROPE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_M, ROPE], gl.bfloat16)
    REGISTERS: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0])
    shared = Shared(
        q_latent=gl.allocate_shared_memory(gl.bfloat16, [4, _M, QUARTER], q_desc.layout),
        q_rope=gl.allocate_shared_memory(gl.bfloat16, [_M, ROPE], Q_ROPE),
        k_latent=gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, _TILE, QUARTER], latent_desc.layout),
        k_rope=gl.allocate_shared_memory(gl.bfloat16, [STAGES, _TILE, ROPE], rope_desc.layout),
        weights=gl.allocate_shared_memory(gl.bfloat16, [2, _M, _TILE], WEIGHTS),
        ones=gl.allocate_shared_memory(gl.bfloat16, [_TILE, 8], ONES),
        factors=gl.allocate_shared_memory(gl.float32, [2, _M], ROWS),
        peaks=gl.allocate_shared_memory(gl.float32, [2, _M], ROWS),
        merging=gl.allocate_shared_memory(gl.float32, [3, _M], ROWS),
        q_bars=gl.allocate_shared_memory(gl.int64, [3, 1], BARRIER),
        filled=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        free=gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        weighed=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        weights_free=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        merge_bars=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
    )
    # What both warpgroups use is free when both say so.
    for i in gl.static_range(2):
        mbarrier.init(shared.q_bars.index(i), count=1 + i)
        mbarrier.init(shared.merge_bars.index(i), count=1 + i)
        mbarrier.init(shared.weighed.index(i), count=1)
        mbarrier.init(shared.weights_free.index(i), count=1)
    mbarrier.init(shared.q_bars.index(2), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(shared.filled.index(i), count=1)
        mbarrier.init(shared.free.index(i), count=2)
    shared.ones.store(gl.full([_TILE, 8], 1.0, gl.bfloat16, REGISTERS))
    fence_async_shared()
    program = gl.program_id(0) * gl.num_programs(1) + gl.program_id(1)
    merged_ptr = scratch_ptr + program.to(gl.int64) * (_M * 4 * QUARTER)
    cut = (starts_ptr, firsts_ptr, tile_row_ptr, tile_start_ptr, num_tiles_ptr)
    gl.warp_specialize(
        [
            (
                attend,
                (
                    shared,
                    cut,
                    q_ptr,
                    merged_ptr,
                    out_ptr,
                    scale_log2,
                    Q_STRIDE,
                    NOPE,
                    HEADS,
                    BLOCK_H,
                    PER_TILE,
                    STAGES,
                    0,
                ),
            ),
            (
                attend,
                (
                    shared,
                    cut,
                    q_ptr,
                    merged_ptr,
                    out_ptr,
                    scale_log2,
                    Q_STRIDE,
                    NOPE,
                    HEADS,
                    BLOCK_H,
                    PER_TILE,
                    STAGES,
                    1,
                ),
            ),
            (
                produce,
                (
                    shared,
                    cut,
                    latent_desc,
                    rope_desc,
                    q_desc,
                    pages_ptr,
                    max_pages,
                    HEADS,
                    BLOCK_H,
                    PER_TILE,
                    PAGE,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [232, 24],
    )


def exact_prefill(
    q_latent_THL: torch.Tensor,
    q_THQ: torch.Tensor,
    rows_KC: torch.Tensor,
    pages_RB: torch.Tensor,
    chunks: Chunks,
    page_size: int,
    scale: float,
    out_THL: torch.Tensor,
) -> None:
    """Attended latents of the chunks' queries into `out_THL`."""
    heads, latent = q_latent_THL.shape[1:]
    rope, form = rows_KC.shape[1] - latent, form_of(heads)
    blocks, quarter = heads // form.heads, latent // 4
    programs = max(1, multiprocessors(rows_KC.device) // blocks)
    scratch = torch.empty(programs * blocks * ROWS, latent, dtype=torch.float32, device=rows_KC.device)
    _prefill_kernel[(programs, blocks)](
        _descriptor(rows_KC, TILE, quarter),
        _descriptor(rows_KC, TILE, rope),
        _descriptor(q_latent_THL.flatten(0, 1), ROWS, quarter),
        q_THQ,
        pages_RB,
        scratch,
        out_THL,
        chunks.starts,
        chunks.firsts,
        chunks.tile_row,
        chunks.tile_start,
        chunks.num_tiles,
        pages_RB.stride(0),
        scale * math.log2(math.e),
        Q_STRIDE=q_THQ.stride(0),
        NOPE=q_THQ.shape[2] - rope,
        HEADS=heads,
        BLOCK_H=form.heads,
        PER_TILE=QUERY_TILE,
        PAGE=page_size,
        STAGES=stages_of(rows_KC.shape[1]),
        num_warps=4,
        enable_fp_fusion=False,
    )


def stages_of(width: int) -> int:
    """How many tiles of cache rows of such a width the ring holds."""
    return min(8, (_SHARED_BYTES - _OTHER_BYTES - ROWS * width * 2) // (TILE * width * 2))


def _descriptor(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)
