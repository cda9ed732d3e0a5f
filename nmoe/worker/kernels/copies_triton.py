"""Copies of a few words between the device and pinned host memory, by a kernel that has the host's end mapped.

The GPU's copy engines would do the same, but each time that a stream passes from kernels to an engine or back it idles
for some 5 us, four times a step.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["from_ptr", "to_ptr"])
def _copy_kernel(from_ptr, to_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < size), mask=at < size)


def copy_words(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy int32 words, contiguous, each tensor on the device or in pinned host memory. Like any kernel, it runs after
    those launched before; the host may read its target after an event behind it."""
    assert source.numel() == target.numel() and source.dtype == target.dtype == torch.int32
    if size := source.numel():
        _copy_kernel[(triton.cdiv(size, _BLOCK),)](source, target, size, BLOCK=_BLOCK)


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["places_ptr"])
def _put_kernel(table_ptr, places_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places_ptr + at, mask=at < size, other=0)
    tl.store(table_ptr + place, tl.load(places_ptr + size + at, mask=at < size), mask=at < size)


def put_words(table: torch.Tensor, assigned_2N: torch.Tensor) -> None:
    """Set `table`, flat, at the indices in the first row of `assigned_2N` to the words in its second. int32, on the
    device; no index comes twice."""
    size = assigned_2N.shape[1]
    _put_kernel[(triton.cdiv(size, _BLOCK),)](table, assigned_2N, size, BLOCK=_BLOCK)
