"""Routing on the GPU; `routing.py` is the reference.

Shape suffixes as in routing.py.
"""

import torch
import triton
import triton.language as tl

_BLOCK_T = 4


@triton.jit(do_not_specialize=["num_tokens"])
def _scatter_kernel(
    ids_ptr, write_ptr, routing_ptr, num_tokens, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    lane = tl.arange(0, BLOCK)
    exists = (token < num_tokens)[:, None] & (lane < SIZE)[None, :]
    place = tl.load(write_ptr + token, mask=token < num_tokens, other=0).to(tl.int64)
    ids = tl.load(ids_ptr + token.to(tl.int64)[:, None] * SIZE + lane[None, :], mask=exists, other=0)
    out = routing_ptr + place[:, None] * SIZE + lane[None, :]
    tl.store(out, ids.to(routing_ptr.dtype.element_ty), mask=exists)


def scatter(ids_TLK: torch.Tensor, write_T: torch.Tensor, routing_NSLK: torch.Tensor) -> None:
    """Store each token's ids, of any integer type, in its place."""
    tokens, size = len(ids_TLK), ids_TLK[0].numel()
    _scatter_kernel[(triton.cdiv(tokens, _BLOCK_T),)](
        ids_TLK, write_T, routing_NSLK, tokens, SIZE=size, BLOCK=triton.next_power_of_2(size), BLOCK_T=_BLOCK_T
    )
