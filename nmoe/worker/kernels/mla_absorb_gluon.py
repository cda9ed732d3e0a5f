"""Queries absorbed for many tokens, W_UK^T q_nope, in Gluon; `mla.py`'s `absorb_queries` is the reference, and
mla_inputs_triton.py has the kernel for fewer.

A program has all of a head's weights in its shared memory, which start loading before the wait. Its two warpgroups
share nothing else: each takes tiles of tokens by itself, multiplies them by one piece of the weights after the other,
and hands the results over for storing, so while one waits, the other computes.

An element is added along the nope dimensions in one accumulator, as in mla_inputs_triton.py, so its bits are the same.

Shape suffixes: T tokens, R those that are absorbed, H heads, Q = N + P dimensions of a query, N nope dimensions, L
latent; of a tile M tokens.
"""

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.hopper_gluon import copy_tile, descriptor, store_tile, wait_for_kernel_before

_ROWS, _COLUMNS = 64, 128  # of a tile: tokens, latent dimensions
_M, _PIECE = gl.constexpr(_ROWS), gl.constexpr(_COLUMNS)
_GROUPS = gl.constexpr(2)  # warpgroups per program
_LEAST = 200  # tiles of tokens, counted over heads: with fewer, smaller programs are faster
_MOST_BYTES = 128 << 10  # of a head's weights
_REGISTERS = 136  # per thread: they leave room for programs that rope


class _Shared(NamedTuple):
    """Shared memory."""

    w: gl.shared_memory_descriptor  # [pieces, 1, N, columns]
    q: gl.shared_memory_descriptor  # [warpgroups, M, N]
    out: gl.shared_memory_descriptor  # [warpgroups, M, 1, columns]
    w_there: gl.shared_memory_descriptor  # [pieces] barriers
    q_there: gl.shared_memory_descriptor  # [warpgroups] barriers


@gluon.jit
def _load_queries(shared, q_desc, token, head, QUERY: gl.constexpr, mine: gl.constexpr):
    """Start loading a tile's queries."""
    mbarrier.expect(shared.q_there.index(mine), _M * shared.q.shape[2] * 2)
    copy_tile(q_desc, [token, head * QUERY], shared.q_there.index(mine), shared.q.index(mine))


@gluon.jit
def _multiply(shared, piece: gl.constexpr, mine: gl.constexpr):
    """A tile's queries times a piece of the weights, [M, columns]."""
    NOPE: gl.constexpr = shared.q.shape[2]
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _PIECE, 16])
    mbarrier.wait(shared.w_there.index(piece), 0)
    acc = gl.zeros([_M, _PIECE], gl.float32, PRODUCT)
    w = shared.w.index(piece).reshape([NOPE, _PIECE])
    adding = warpgroup_mma(shared.q.index(mine), w, acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[adding])


@gluon.jit
def _absorb(shared, q_desc, out_desc, num_tokens, QUERY: gl.constexpr, mine: gl.constexpr):
    """Warpgroup `mine`: every so many tiles of tokens."""
    PIECES: gl.constexpr = shared.w.shape[0]
    head = gl.program_id(0)
    token = (gl.program_id(1) * _GROUPS + mine) * _M
    step = gl.num_programs(1) * _GROUPS * _M
    out = shared.out.index(mine).reshape([_M, _PIECE])
    turn = 0
    wait_for_kernel_before()
    if token < num_tokens:
        _load_queries(shared, q_desc, token, head, QUERY, mine)
    while token < num_tokens:
        mbarrier.wait(shared.q_there.index(mine), turn & 1)
        for piece in gl.static_range(PIECES):
            absorbed = _multiply(shared, piece, mine).to(gl.bfloat16)
            if piece == PIECES - 1 and token + step < num_tokens:
                _load_queries(shared, q_desc, token + step, head, QUERY, mine)
            tma.store_wait(0)
            out.store(absorbed)
            fence_async_shared()
            store_tile(out_desc, [token, head, piece * _PIECE], shared.out.index(mine))
        token += step
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens"])
def _absorb_kernel(
    q_desc, w_desc, out_desc, num_tokens, QUERY: gl.constexpr, PIECES: gl.constexpr, REGISTERS: gl.constexpr
):
    NOPE: gl.constexpr = w_desc.block_type.shape[1]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    shared = _Shared(
        w=gl.allocate_shared_memory(gl.bfloat16, [PIECES, 1, NOPE, _PIECE], w_desc.layout),
        q=gl.allocate_shared_memory(gl.bfloat16, [_GROUPS, _M, NOPE], q_desc.layout),
        out=gl.allocate_shared_memory(gl.bfloat16, [_GROUPS, _M, 1, _PIECE], out_desc.layout),
        w_there=gl.allocate_shared_memory(gl.int64, [PIECES, 1], BARRIER),
        q_there=gl.allocate_shared_memory(gl.int64, [_GROUPS, 1], BARRIER),
    )
    for i in gl.static_range(PIECES):
        mbarrier.init(shared.w_there.index(i), count=1)
    for i in gl.static_range(_GROUPS):
        mbarrier.init(shared.q_there.index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(PIECES):
        mbarrier.expect(shared.w_there.index(i), NOPE * _PIECE * 2)
        copy_tile(w_desc, [gl.program_id(0), 0, i * _PIECE], shared.w_there.index(i), shared.w.index(i))
    gl.warp_specialize(
        [
            (_absorb, (shared, q_desc, out_desc, num_tokens, QUERY, 0)),
            (_absorb, (shared, q_desc, out_desc, num_tokens, QUERY, 1)),
        ],
        [4],
        [REGISTERS],
    )


def are_many(tokens: int, w_uk_HNL: torch.Tensor) -> bool:
    """Whether `absorb_many` is the way to absorb this many tokens' queries."""
    heads, nope, latent = w_uk_HNL.shape
    fits = nope >= 64 and nope * latent * 2 <= _MOST_BYTES
    return fits and heads * triton.cdiv(tokens, _ROWS) >= _LEAST


def absorb_many(q_THQ: torch.Tensor, w_uk_HNL: torch.Tensor, absorbed_RHL: torch.Tensor) -> None:
    """W_UK^T q_nope of the first R tokens into `absorbed_RHL`. There, as in the weights, only L must be contiguous."""
    (tokens, heads, query), (_, nope, latent) = q_THQ.shape, w_uk_HNL.shape
    absorbed = len(absorbed_RHL)
    groups = max(1, multiprocessors(q_THQ.device) // heads)
    _absorb_kernel[(heads, min(groups, triton.cdiv(absorbed, _GROUPS.value * _ROWS)))](
        descriptor(q_THQ.flatten(1), _ROWS, nope),
        descriptor(w_uk_HNL, 1, nope, _COLUMNS),
        descriptor(absorbed_RHL, _ROWS, 1, _COLUMNS),
        absorbed,
        QUERY=query,
        PIECES=latent // _COLUMNS,
        REGISTERS=_REGISTERS,
        maxnreg=_REGISTERS,
        num_warps=4,
        launch_pdl=early(tokens),
    )
