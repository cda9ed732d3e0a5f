"""How rows move between GPUs: pushed to the ranks that own their experts, listed there, summed, pushed back.

Every kernel works on addresses: a rank's own slab is ordinary memory to it, and the others' are mapped. Data is stored
directly into the owner's slab; nothing is ever read from another GPU. Rows are bfloat16, or FP8 with one scale per 128
columns, as computed by `fp8_triton.scales_of`; sums are bfloat16.

Shape suffixes: N ranks, T tokens of this rank, C slots per rank, K experts per token, D hidden, E experts of a rank,
G groups of 128 columns, S rows that arrived, L lanes.
"""

import triton
import triton.language as tl

from nmoe.slab import LINE
from nmoe.worker.kernels.fp8_triton import scales_of
from nmoe.worker.kernels.lists_triton import WORDS, add_pairs, clear_counts
from nmoe.worker.rdep import signals_triton
from nmoe.worker.rdep.signals_triton import flag_at, raise_flags, wait

_LINE = tl.constexpr(LINE)
_PUSHED = tl.constexpr(signals_triton.PUSHED)
_RETURNED = tl.constexpr(signals_triton.RETURNED)
_DISPATCH = tl.constexpr(0)
_RETURN = tl.constexpr(1)


@triton.jit
def _at(address, dtype: tl.constexpr):
    """A pointer aligned to 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _push_routes(
    here_NK,
    ids_K,
    weights_K,
    base_N,
    slot,
    counts_at,
    routes_at,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tell every rank how many of its experts a token wants; if any, also which ones, and their weights."""
    rank_N = tl.arange(0, RANKS)
    k_K = tl.arange(0, BLOCK_K)
    hits_NK = here_NK.to(tl.int32)
    counts_N = tl.sum(hits_NK, 1)
    tl.store((base_N + counts_at + slot * 4).to(tl.pointer_type(tl.int32)), counts_N)
    # An owner's experts come first, in the order of K, so it need not look at the other places.
    before_NK = tl.cumsum(hits_NK, 1) - hits_NK
    place_NK = tl.where(here_NK, before_NK, counts_N[:, None] + k_K[None, :] - before_NK)
    route_NK = base_N[:, None] + (routes_at + slot * (8 * K)) + place_NK.to(tl.int64) * 4
    wanted_NK = (counts_N > 0)[:, None] & (k_K < K)[None, :]
    local_NK = tl.where(here_NK, ids_K[None, :] - rank_N[:, None] * EXPERTS, EXPERTS)
    tl.store(route_NK.to(tl.pointer_type(tl.int32)), local_NK, mask=wanted_NK)
    spread_NK = tl.broadcast_to(weights_K[None, :], (RANKS, BLOCK_K))
    tl.store((route_NK + 4 * K).to(tl.pointer_type(tl.float32)), spread_NK, mask=wanted_NK)


