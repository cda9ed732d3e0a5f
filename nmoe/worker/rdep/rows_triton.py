"""How rows move between GPUs: pushed to the ranks that own their experts, found there, summed, pushed back, added up.

Every kernel works on addresses: a rank's own slab is ordinary memory to it, and the others' are mapped. What is pushed
is stored straight into the owner's slab; nothing is ever read from another GPU. Rows are bfloat16, or FP8 with a scale
per 128 columns, as `fp8_triton.scales_of` finds it; sums are bfloat16.

Shape suffixes: N ranks, T tokens of this rank, C slots per rank, K experts per token, D hidden, E experts of a rank,
G groups of 128 columns, S rows that arrived, L lanes.
"""

import triton
import triton.language as tl

from nmoe.slab import LINE
from nmoe.worker.kernels.fp8_triton import scales_of
from nmoe.worker.rdep import signals_triton
from nmoe.worker.rdep.signals_triton import raise_flags, wait

_LINE = tl.constexpr(LINE)
_PUSHED = tl.constexpr(signals_triton.PUSHED)
_RETURNED = tl.constexpr(signals_triton.RETURNED)
_DISPATCH = tl.constexpr(0)
_RETURN = tl.constexpr(1)


@triton.jit
def _at(address, dtype: tl.constexpr):
    """A pointer to whole 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _push_routes(
    ids_ptr,
    weights_ptr,
    bases_ptr,
    token,
    slot,
    counts_at,
    routes_at,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Every rank hears how many of its experts a token wants, int32 [N], returned; those that have any, which ones, and
    their weights."""
    rank_N = tl.arange(0, RANKS)
    base_N = tl.load(bases_ptr + rank_N)
    k_K = tl.arange(0, BLOCK_K)
    ids_K = tl.load(ids_ptr + token * K + k_K, mask=k_K < K, other=RANKS * EXPERTS)
    weights_K = tl.load(weights_ptr + token * K + k_K, mask=k_K < K, other=0.0)
    here_NK = (ids_K // EXPERTS)[None, :] == rank_N[:, None]
    hits_NK = here_NK.to(tl.int32)
    counts_N = tl.sum(hits_NK, 1)
    tl.store((base_N + counts_at + slot * 4).to(tl.pointer_type(tl.int32)), counts_N)
    # An owner's experts first, in the order of K, so that it need not look at the places of the others.
    before_NK = tl.cumsum(hits_NK, 1) - hits_NK
    place_NK = tl.where(here_NK, before_NK, counts_N[:, None] + k_K[None, :] - before_NK)
    route_NK = base_N[:, None] + (routes_at + slot * (8 * K)) + place_NK.to(tl.int64) * 4
    wanted_NK = (counts_N > 0)[:, None] & (k_K < K)[None, :]
    local_NK = tl.where(here_NK, ids_K[None, :] - rank_N[:, None] * EXPERTS, EXPERTS)
    tl.store(route_NK.to(tl.pointer_type(tl.int32)), local_NK, mask=wanted_NK)
    spread_NK = tl.broadcast_to(weights_K[None, :], (RANKS, BLOCK_K))
    tl.store((route_NK + 4 * K).to(tl.pointer_type(tl.float32)), spread_NK, mask=wanted_NK)
    return counts_N


@triton.jit
def _is_wanted(counts_N, peer, RANKS: tl.constexpr):
    """Whether a token wants any expert of rank `peer`."""
    return tl.sum(tl.where(tl.arange(0, RANKS) == peer, counts_N, 0), 0) > 0


@triton.jit
def _push_row(
    x_ptr,
    bases_ptr,
    counts_N,
    token,
    slot,
    x_stride,
    hidden_at,
    RANKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A token's row, bfloat16 [D], to every rank of which it wants experts."""
    lane_L = tl.arange(0, BLOCK_D)
    x_L = tl.load(x_ptr + token.to(tl.int64) * x_stride + lane_L, mask=lane_L < D)
    for peer in tl.static_range(RANKS):
        if _is_wanted(counts_N, peer, RANKS):
            to_ptr = _at(tl.load(bases_ptr + peer) + hidden_at + slot * (D * 2), tl.bfloat16)
            tl.store(to_ptr + lane_L, x_L, mask=lane_L < D)


@triton.jit
def _push_quantised(
    x_ptr,
    bases_ptr,
    counts_N,
    token,
    slot,
    x_stride,
    hidden_at,
    scales_at,
    RANKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The same row as FP8 [D], and its scales, float32 [G]."""
    GROUPS: tl.constexpr = D // 128
    group_G = tl.arange(0, BLOCK_D // 128)
    inside_G = group_G < GROUPS
    lane_GL = group_G[:, None] * 128 + tl.arange(0, 128)[None, :]
    row_ptr = x_ptr + token.to(tl.int64) * x_stride
    x_GL = tl.load(row_ptr + lane_GL, mask=inside_G[:, None], other=0.0).to(tl.float32)
    scales_G = scales_of(x_GL)
    values_GL = (x_GL / scales_G[:, None]).to(tl.float8e4nv)
    for peer in tl.static_range(RANKS):
        if _is_wanted(counts_N, peer, RANKS):
            base = tl.load(bases_ptr + peer)
            values_ptr = _at(base + hidden_at + slot * D, tl.float8e4nv)
            tl.store(values_ptr + lane_GL, values_GL, mask=inside_G[:, None])
            scales_ptr = (base + scales_at + slot * (GROUPS * 4)).to(tl.pointer_type(tl.float32))
            tl.store(scales_ptr + group_G, scales_G, mask=inside_G)


@triton.jit(do_not_specialize=["tokens", "rank", "channel", "max_tokens"])
def dispatch_kernel(
    x_ptr,
    ids_ptr,
    weights_ptr,
    bases_ptr,
    state_ptr,
    real_ptr,
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
    BLOCK_D: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """One token per program: its row goes once to every rank that it wants, with the ids and weights for that rank, and
    every rank hears how many of its experts it wants. Only the first `real` tokens are no padding."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    if real_ptr is not None:
        tokens = tl.minimum(tokens, tl.load(real_ptr).to(tl.int32))
    if token < tokens:
        slot = (rank * max_tokens + token).to(tl.int64)
        counts_N = _push_routes(
            ids_ptr, weights_ptr, bases_ptr, token, slot, counts_at, routes_at, RANKS, EXPERTS, K, BLOCK_K
        )
        if QUANTISED:
            _push_quantised(x_ptr, bases_ptr, counts_N, token, slot, x_stride, hidden_at, scales_at, RANKS, D, BLOCK_D)
        else:
            _push_row(x_ptr, bases_ptr, counts_N, token, slot, x_stride, hidden_at, RANKS, D, BLOCK_D)
    raise_flags(state_ptr, bases_ptr, rank, tokens, tl.num_programs(0), channel, _PUSHED, _DISPATCH, RANKS)


@triton.jit
def _arrived(slab, lines, index_S, most, max_tokens, counts_at, RANKS: tl.constexpr):
    """Of these pairs (source, token), in that order, `most` per source: their slots, and whether a row came."""
    source_S = index_S // most
    token_S = index_S % most
    from_S = source_S < RANKS
    line_S = lines + source_S.to(tl.int64) * _LINE + 8
    sent_S = tl.load(line_S.to(tl.pointer_type(tl.int64)), mask=from_S, other=0)
    slot_S = source_S * max_tokens + token_S
    count_ptr_S = (slab + counts_at + slot_S.to(tl.int64) * 4).to(tl.pointer_type(tl.int32))
    exists_S = from_S & (token_S < sent_S)
    return slot_S, tl.load(count_ptr_S, mask=exists_S, other=0) > 0


@triton.jit(do_not_specialize=["rank", "channel", "max_tokens", "most"])
def arrive_kernel(
    state_ptr,
    slots_ptr,
    ids_ptr,
    weights_ptr,
    num_rows_ptr,
    slab,
    control,
    rank,
    channel,
    max_tokens,
    most,
    counts_at,
    routes_at,
    RANKS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Waits for all ranks' rows, then lists them in the order of their slots: slot, ids [S, K], weights [S, K]. Each
    program takes a block of slots, and counts for itself how many rows lie in those before. Then their number."""
    tl.extra.cuda.gdc_wait()
    wait(state_ptr, slab, control, rank, channel, _DISPATCH, RANKS)
    tl.extra.cuda.gdc_launch_dependents()
    lines = slab + (channel * 2 + _DISPATCH) * (RANKS * _LINE)
    lane_S = tl.arange(0, BLOCK)
    first = tl.program_id(0) * BLOCK
    before = 0
    for start in range(0, first, SCAN):
        index_S = start + tl.arange(0, SCAN)
        _, came_S = _arrived(slab, lines, index_S, most, max_tokens, counts_at, RANKS)
        before += tl.sum((came_S & (index_S < first)).to(tl.int32), 0)
    slot_S, came_S = _arrived(slab, lines, first + lane_S, most, max_tokens, counts_at, RANKS)
    hits_S = came_S.to(tl.int32)
    row_S = before + tl.cumsum(hits_S, 0) - hits_S
    tl.store(slots_ptr + row_S, slot_S, mask=came_S)
    route_S = slab + routes_at + slot_S.to(tl.int64) * (8 * K)
    for k in tl.static_range(K):
        ids_S = tl.load((route_S + 4 * k).to(tl.pointer_type(tl.int32)), mask=came_S)
        tl.store(ids_ptr + row_S * K + k, ids_S, mask=came_S)
        weights_S = tl.load((route_S + 4 * (K + k)).to(tl.pointer_type(tl.float32)), mask=came_S)
        tl.store(weights_ptr + row_S * K + k, weights_S, mask=came_S)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(num_rows_ptr, before + tl.sum(hits_S, 0))


@triton.jit(do_not_specialize=["first", "rank", "channel", "max_tokens", "last"])
def return_kernel(
    parts_ptr,
    slots_ptr,
    num_rows_ptr,
    bases_ptr,
    state_ptr,
    slab,
    first,
    rank,
    channel,
    max_tokens,
    last,
    counts_at,
    returned_at,
    RANKS: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row per program, from row `first` on: its terms are added in the order of K, rounded once, and the sum goes
    back to the row's source. With the `last` tile every rank hears that this rank is done with their rows."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    if first + row < tl.load(num_rows_ptr):
        slot = tl.load(slots_ptr + first + row)
        source = slot // max_tokens
        token = slot % max_tokens
        count = tl.load((slab + counts_at + slot.to(tl.int64) * 4).to(tl.pointer_type(tl.int32)))
        lane_L = tl.arange(0, BLOCK_D)
        inside_L = lane_L < D
        terms_ptr = parts_ptr + row.to(tl.int64) * (K * D)
        sum_L = tl.zeros([BLOCK_D], tl.float32)
        for k in tl.static_range(K):
            sum_L += tl.load(terms_ptr + k * D + lane_L, mask=inside_L & (k < count), other=0.0).to(tl.float32)
        to = tl.load(bases_ptr + source) + returned_at + (rank * max_tokens + token).to(tl.int64) * (D * 2)
        to_ptr = _at(to, tl.bfloat16)
        tl.store(to_ptr + lane_L, sum_L.to(tl.bfloat16), mask=inside_L)
    if last == 1:
        raise_flags(state_ptr, bases_ptr, rank, row * 0, tl.num_programs(0), channel, _RETURNED, _RETURN, RANKS)


@triton.jit(do_not_specialize=["rank", "channel"])
def wait_kernel(state_ptr, slab, control, rank, channel, RANKS: tl.constexpr):
    """Waits for all ranks' sums. One program: many that wait could keep those they wait for off the GPU they share."""
    tl.extra.cuda.gdc_wait()
    wait(state_ptr, slab, control, rank, channel, _RETURN, RANKS)
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["max_tokens"])
def sum_kernel(
    ids_ptr,
    out_ptr,
    slab,
    max_tokens,
    returned_at,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token per program: its owners' sums, added in float32 in the order of the ranks."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    k_K = tl.arange(0, BLOCK_K)
    owner_K = tl.load(ids_ptr + token * K + k_K, mask=k_K < K, other=RANKS * EXPERTS) // EXPERTS
    lane_L = tl.arange(0, BLOCK_D)
    inside_L = lane_L < D
    sum_L = tl.zeros([BLOCK_D], tl.float32)
    for owner in tl.static_range(RANKS):
        if tl.sum((owner_K == owner).to(tl.int32), 0) > 0:
            from_ptr = _at(slab + returned_at + (owner * max_tokens + token) * (D * 2), tl.bfloat16)
            sum_L += tl.load(from_ptr + lane_L, mask=inside_L, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + lane_L, sum_L, mask=inside_L)
