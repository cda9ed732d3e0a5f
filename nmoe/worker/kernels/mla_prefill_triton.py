"""Causal attention of chunks in the expanded form, on the GPU; `mla.py`'s `expanded_chunk` is the reference.

A chunk is the last positions of its row's context. First, one block of positions of one row at a time is read from the
row's pages and multiplied by kv_b_proj into a workspace, where contexts start at whole blocks. Then each program takes
a tile of queries of one head: first the tiles of keys that all its queries see, then those on the diagonal.

The rows, tiles and blocks are read on the device, and programs beyond the last one exit at once: so a launch sized for
the largest possible step serves every smaller one, and can be replayed from a graph. A row with queries and no context
is padding: its output is zero.

Shape suffixes: T queries, J positions of all contexts in the workspace, H heads, N nope, P rope, Q = N + P, V value
dimensions, X = N + V, L latent, C = L + P, K rows of the cache, R rows of the step, B pages of a row (padded).
"""

import math

import torch
import triton
import triton.language as tl

from nmoe.worker.chunks import BLOCK, TILE, Chunks
from nmoe.worker.kernels.mla_tiles_triton import add_tile, no_tiles

_BLOCK_N = 64  # keys per program at a time
_BLOCK_X = 256  # columns of the expanding product


_POINTERS = [
    f"{name}_ptr"
    for name in (
        "starts",
        "firsts",
        "offsets",
        "tile_row",
        "tile_start",
        "num_tiles",
        "block_row",
        "block_start",
        "num_blocks",
    )
]


@triton.jit(do_not_specialize=["max_pages"], do_not_specialize_on_alignment=[*_POINTERS, "pages_ptr"])
def _expand_kernel(
    rows_ptr,
    pages_ptr,
    weight_ptr,
    kv_ptr,
    rope_ptr,
    starts_ptr,
    firsts_ptr,
    offsets_ptr,
    block_row_ptr,
    block_start_ptr,
    num_blocks_ptr,
    max_pages,
    COLUMNS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    block = tl.program_id(1)
    if block < tl.load(num_blocks_ptr):
        row = tl.load(block_row_ptr + block)
        start = tl.load(block_start_ptr + block)
        context = tl.load(firsts_ptr + row) + tl.load(starts_ptr + row + 1) - tl.load(starts_ptr + row)
        position = start + tl.arange(0, BLOCK_J)
        exists = position < context
        page = tl.load(pages_ptr + row.to(tl.int64) * max_pages + position // PAGE, mask=exists, other=0).to(tl.int64)
        held = rows_ptr + (page * PAGE + position % PAGE)[:, None] * (LATENT + ROPE)
        column = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
        inside = column < COLUMNS
        lane = tl.arange(0, BLOCK_L)
        weight = weight_ptr + column[:, None] * LATENT + lane[None, :]
        acc = tl.zeros([BLOCK_J, BLOCK_X], tl.float32)
        for at in tl.range(0, LATENT, BLOCK_L, num_stages=3):
            latent = tl.load(held + at + lane[None, :], mask=exists[:, None], other=0.0)
            w = tl.load(weight + at, mask=inside[:, None], other=0.0)
            acc = tl.dot(latent, tl.trans(w), acc)
        place = (tl.load(offsets_ptr + row) + position).to(tl.int64)[:, None]
        out = kv_ptr + place * COLUMNS + column[None, :]
        tl.store(out, acc.to(kv_ptr.dtype.element_ty), mask=exists[:, None] & inside[None, :])
        if tl.program_id(0) == 0:
            rope = tl.arange(0, ROPE)
            key = tl.load(held + LATENT + rope[None, :], mask=exists[:, None], other=0.0)
            tl.store(rope_ptr + place * ROPE + rope[None, :], key, mask=exists[:, None])


@triton.jit(do_not_specialize_on_alignment=_POINTERS)
def _prefill_kernel(
    q_ptr,
    kv_ptr,
    rope_ptr,
    out_ptr,
    starts_ptr,
    firsts_ptr,
    offsets_ptr,
    tile_row_ptr,
    tile_start_ptr,
    num_tiles_ptr,
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
    # The last tiles of a row are the longest, so they go first.
    tile = tl.load(num_tiles_ptr) - 1 - tl.program_id(1)
    if tile < 0:
        return
    head = tl.program_id(0)
    row = tl.load(tile_row_ptr + tile)
    at = tl.load(tile_start_ptr + tile)
    q_start = tl.load(starts_ptr + row)
    q_len = tl.load(starts_ptr + row + 1) - q_start
    k_start = tl.load(offsets_ptr + row).to(tl.int64)
    context = tl.load(firsts_ptr + row) + q_len
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
    peak, weight, acc = no_tiles(BLOCK_M, VALUE)
    first = context - q_len + at
    seen_by_all = tl.maximum(first + 1, 0) // BLOCK_N * BLOCK_N
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
            peak, weight, acc = add_tile(peak, weight, acc, s, v)
    out = out_ptr + ((q_start + query).to(tl.int64) * HEADS + head)[:, None] * VALUE + value[None, :]
    weight = tl.where(weight > 0, weight, 1.0)
    tl.store(out, (acc / weight[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def expanded_chunks(
    q_THQ: torch.Tensor,
    rows_KC: torch.Tensor,
    pages_RB: torch.Tensor,
    w_HXL: torch.Tensor,
    chunks: Chunks,
    page_size: int,
    scale: float,
    out_THV: torch.Tensor,
) -> None:
    """Attended values of the chunks' queries into `out_THV`; `w_HXL` is kv_b_proj, its nope part above its values."""
    heads, columns, latent = w_HXL.shape
    query, rope, value = q_THQ.shape[2], rows_KC.shape[1] - latent, out_THV.shape[2]
    kv_JHX = q_THQ.new_empty(chunks.positions, heads, columns)
    k_rope_JP = q_THQ.new_empty(chunks.positions, rope)
    _expand_kernel[(triton.cdiv(heads * columns, _BLOCK_X), len(chunks.block_row))](
        rows_KC,
        pages_RB,
        w_HXL,
        kv_JHX,
        k_rope_JP,
        chunks.starts,
        chunks.firsts,
        chunks.offsets,
        chunks.block_row,
        chunks.block_start,
        chunks.num_blocks,
        pages_RB.stride(0),
        COLUMNS=heads * columns,
        LATENT=latent,
        ROPE=rope,
        PAGE=page_size,
        BLOCK_J=BLOCK,
        BLOCK_X=_BLOCK_X,
        BLOCK_L=64 if latent % 64 == 0 else 32,
        num_warps=8,
        num_stages=3,
    )
    _prefill_kernel[(heads, len(chunks.tile_row))](
        q_THQ,
        kv_JHX,
        k_rope_JP,
        out_THV,
        chunks.starts,
        chunks.firsts,
        chunks.offsets,
        chunks.tile_row,
        chunks.tile_start,
        chunks.num_tiles,
        scale * math.log2(math.e),
        Q_STRIDE=q_THQ.stride(0),
        ROPE_STRIDE=rope,
        HEADS=heads,
        NOPE=query - rope,
        ROPE=rope,
        VALUE=value,
        BLOCK_M=TILE,
        BLOCK_N=_BLOCK_N,
        num_warps=8,
        num_stages=3,
    )
