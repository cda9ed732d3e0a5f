"""The processing of a token's projections before attention, on the GPU: the cache row is normalised, roped and written;
the queries are roped in place, and absorbed. `norm.py`, `rope.py` and `mla.py`'s `absorb_queries` are the reference.

No program reads what another one writes: absorbing reads the nope dimensions, roping writes the others. So one kernel
does both; for many tokens, two kernels do it side by side, and mla_absorb_gluon.py has the one that absorbs.

Shape suffixes: T tokens, R those that are absorbed, H heads, Q = N + P dimensions of a query, L latent, C = L + P, K
rows of the cache, M positions.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.mla_absorb_gluon import absorb_many, are_many

_HEADS = 16  # that a program ropes
_BLOCK_H = tl.constexpr(_HEADS)
_LEAST = 200  # minimum number of programs; with fewer, a smaller tile is used


class _Tile(NamedTuple):
    rows: int  # tokens
    columns: int  # latent dimensions

    def programs(self, tokens: int, heads: int, latent: int) -> int:
        return heads * (latent // self.columns) * -(-tokens // self.rows)


class _Sizes(NamedTuple):
    """The kernels' constants."""

    heads: int
    nope: int
    rope: int
    latent: int
    q_stride: int
    kv_stride: int


_TILES = _Tile(64, 128), _Tile(64, 64), _Tile(64, 32), _Tile(16, 128), _Tile(16, 64), _Tile(16, 32)


