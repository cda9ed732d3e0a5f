"""Absorbed latent attention of the exact class on the GPU: one arithmetic for every query (docs/exact.md).

A query's context is divided into spans at absolute positions; a span is attended in tiles of positions, in order, and
spans are merged in order. A query's position alone determines the length of its spans. Here, decode rows have their
spans computed in parallel (for few rows, from scores that were all computed before) and merged by another kernel; in
mla_exact_prefill_gluon.py a program takes the queries of a few neighbouring positions and goes through their spans
itself. All perform the same operations in the same order, compiled without fused multiply-adds, and the sum of the
weights is a product with ones: the tensor cores add in position order in tiles of any shape, which a reduction over
threads would not. `mla.py`'s `absorbed_chunk` is the reference.

Shape suffixes: R rows, H heads, L latent, P rope dimensions, Q a query's, C = L + P, K rows of the cache, B pages of a
row (padded).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.mla_tiles_triton import block_of_rows, cache_row, contexts_of, load_ropes, row_of, store_plan
from nmoe.worker.kernels.mla_warps_gluon import ROWS, TILE

SPAN, MOST_SPANS = 512, 16  # spans double in length, repeatedly, where a context would otherwise have more of them
_FEW = 8  # rows; more have enough spans to fill the multiprocessors
_MOST_SCORES = 1 << 25  # for few rows: 128 MiB
_COLUMNS, _STAGES = 32, 6  # for few rows: columns of the values, and tiles of them in flight
_SPAN, _MOST_SPANS = tl.constexpr(SPAN), tl.constexpr(MOST_SPANS)


@triton.jit
def span_length(context):
    span = _SPAN + context * 0
    for _ in tl.static_range(16):
        span = tl.where(span * _MOST_SPANS < context, span * 2, span)
    return span


@triton.jit
def _scores(q_latent, q_rope, rows_ptr, k_row, position, context, scale_log2):
    """Scores of some heads' queries for a tile of positions, at `k_row` of the cache: [H, TILE], scaled to base 2; and
    the tile's latents, [TILE, L]."""
    LATENT: tl.constexpr = q_latent.shape[1]
    ROPE: tl.constexpr = q_rope.shape[1]
    k_at = rows_ptr + k_row[:, None] * (LATENT + ROPE)
    k_latent = tl.load(k_at + tl.arange(0, LATENT)[None, :])
    k_rope = tl.load(k_at + LATENT + tl.arange(0, ROPE)[None, :])
    s = tl.dot(q_latent, tl.trans(k_latent))
    s = tl.dot(q_rope, tl.trans(k_rope), s)
    is_context = (position + tl.arange(0, k_latent.shape[0]))[None, :] < context
    return tl.where(is_context, s * scale_log2, float("-inf")), k_latent


@triton.jit
def _add_tile(peak, weight, acc, scores, values):
    """Add a tile of positions to the tiles of its span before it; neither weight nor acc is normalised."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    alpha = tl.exp2(peak - new_peak)
    p = tl.exp2(scores - new_peak[:, None]).to(values.dtype)
    ones = tl.full([values.shape[0], 16], 1.0, values.dtype)
    return new_peak, tl.dot(p, ones, weight * alpha[:, None]), tl.dot(p, values, acc * alpha[:, None])


@triton.jit
def _empty_span(M: tl.constexpr, VALUES: tl.constexpr):
    """Initial peak, weight (16 times) and acc."""
    peak = tl.full([M], float("-inf"), tl.float32)
    return peak, tl.zeros([M, 16], tl.float32), tl.zeros([M, VALUES], tl.float32)


@triton.jit
def _merge(peak, weight, span_peak, span_weight):
    """Merge a span into those before it. Returns the total peak and weight, and the factors for both accs before they
    are added."""
    new_peak = tl.maximum(peak, span_peak)
    before = tl.exp2(peak - new_peak)
    here = tl.exp2(span_peak - new_peak)
    return new_peak, weight * before + span_weight * here, before[:, None], here[:, None]


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions_ptr"])
def _plan_kernel(positions_ptr, contexts_ptr, prefix_ptr, num_rows, BLOCK: tl.constexpr):
    """contexts = positions + 1; prefix[r] = spans of all rows before r."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    context = contexts_of(positions_ptr, num_rows, BLOCK)
    store_plan(contexts_ptr, prefix_ptr, context, span_length(context), num_rows, BLOCK)


