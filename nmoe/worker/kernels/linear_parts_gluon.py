"""x @ weight^T in bfloat16 for a moderate number of tokens, with the inputs divided among programs, in Gluon: for
products added to the residual, where the next norm adds the parts.

A program has 64 outputs and 512 inputs, whose weights are loading before the previous kernel has finished. cuBLAS
gives each tile all inputs, so it has too few programs to saturate the memory.

Shape suffixes: T tokens, O outputs, I inputs, P parts; of a program N tokens.
"""

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

from nmoe.worker.kernels.device import FEW_TOKENS, multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.hopper_gluon import copy_tile, descriptor, wait_for_kernel_before
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.warps_gluon import store, store_rows

_OUTPUTS, _SPAN, _DEPTH = 64, 512, 64
_STEPS = gl.constexpr(_SPAN // _DEPTH)
_MOST_TOKENS = 128  # every program reads its inputs of all tokens; beyond this, cuBLAS's larger tiles read less


@gluon.jit(do_not_specialize=["tokens"])
def _part_kernel(
    x_desc,
    w_desc,
    out_ptr,
    tokens,
    O: gl.constexpr,  # noqa: E741
    PARTS: gl.constexpr,
    KEPT: gl.constexpr,
):
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    OUTPUTS: gl.constexpr = w_desc.block_type.shape[0]
    DEPTH: gl.constexpr = w_desc.block_type.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    w = gl.allocate_shared_memory(w_desc.dtype, [_STEPS, OUTPUTS, DEPTH], w_desc.layout)
    x = gl.allocate_shared_memory(x_desc.dtype, [_STEPS, ROWS, DEPTH], x_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [_STEPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_STEPS):
        mbarrier.init(filled.index(i), count=1)
    fence_async_shared()
    output = gl.program_id(0) * OUTPUTS
    first = gl.program_id(1) * (_STEPS * DEPTH)
    for i in gl.static_range(_STEPS):
        mbarrier.expect(filled.index(i), (OUTPUTS + ROWS) * DEPTH * 2)
        copy_tile(w_desc, [output, first + i * DEPTH], filled.index(i), w.index(i))
    wait_for_kernel_before()
    for i in gl.static_range(_STEPS):
        copy_tile(x_desc, [0, first + i * DEPTH], filled.index(i), x.index(i))
    sums = gl.zeros([OUTPUTS, ROWS], gl.float32, S)
    for i in gl.static_range(_STEPS):
        mbarrier.wait(filled.index(i), 0)
        sums = warpgroup_mma(w.index(i), x.index(i).permute((1, 0)), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[sums])
    token = store_rows(0, ROWS, 2)
    row_ptr = out_ptr + (token * PARTS + gl.program_id(1)).to(gl.int64) * O
    store(row_ptr, token < tokens, output, O, sums, KEPT)


def parts_of(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor | None:
    """The product's parts [T, P, O], to be added in float32; None if another method is faster."""
    tokens, (outputs, inputs) = len(x_TI), weight_OI.shape
    if not FEW_TOKENS < tokens <= _MOST_TOKENS or outputs % _OUTPUTS or inputs % _SPAN:
        return None
    blocks, parts = outputs // _OUTPUTS, inputs // _SPAN
    if blocks * parts > multiprocessors(x_TI.device):
        return None
    out_TPO = x_TI.new_empty(tokens, parts, outputs)
    _part_kernel[(blocks, parts)](
        descriptor(x_TI, max(32, triton.next_power_of_2(tokens)), _DEPTH),
        descriptor(weight_OI, _OUTPUTS, _DEPTH),
        out_TPO,
        tokens,
        O=outputs,
        PARTS=parts,
        KEPT=kept(tokens),
        num_warps=4,
        launch_pdl=early(tokens),
    )
    return out_TPO