@triton.jit
def _push_row(
    x_GL,
    bases_ptr,
    base_N,
    owners,
    slot,
    hidden_at,
    scales_at,
    RANKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """Send a token's row to each of its owners: bfloat16 [D], or FP8 [D] with its scales, float32 [G]."""
    GROUPS: tl.constexpr = D // 128
    group_G = tl.arange(0, BLOCK_G)
    inside_G = group_G < GROUPS
    lane_GL = group_G[:, None] * 128 + tl.arange(0, 128)[None, :]
    if QUANTISED:
        x_GL = x_GL.to(tl.float32)
        scales_G = scales_of(x_GL)
        out_GL = (x_GL / scales_G[:, None]).to(tl.float8e4nv)
    else:
        out_GL = x_GL
    BITS: tl.constexpr = out_GL.dtype.primitive_bitwidth
    for peer in tl.static_range(RANKS):
        if (owners >> peer) & 1 == 1:
            row_ptr = _at(tl.load(bases_ptr + peer) + hidden_at + slot * (D * BITS // 8), out_GL.dtype)
            tl.store(row_ptr + lane_GL, out_GL, mask=inside_G[:, None])
    if QUANTISED:
        rank_N = tl.arange(0, RANKS)
        row_N = (base_N + scales_at + slot * (GROUPS * 4)).to(tl.pointer_type(tl.float32))
        wanted_NG = ((owners >> rank_N) & 1 == 1)[:, None] & inside_G[None, :]
        tl.store(
            row_N[:, None] + group_G[None, :], tl.broadcast_to(scales_G[None, :], (RANKS, BLOCK_G)), mask=wanted_NG
        )


@triton.jit(do_not_specialize=["counts", "tokens", "rank", "channel", "max_tokens"])
def dispatch_kernel(
    x_ptr,
    ids_ptr,
    weights_ptr,
    owners_ptr,
    counts_ptr,
    bases_ptr,
    state_ptr,
    real_ptr,
    counts,
    tokens,
    rank,
    channel,
    max_tokens,
    x_stride,
    counts_at,
    routes_at,
    hidden_at,
    scales_at,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """Send each token's row once to each of its owners, with the ids and weights meant for it. Tell every rank how many
    of its experts each token wants, and record the token's owners here, one bit each. Only the first `real` tokens are
    not padding; padding has no owners. Programs stride over the tokens. Also zero the counts of the lists, of all
    tiles, for the rows that will arrive here.

    A token's loads do not depend on other loads, and precede its first store.
    """
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    clear_counts(counts_ptr, counts, tl.program_id(0), tl.num_programs(0), 1024)
    real = tokens
    if real_ptr is not None:
        real = tl.load(real_ptr).to(tl.int32)
    rank_N = tl.arange(0, RANKS)
    base_N = tl.load(bases_ptr + rank_N)
    k_K = tl.arange(0, BLOCK_K)
    group_G = tl.arange(0, BLOCK_G)
    lane_GL = group_G[:, None] * 128 + tl.arange(0, 128)[None, :]
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        ids_K = tl.load(ids_ptr + token * K + k_K, mask=k_K < K, other=RANKS * EXPERTS)
        weights_K = tl.load(weights_ptr + token * K + k_K, mask=k_K < K, other=0.0)
        row_ptr = x_ptr + tl.cast(token, tl.int64) * x_stride
        x_GL = tl.load(row_ptr + lane_GL, mask=(group_G < D // 128)[:, None], other=0.0)
        slot = (rank * max_tokens + token).to(tl.int64)
        here_NK = ((ids_K // EXPERTS)[None, :] == rank_N[:, None]) & (token < real)
        owners = tl.sum(tl.max(here_NK.to(tl.int32), 1) << rank_N, 0)
        _push_row(x_GL, bases_ptr, base_N, owners, slot, hidden_at, scales_at, RANKS, D, BLOCK_G, QUANTISED)
        _push_routes(here_NK, ids_K, weights_K, base_N, slot, counts_at, routes_at, RANKS, EXPERTS, K, BLOCK_K)
        tl.store(owners_ptr + token, owners)
    if tl.program_id(0) == 0:
        tokens_N = base_N + flag_at(channel, rank, _DISPATCH, RANKS) + 8
        tl.store(tokens_N.to(tl.pointer_type(tl.int64)), tl.zeros([RANKS], tl.int64) + tokens)
    raise_flags(state_ptr, bases_ptr, rank, channel, _PUSHED, _DISPATCH, RANKS)


@triton.jit
def _arrived(slab, lines, index_S, most, max_tokens, counts_at, RANKS: tl.constexpr):
    """For these pairs (token, source), in that order, of `most` tokens: their slots, and whether a row arrived."""
    source_S = index_S % RANKS
    token_S = index_S // RANKS
    line_S = lines + source_S.to(tl.int64) * _LINE + 8
    sent_S = tl.load(line_S.to(tl.pointer_type(tl.int64)))
    slot_S = source_S * max_tokens + token_S
    count_ptr_S = (slab + counts_at + slot_S.to(tl.int64) * 4).to(tl.pointer_type(tl.int32))
    counts_S = tl.load(count_ptr_S, mask=token_S < most, other=0)
    return slot_S, (counts_S > 0) & (token_S < sent_S)


@triton.jit(do_not_specialize=["tile_rows", "rank", "channel", "max_tokens", "most"])
def arrive_kernel(
    state_ptr,
    slots_ptr,
    ids_ptr,
    weights_ptr,
    num_rows_ptr,
    list_counts_ptr,
    pairs_ptr,
    slab,
    control,
    tile_rows,
    rank,
    channel,
    max_tokens,
    most,
    counts_at,
    routes_at,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Wait for all ranks' rows, then list them by token, then source: slot, ids [S, K], weights [S, K]. Each program
    takes a block of slots and counts the rows in all earlier blocks itself. Also store the number of rows, and list the
    experts' pairs, with separate lists for each tile of `tile_rows` rows."""
    tl.extra.cuda.gdc_wait()
    wait(state_ptr, slab, control, rank, channel, _DISPATCH, RANKS)
    tl.extra.cuda.gdc_launch_dependents()
    lines = slab + flag_at(channel, 0, _DISPATCH, RANKS)
    first = tl.program_id(0) * BLOCK
    slot_S, came_S = _arrived(slab, lines, first + tl.arange(0, BLOCK), most, max_tokens, counts_at, RANKS)
    hits_S = came_S.to(tl.int32)
    before = 0
    for start in range(0, first, SCAN):
        index_S = start + tl.arange(0, SCAN)
        _, earlier_S = _arrived(slab, lines, index_S, most, max_tokens, counts_at, RANKS)
        before += tl.sum((earlier_S & (index_S < first)).to(tl.int32), 0)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(num_rows_ptr, before + tl.sum(hits_S, 0))
    row_S = before + tl.cumsum(hits_S, 0) - hits_S
    tl.store(slots_ptr + row_S, slot_S, mask=came_S)
    # Load everything a row needs before storing any of it.
    k_K = tl.arange(0, BLOCK_K)
    came_SK = came_S[:, None] & (k_K < K)[None, :]
    word_SK = (slot_S.to(tl.int64) * (2 * K))[:, None] + k_K[None, :]
    ids_SK = tl.load(_at(slab + routes_at, tl.int32) + word_SK, mask=came_SK)
    weights_SK = tl.load(_at(slab + routes_at, tl.float32) + K + word_SK, mask=came_SK)
    cell_SK = row_S[:, None] * K + k_K[None, :]
    tl.store(ids_ptr + cell_SK, ids_SK, mask=came_SK)
    tl.store(weights_ptr + cell_SK, weights_SK, mask=came_SK)
    tile_S1 = (row_S // tile_rows)[:, None]
    pair_SK = cell_SK - tile_S1 * tile_rows * K
    here_SK = came_SK & (ids_SK < EXPERTS)
    tile_counts_S1 = list_counts_ptr + tile_S1 * ((EXPERTS + 1) * WORDS)
    add_pairs(ids_SK, pair_SK, here_SK, tile_counts_S1, pairs_ptr + tile_S1 * (EXPERTS * tile_rows), tile_rows)


@triton.jit(do_not_specialize=["first", "most", "rank", "channel", "max_tokens", "last"])
def return_kernel(
    parts_ptr,
    slots_ptr,
    ids_ptr,
    num_rows_ptr,
    bases_ptr,
    state_ptr,
    slab,
    control,
    first,
    most,
    rank,
    channel,
    max_tokens,
    last,
    returned_at,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum the rows of a tile, at most `most` of them, starting at row `first` of all: a row's terms are added in the
    order of K and rounded once, and the sum goes back to the row's source. Programs stride over pieces of COLUMNS
    columns of a row.

    With the `last` tile, tell every rank that this rank is done with its rows; the one program that does so then waits
    for the others' sums. Only one, because many waiting programs could keep the ones they wait for off a shared GPU.
    """
    tl.extra.cuda.gdc_wait()
    PIECES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    lane_L = tl.arange(0, COLUMNS)
    rows = tl.minimum(tl.load(num_rows_ptr) - first, most)
    for piece in range(tl.program_id(0), rows * PIECES, tl.num_programs(0)):
        row = piece // PIECES
        column_L = piece % PIECES * COLUMNS + lane_L
        inside_L = column_L < D
        slot = tl.load(slots_ptr + row)
        to = tl.load(bases_ptr + slot // max_tokens) + returned_at
        terms_ptr = parts_ptr + row.to(tl.int64) * (K * D)
        sum_L = tl.zeros([COLUMNS], tl.float32)
        for k in tl.static_range(K):
            here = tl.load(ids_ptr + row * K + k) < EXPERTS
            sum_L += tl.load(terms_ptr + k * D + column_L, mask=inside_L & here, other=0.0).to(tl.float32)
        to_ptr = _at(to + (rank * max_tokens + slot % max_tokens).to(tl.int64) * (D * 2), tl.bfloat16)
        tl.store(to_ptr + column_L, sum_L.to(tl.bfloat16), mask=inside_L)
    if last == 1:
        if raise_flags(state_ptr, bases_ptr, rank, channel, _RETURNED, _RETURN, RANKS):
            wait(state_ptr, slab, control, rank, channel, _RETURN, RANKS)
    tl.extra.cuda.gdc_launch_dependents()
