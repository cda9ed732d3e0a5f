"""What attention does to a token's projections before it attends, on the GPU: the cache row is normalised, roped and
written, and the queries are roped in place. `norm.py` and `rope.py` are the reference.

Shape suffixes: T tokens, H heads, Q = N + P dimensions of a query, L latent, C = L + P, K rows of the cache, M
positions.
"""

import torch
import triton
import triton.language as tl

from nmoe.worker.kernels.early import early

_HEADS = 16  # per program


@triton.jit
def _finite(x):
    """Zero where it is not finite. Decode attention reads whole tiles of a page and weighs what another request has
    left there, behind its own context, with zero; zero times what is not finite would be NaN."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, tl.zeros_like(x))


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "places_ptr"])
def _inputs_kernel(
    q_ptr,
    kv_ptr,
    positions_ptr,
    places_ptr,
    rope_ptr,
    weight_ptr,
    rows_ptr,
    eps,
    Q_STRIDE: tl.constexpr,
    KV_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, ROPE // 2)
    table = rope_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * ROPE)
    cos = tl.load(table + half).to(tl.float32)
    sin = tl.load(table + ROPE + ROPE // 2 + half).to(tl.float32)
    if tl.program_id(1) == 0:
        kv = kv_ptr + token * KV_STRIDE
        row = rows_ptr + tl.load(places_ptr + token).to(tl.int64) * (LATENT + ROPE)
        latent = tl.arange(0, LATENT)
        x = tl.load(kv + latent).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / LATENT + eps)
        weight = tl.load(weight_ptr + latent).to(tl.float32)
        tl.store(row + latent, _finite((x * scale * weight).to(rows_ptr.dtype.element_ty)))
        first = tl.load(kv + LATENT + half).to(tl.float32)
        second = tl.load(kv + LATENT + ROPE // 2 + half).to(tl.float32)
        tl.store(row + LATENT + half, _finite((first * cos - second * sin).to(rows_ptr.dtype.element_ty)))
        tl.store(row + LATENT + ROPE // 2 + half, _finite((second * cos + first * sin).to(rows_ptr.dtype.element_ty)))
    else:
        head = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = (head < HEADS)[:, None]
        q = q_ptr + token * Q_STRIDE + head[:, None] * (NOPE + ROPE) + NOPE + half[None, :]
        left = tl.load(q, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(q + ROPE // 2, mask=inside, other=0.0).to(tl.float32)
        tl.store(q, (left * cos[None, :] - right * sin[None, :]).to(q_ptr.dtype.element_ty), mask=inside)
        tl.store(q + ROPE // 2, (right * cos[None, :] + left * sin[None, :]).to(q_ptr.dtype.element_ty), mask=inside)


def rope_and_cache(
    q_THQ: torch.Tensor,
    kv_TC: torch.Tensor,
    positions_T: torch.Tensor,
    places_T: torch.Tensor,
    rope_M2P: torch.Tensor,
    weight_L: torch.Tensor,
    rows_KC: torch.Tensor,
    eps: float,
) -> None:
    """Rope `q_THQ`'s last P dimensions in place; write each token's cache row to `rows_KC[places_T]`.

    `kv_TC`: the latent before its norm and the key before its rope; a result that is not finite is written as zero.
    Positions and places are int32 or int64.
    """
    tokens, heads, query = q_THQ.shape
    rope = rope_M2P.shape[-1]
    if tokens:
        _inputs_kernel[(tokens, 1 + triton.cdiv(heads, _HEADS))](
            q_THQ,
            kv_TC,
            positions_T,
            places_T,
            rope_M2P,
            weight_L,
            rows_KC,
            eps,
            Q_STRIDE=q_THQ.stride(0),
            KV_STRIDE=kv_TC.stride(0),
            HEADS=heads,
            BLOCK_H=_HEADS,
            NOPE=query - rope,
            ROPE=rope,
            LATENT=len(weight_L),
            launch_pdl=early(tokens),
        )