@triton.jit(do_not_specialize=["num_rows", "max_pages"], do_not_specialize_on_alignment=["pages_ptr"])
def _spans_kernel(
    q_latent_ptr,
    q_ptr,
    rows_ptr,
    pages_ptr,
    contexts_ptr,
    prefix_ptr,
    partial_ptr,
    peak_ptr,
    weight_ptr,
    num_rows,
    max_pages,
    scale_log2,
    Q_STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Decode: the spans of all rows, divided equally among programs. The plan is older than the previous kernel, so it
    is read before the wait."""
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    latent = tl.arange(0, LATENT)
    token = tl.arange(0, TILE)
    total = tl.load(prefix_ptr + num_rows)
    item = tl.program_id(0) * total // tl.num_programs(0)
    last_item = (tl.program_id(0) + 1) * total // tl.num_programs(0)
    row = row_of(prefix_ptr, item, num_rows, BLOCK_R)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    while item < last_item:
        context = tl.load(contexts_ptr + row)
        span = span_length(context)
        begin = (item - tl.load(prefix_ptr + row)) * span
        stop = tl.minimum(begin + span, context)
        q_latent = tl.load(q_latent_ptr + (row * HEADS + head).to(tl.int64)[:, None] * LATENT + latent[None, :])
        q_rope = load_ropes(q_ptr, row, head, Q_STRIDE, NOPE, ROPE)
        peak, weight, acc = _empty_span(BLOCK_H, LATENT)
        for position in tl.range(begin, stop, TILE, num_stages=STAGES):
            k_row = cache_row(pages_ptr, row, max_pages, position, PAGE) + token
            scores, k_latent = _scores(q_latent, q_rope, rows_ptr, k_row, position, context, scale_log2)
            peak, weight, acc = _add_tile(peak, weight, acc, scores, k_latent)
        slot = item.to(tl.int64) * HEADS + head
        tl.store(peak_ptr + slot, peak)
        tl.store(weight_ptr + slot, tl.max(weight, 1))
        tl.store(partial_ptr + slot[:, None] * LATENT + latent[None, :], acc)
        item += 1
        row += (item >= tl.load(prefix_ptr + row + 1)).to(tl.int32)


@triton.jit(do_not_specialize=["max_pages"], do_not_specialize_on_alignment=["pages_ptr"])
def _scores_kernel(
    q_latent_ptr,
    q_ptr,
    rows_ptr,
    pages_ptr,
    contexts_ptr,
    scores_ptr,
    max_pages,
    positions,
    scale_log2,
    Q_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decode of few rows: a row's scores [R, H, positions]; programs stride over tiles."""
    row = tl.program_id(0)
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    latent = tl.arange(0, LATENT)
    token = tl.arange(0, TILE)
    context = tl.load(contexts_ptr + row)  # the plan: see above
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    place = (row * HEADS + head).to(tl.int64)[:, None]
    q_latent = tl.load(q_latent_ptr + place * LATENT + latent[None, :])
    q_rope = load_ropes(q_ptr, row, head, Q_STRIDE, NOPE, ROPE)
    for position in range(tl.program_id(1) * TILE, context, tl.num_programs(1) * TILE):
        k_row = cache_row(pages_ptr, row, max_pages, position, PAGE) + token
        scores, _ = _scores(q_latent, q_rope, rows_ptr, k_row, position, context, scale_log2)
        tl.store(scores_ptr + place * positions + position + token[None, :], scores)


@triton.jit(do_not_specialize=["max_pages"], do_not_specialize_on_alignment=["pages_ptr"])
def _weigh_kernel(
    scores_ptr,
    rows_ptr,
    pages_ptr,
    contexts_ptr,
    prefix_ptr,
    partial_ptr,
    peak_ptr,
    weight_ptr,
    max_pages,
    positions,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Decode of few rows: from the scores, one span of a row and some of the latent's columns per program."""
    SLICES: tl.constexpr = LATENT // COLUMNS
    row = tl.program_id(0)
    head = tl.program_id(2) // SLICES * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.program_id(2) % SLICES * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, TILE)
    context, item = tl.load(contexts_ptr + row), tl.load(prefix_ptr + row) + tl.program_id(1)  # the plan: see above
    span = span_length(context)
    begin = tl.program_id(1) * span
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    if begin < context:
        scores_at = scores_ptr + (row * HEADS + head).to(tl.int64)[:, None] * positions + token[None, :]
        peak, weight, acc = _empty_span(BLOCK_H, COLUMNS)
        for position in tl.range(begin, tl.minimum(begin + span, context), TILE, num_stages=STAGES):
            k_row = cache_row(pages_ptr, row, max_pages, position, PAGE) + token
            values = tl.load(rows_ptr + k_row[:, None] * (LATENT + ROPE) + column[None, :])
            peak, weight, acc = _add_tile(peak, weight, acc, tl.load(scores_at + position), values)
        slot = item.to(tl.int64) * HEADS + head
        tl.store(partial_ptr + slot[:, None] * LATENT + column[None, :], acc)
        if tl.program_id(2) % SLICES == 0:
            tl.store(peak_ptr + slot, peak)
            tl.store(weight_ptr + slot, tl.max(weight, 1))


@triton.jit
def _merge_kernel(partial_ptr, peak_ptr, weight_ptr, prefix_ptr, out_ptr, HEADS: tl.constexpr, LATENT: tl.constexpr):
    """Decode: merge a row's spans in order, for one head."""
    row = tl.program_id(0)
    head = tl.program_id(1) + tl.arange(0, 1)
    latent = tl.arange(0, LATENT)
    peak = tl.full([1], float("-inf"), tl.float32)
    weight = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, LATENT], tl.float32)
    first, last = tl.load(prefix_ptr + row), tl.load(prefix_ptr + row + 1)  # the plan: see above
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    for item in range(first, last):
        slot = head.to(tl.int64) + item * HEADS
        span_acc = tl.load(partial_ptr + slot[:, None] * LATENT + latent[None, :])
        peak, weight, before, here = _merge(peak, weight, tl.load(peak_ptr + slot), tl.load(weight_ptr + slot))
        acc = acc * before + span_acc * here
    out = out_ptr + (row * HEADS + head).to(tl.int64)[:, None] * LATENT + latent[None, :]
    tl.store(out, (acc * (1.0 / weight)[:, None]).to(out_ptr.dtype.element_ty))


