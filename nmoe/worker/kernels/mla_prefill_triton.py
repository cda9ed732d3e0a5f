"""Causal attention of chunks in the expanded form, on the GPU; `mla.py`'s `expanded_chunk` is the reference.

Rows of any length lie end to end; a chunk is the last positions of its context. One program takes a tile of queries of
one head: first the tiles of keys that all its queries see, then the ones on the diagonal.

Shape suffixes: T queries, J positions of all contexts, H heads, N nope, P rope, Q = N + P, V value dimensions, X = N +
V.
"""

import dataclasses
import math

import torch
import triton
import triton.language as tl

BLOCK_M = 128  # queries of a tile
_BLOCK_N = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """Which queries each program takes, int32 on the device."""

    row: torch.Tensor  # of each tile
    start: torch.Tensor  # of each tile: its first query, counted within its row
    queries: torch.Tensor  # [rows + 1]: where each row's queries begin
    contexts: torch.Tensor  # [rows + 1]: where each row's context begins


@triton.jit(do_not_specialize_on_alignment=["tile_row_ptr", "tile_start_ptr", "queries_ptr", "contexts_ptr"])
def _prefill_kernel(
    q_ptr,
    kv_ptr,
    rope_ptr,
    out_ptr,
    tile_row_ptr,
    tile_start_ptr,
    queries_ptr,
    contexts_ptr,
    scale_log2,
    Q_STRIDE: tl.constexpr,
    ROPE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last tiles of a row are the longest: they go first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    head = tl.program_id(0)
    row = tl.load(tile_row_ptr + tile)
    at = tl.load(tile_start_ptr + tile)
    q_start = tl.load(queries_ptr + row)
    q_len = tl.load(queries_ptr + row + 1) - q_start
    k_start = tl.load(contexts_ptr + row).to(tl.int64)
    context = (tl.load(contexts_ptr + row + 1) - k_start).to(tl.int32)
    nope = tl.arange(0, NOPE)
    rope = tl.arange(0, ROPE)
    value = tl.arange(0, VALUE)
    key = tl.arange(0, BLOCK_N)
    query = at + tl.arange(0, BLOCK_M)
    inside = (query < q_len)[:, None]
    position = context - q_len + query
    q = q_ptr + (q_start + query).to(tl.int64)[:, None] * Q_STRIDE + head * (NOPE + ROPE)
    q_nope = tl.load(q + nope[None, :], mask=inside, other=0.0)
    q_rope = tl.load(q + NOPE + rope[None, :], mask=inside, other=0.0)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE], tl.float32)
    first = context - q_len + at
    seen_by_all = (first + 1) // BLOCK_N * BLOCK_N
    stop = tl.minimum(context, first + BLOCK_M)
    kv_base = kv_ptr + (k_start * HEADS + head) * (NOPE + VALUE)
    rope_base = rope_ptr + k_start * ROPE_STRIDE
    for diagonal in tl.static_range(2):
        for start in tl.range(seen_by_all if diagonal else 0, stop if diagonal else seen_by_all, BLOCK_N):
            j = start + key
            exists = (j < context)[:, None]
            kv = kv_base + j.to(tl.int64)[:, None] * (HEADS * (NOPE + VALUE))
            k_nope = tl.load(kv + nope[None, :], mask=exists, other=0.0)
            k_rope = tl.load(rope_base + j.to(tl.int64)[:, None] * ROPE_STRIDE + rope[None, :], mask=exists, other=0.0)
            v = tl.load(kv + NOPE + value[None, :], mask=exists, other=0.0)
            s = tl.dot(q_nope, tl.trans(k_nope))
            s = tl.dot(q_rope, tl.trans(k_rope), s) * scale_log2
            if diagonal:
                s = tl.where(j[None, :] <= position[:, None], s, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(s, 1))
            alpha = tl.exp2(peak - new_peak)
            p = tl.exp2(s - new_peak[:, None])
            weight = weight * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
            peak = new_peak
    out = out_ptr + ((q_start + query).to(tl.int64) * HEADS + head)[:, None] * VALUE + value[None, :]
    tl.store(out, (acc / weight[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def expanded_chunks(
    q_THQ: torch.Tensor,
    kv_JHX: torch.Tensor,
    k_rope_JP: torch.Tensor,
    tiles: Tiles,
    scale: float,
    out_THV: torch.Tensor,
) -> None:
    """Attended values of the chunks' queries into `out_THV`; indices in `tiles` count from the start of `q_THQ`.

    `kv_JHX`: keys without rope and values of all contexts, end to end; `k_rope_JP`: their roped keys.
    """
    heads, query = q_THQ.shape[1:]
    rope, value = k_rope_JP.shape[1], out_THV.shape[2]
    _prefill_kernel[(heads, len(tiles.row))](
        q_THQ,
        kv_JHX,
        k_rope_JP,
        out_THV,
        tiles.row,
        tiles.start,
        tiles.queries,
        tiles.contexts,
        scale * math.log2(math.e),
        Q_STRIDE=q_THQ.stride(0),
        ROPE_STRIDE=k_rope_JP.stride(0),
        HEADS=heads,
        NOPE=query - rope,
        ROPE=rope,
        VALUE=value,
        BLOCK_M=BLOCK_M,
        BLOCK_N=_BLOCK_N,
        num_warps=8,
        num_stages=3,
    )
