"""What the Gluon kernels share on Hopper: copies into shared memory, by TMA or by threads, and from it, by TMA; a
barrier of a partition's warps; and the wait for the kernel before.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Before Triton 3.9 they have the second names.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # descriptor, where, barrier, to
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global  # descriptor, where, from
gather = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # to, pointers, mask


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


def descriptor(tensor: torch.Tensor, *block: int) -> TensorDescriptor:
    """For copying blocks of this shape between a bfloat16 tensor and shared memory."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    return TensorDescriptor.from_tensor(tensor, list(block), layout)