@triton.jit
def _finite(x):
    """x, or zero where it is not finite. Decode attention reads whole tiles of a page and gives zero weight to what
    other requests have left past its own context; zero times a non-finite value would be NaN."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, tl.zeros_like(x))


@triton.jit
def _store_row(kv_ptr, row_ptr, weight_ptr, cos, sin, eps, LATENT: tl.constexpr, ROPE: tl.constexpr):
    """Write a token's cache row [C] from its projection [C]."""
    latent = tl.arange(0, LATENT)
    half = tl.arange(0, ROPE // 2)
    x = tl.load(kv_ptr + latent, cache_modifier=".cg").to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / LATENT + eps)
    weight = tl.load(weight_ptr + latent).to(tl.float32)
    tl.store(row_ptr + latent, _finite((x * scale * weight).to(row_ptr.dtype.element_ty)))
    first = tl.load(kv_ptr + LATENT + half, cache_modifier=".cg").to(tl.float32)
    second = tl.load(kv_ptr + LATENT + ROPE // 2 + half, cache_modifier=".cg").to(tl.float32)
    tl.store(row_ptr + LATENT + half, _finite((first * cos - second * sin).to(row_ptr.dtype.element_ty)))
    tl.store(row_ptr + LATENT + ROPE // 2 + half, _finite((second * cos + first * sin).to(row_ptr.dtype.element_ty)))


@triton.jit
def _rope_queries(q_ptr, head, cos, sin, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr):
    """Rope a token's queries of these heads, [H, Q], in place."""
    inside = (head < HEADS)[:, None]
    at = q_ptr + head[:, None] * (NOPE + ROPE) + NOPE + tl.arange(0, ROPE // 2)[None, :]
    left = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    right = tl.load(at + ROPE // 2, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(at, (left * cos[None, :] - right * sin[None, :]).to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(at + ROPE // 2, (right * cos[None, :] + left * sin[None, :]).to(q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _absorb(
    q_ptr,
    w_uk_ptr,
    out,
    program,
    num_absorbed,
    SIZES: tl.constexpr,
    W_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """A tile of a head's q_nope @ W_UK. Its weights, which no kernel writes, start loading before the wait. `out`:
    where results go, and how far apart they are there, from token to token and from head to head."""
    absorbed_ptr, out_token, out_head = out
    LATENT: tl.constexpr = SIZES.latent
    BLOCKS: tl.constexpr = LATENT // COLUMNS
    head = (program % SIZES.heads).to(tl.int64)
    column = (program // SIZES.heads) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    token = ((program // (SIZES.heads * BLOCKS)) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    nope = tl.arange(0, SIZES.nope)
    w = tl.load(w_uk_ptr + head * W_HEAD + nope[:, None] * LATENT + column[None, :])
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    exists = (token < num_absorbed)[:, None]
    q_at = q_ptr + token[:, None] * SIZES.q_stride + head * (SIZES.nope + SIZES.rope) + nope[None, :]
    q = tl.load(q_at, mask=exists, other=0.0)
    absorbed = tl.dot(q, w).to(absorbed_ptr.dtype.element_ty)
    at = absorbed_ptr + token[:, None] * out_token + head * out_head + column[None, :]
    tl.store(at, absorbed, mask=exists, eviction_policy=KEPT)


@triton.jit
def _rope(step, program, eps, SIZES: tl.constexpr, WAIT: tl.constexpr):
    """Of a token's programs, the first writes its cache row, the others rope its heads. Positions, places and the table
    are older than the previous kernel, so they are read before the wait."""
    q_ptr, kv_ptr, positions_ptr, places_ptr, rope_ptr, weight_ptr, rows_ptr = step
    ROPE: tl.constexpr = SIZES.rope
    PARTS: tl.constexpr = 1 + (SIZES.heads + _BLOCK_H - 1) // _BLOCK_H
    token = (program // PARTS).to(tl.int64)
    part = program % PARTS
    half = tl.arange(0, ROPE // 2)
    table = rope_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * ROPE)
    cos = tl.load(table + half).to(tl.float32)
    sin = tl.load(table + ROPE + ROPE // 2 + half).to(tl.float32)
    row_ptr = rows_ptr + tl.load(places_ptr + token).to(tl.int64) * (SIZES.latent + ROPE)
    if WAIT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if part == 0:
        _store_row(kv_ptr + token * SIZES.kv_stride, row_ptr, weight_ptr, cos, sin, eps, SIZES.latent, ROPE)
    else:
        head = (part - 1) * _BLOCK_H + tl.arange(0, _BLOCK_H)
        _rope_queries(q_ptr + token * SIZES.q_stride, head, cos, sin, SIZES.heads, SIZES.nope, ROPE)


@triton.jit(
    do_not_specialize=["num_absorbed", "num_absorbing"],
    do_not_specialize_on_alignment=["positions_ptr", "places_ptr"],
)
def _inputs_kernel(
    q_ptr,
    kv_ptr,
    positions_ptr,
    places_ptr,
    rope_ptr,
    weight_ptr,
    rows_ptr,
    w_uk_ptr,
    absorbed_ptr,
    num_absorbed,
    num_absorbing,
    out_token,
    out_head,
    eps,
    SIZES: tl.constexpr,
    W_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """The first programs absorb a tile each, the others rope."""
    program = tl.program_id(0)
    if program < num_absorbing:
        out = (absorbed_ptr, out_token, out_head)
        _absorb(q_ptr, w_uk_ptr, out, program, num_absorbed, SIZES, W_HEAD, ROWS, COLUMNS, KEPT)
    else:
        step = (q_ptr, kv_ptr, positions_ptr, places_ptr, rope_ptr, weight_ptr, rows_ptr)
        _rope(step, program - num_absorbing, eps, SIZES, True)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "places_ptr"])
def _rope_kernel(q_ptr, kv_ptr, positions_ptr, places_ptr, rope_ptr, weight_ptr, rows_ptr, eps, SIZES: tl.constexpr):
    """Rope beside the kernel before, which absorbs; see early.py."""
    tl.extra.cuda.gdc_launch_dependents()
    step = (q_ptr, kv_ptr, positions_ptr, places_ptr, rope_ptr, weight_ptr, rows_ptr)
    _rope(step, tl.program_id(0), eps, SIZES, False)
    if tl.program_id(0) == 0:
        tl.extra.cuda.gdc_wait()


def _tile(tokens: int, heads: int, latent: int) -> _Tile:
    """The largest tile with enough programs to fill the multiprocessors, or else the smallest tile."""
    tiles = [tile for tile in _TILES if tile.rows < 2 * max(tokens, 16)]
    return next((tile for tile in tiles if tile.programs(tokens, heads, latent) >= _LEAST), tiles[-1])


def enter(
    q_THQ: torch.Tensor,
    kv_TC: torch.Tensor,
    positions_T: torch.Tensor,
    places_T: torch.Tensor,
    rope_M2P: torch.Tensor,
    weight_L: torch.Tensor,
    rows_KC: torch.Tensor,
    eps: float,
    w_uk_HNL: torch.Tensor,
    absorbed_RHL: torch.Tensor,
) -> None:
    """Rope `q_THQ`'s last P dimensions in place, write each token's cache row to `rows_KC[places_T]`, and W_UK^T q_nope
    of the first R tokens to `absorbed_RHL`, in which only the last dimension must be contiguous.

    `kv_TC`: the latent before its norm and the key before its rope; results that are not finite are written as zero.
    Positions and places are int32 or int64.
    """
    tokens, heads, query = q_THQ.shape
    rope, latent, absorbed = rope_M2P.shape[-1], len(weight_L), len(absorbed_RHL)
    if not tokens:
        return
    sizes = _Sizes(heads, query - rope, rope, latent, q_THQ.stride(0), kv_TC.stride(0))
    step = (q_THQ, kv_TC, positions_T, places_T, rope_M2P, weight_L, rows_KC)
    roping = tokens * (1 + triton.cdiv(heads, _HEADS))
    if are_many(absorbed, w_uk_HNL):
        absorb_many(q_THQ, w_uk_HNL, absorbed_RHL)
        _rope_kernel[(roping,)](*step, eps, sizes, launch_pdl=early(tokens))
        return
    tile = _tile(absorbed, heads, latent)
    absorbing = tile.programs(absorbed, heads, latent)
    _inputs_kernel[(absorbing + roping,)](
        *step,
        w_uk_HNL,
        absorbed_RHL,
        absorbed,
        absorbing,
        absorbed_RHL.stride(0),
        absorbed_RHL.stride(1),
        eps,
        sizes,
        W_HEAD=w_uk_HNL.stride(0),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        KEPT=kept(tokens),
        launch_pdl=early(tokens),
    )