class _Queries(NamedTuple):
    latent_RHL: torch.Tensor
    q_RHQ: torch.Tensor
    scale_log2: float


class _Cache(NamedTuple):
    """What the rows attend to, and how it is divided."""

    rows_KC: torch.Tensor
    pages_RB: torch.Tensor
    contexts_R: torch.Tensor
    prefix: torch.Tensor
    page_size: int


class Form(NamedTuple):
    """How decode is launched for a given number of heads; none of this affects the arithmetic."""

    heads: int  # per program, also for prefills
    warps: int
    stages: int
    programs: int  # per multiprocessor


def form_of(heads: int) -> Form:
    block_h = math.gcd(heads, ROWS)
    return Form(block_h, 4, 5, 2) if block_h <= 16 else Form(block_h, 8, 4, 1)


def span_prefix(positions_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From the rows' last positions: their contexts, int32 [R], and the running sum of their spans, int32 [R + 1]."""
    rows = len(positions_R)
    contexts_R = positions_R.new_empty(rows, dtype=torch.int32)
    prefix = positions_R.new_empty(rows + 1, dtype=torch.int32)
    block = block_of_rows(rows)
    _plan_kernel[(1,)](positions_R, contexts_R, prefix, rows, BLOCK=block, launch_pdl=early(rows))
    return contexts_R, prefix


def exact_decode(
    q_latent_RHL: torch.Tensor,
    q_RHQ: torch.Tensor,
    rows_KC: torch.Tensor,
    pages_RB: torch.Tensor,
    contexts_R: torch.Tensor,
    prefix: torch.Tensor,
    page_size: int,
    scale: float,
    out_RHL: torch.Tensor,
) -> None:
    """Attended latents of one query per row into `out_RHL`. `contexts_R` and `prefix` are from `span_prefix`; they are
    read before the wait, so some kernel must run in between."""
    rows, heads, latent = q_latent_RHL.shape
    positions = pages_RB.shape[1] * page_size
    most = rows * min(MOST_SPANS, triton.cdiv(positions, SPAN))
    partial = torch.empty(most, heads, latent, dtype=torch.float32, device=rows_KC.device)
    peaks, weights = torch.empty(2, most, heads, dtype=torch.float32, device=rows_KC.device)
    attend = _attend_few if rows <= _FEW and rows * heads * positions <= _MOST_SCORES else _attend_spans
    attend(
        _Queries(q_latent_RHL, q_RHQ, scale * math.log2(math.e)),
        _Cache(rows_KC, pages_RB, contexts_R, prefix, page_size),
        partial,
        peaks,
        weights,
    )
    _merge_kernel[(rows, heads)](
        partial,
        peaks,
        weights,
        prefix,
        out_RHL,
        HEADS=heads,
        LATENT=latent,
        enable_fp_fusion=False,
        launch_pdl=early(rows),
    )


def _common(queries: _Queries, cache: _Cache) -> dict[str, int | bool]:
    """Launch arguments common to all attending kernels."""
    rows, heads, latent = queries.latent_RHL.shape
    sizes = {"HEADS": heads, "BLOCK_H": form_of(heads).heads, "LATENT": latent, "ROPE": cache.rows_KC.shape[1] - latent}
    tiles = {"PAGE": cache.page_size, "TILE": TILE}
    return {**sizes, **tiles, "enable_fp_fusion": False, "launch_pdl": early(rows)}


def _attend_spans(
    queries: _Queries, cache: _Cache, partial: torch.Tensor, peaks: torch.Tensor, weights: torch.Tensor
) -> None:
    """Compute each span's peak and weight, [N, H] for N spans, and acc, `partial` [N, H, L]."""
    rows, heads, latent = queries.latent_RHL.shape
    rope, form = cache.rows_KC.shape[1] - latent, form_of(heads)
    blocks = heads // form.heads
    programs = max(1, form.programs * multiprocessors(partial.device) // blocks)
    _spans_kernel[(min(programs, len(partial)), blocks)](
        queries.latent_RHL,
        queries.q_RHQ,
        cache.rows_KC,
        cache.pages_RB,
        cache.contexts_R,
        cache.prefix,
        partial,
        peaks,
        weights,
        rows,
        cache.pages_RB.stride(0),
        queries.scale_log2,
        Q_STRIDE=queries.q_RHQ.stride(0),
        BLOCK_R=block_of_rows(rows),
        NOPE=queries.q_RHQ.shape[2] - rope,
        STAGES=form.stages,
        num_warps=form.warps,
        **_common(queries, cache),
    )


def _attend_few(
    queries: _Queries, cache: _Cache, partial: torch.Tensor, peaks: torch.Tensor, weights: torch.Tensor
) -> None:
    """The same for few rows, whose spans would make few programs: all scores first, then the columns of the values."""
    rows, heads, latent = queries.latent_RHL.shape
    rope, form = cache.rows_KC.shape[1] - latent, form_of(heads)
    blocks, positions = heads // form.heads, cache.pages_RB.shape[1] * cache.page_size
    scores_RHT = torch.empty(rows, heads, positions, dtype=torch.float32, device=partial.device)
    programs = max(1, form.programs * multiprocessors(partial.device) // (rows * blocks))
    _scores_kernel[(rows, min(programs, triton.cdiv(positions, TILE)), blocks)](
        queries.latent_RHL,
        queries.q_RHQ,
        cache.rows_KC,
        cache.pages_RB,
        cache.contexts_R,
        scores_RHT,
        cache.pages_RB.stride(0),
        positions,
        queries.scale_log2,
        Q_STRIDE=queries.q_RHQ.stride(0),
        NOPE=queries.q_RHQ.shape[2] - rope,
        num_warps=form.warps,
        **_common(queries, cache),
    )
    _weigh_kernel[(rows, len(partial) // rows, blocks * (latent // _COLUMNS))](
        scores_RHT,
        cache.rows_KC,
        cache.pages_RB,
        cache.contexts_R,
        cache.prefix,
        partial,
        peaks,
        weights,
        cache.pages_RB.stride(0),
        positions,
        COLUMNS=_COLUMNS,
        STAGES=_STAGES,
        num_warps=triton.cdiv(form.heads, 16),
        **_common(queries, cache),
    )
