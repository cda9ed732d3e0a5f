"""Sampling on the GPU in a few launches; `nmoe/worker/sampler.py` is the reference and specifies what is drawn.

A row's vocabulary is divided into blocks. All blocks' peaks, then the sums of their integer weights, determine in which
block the row's uniform number falls, and there the token. For rows with top-k or top-p, the smallest weight kept is
found in between, by bisection over the order of the logits: nothing is sorted. Integer sums are the same in any order,
so a row's token does not depend on other rows. Parameters are in a table by slot, so a captured step serves any rows.

In a row's peak a NaN logit counts as infinity, because a maximum would not propagate it; a row whose peak is not finite
gets NO_TOKEN. Anything else computed for such a row is meaningless but stays within bounds.

Shape suffixes: S rows that sample, V vocabulary, B blocks, N slots.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from nmoe.worker.kernels.early import early
from nmoe.worker.sampler import NO_TOKEN

BLOCK = 4096  # logits per program
_ONE = tl.constexpr(2.0**40)  # the weight of a row's likeliest token
PARAMETERS = 5  # int64 words per slot: temperature, then those below; temperature and top_p are float64
_LEAST, _TOP_K, _TOP_P, _SEED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
_WIDTH = tl.constexpr(PARAMETERS)
_NO_TOKEN = tl.constexpr(NO_TOKEN)


@triton.jit
def _weights(logits, peak, temperature, least):
    """Integer weights, int64; zero below `least`."""
    shares = libdevice.exp(tl.div_rn(logits - peak, tl.zeros_like(logits) + temperature))
    weights = (shares * _ONE).to(tl.int64)
    return tl.where(weights < least, 0, weights)


@triton.jit
def _parameters(table_ptr, slot):
    """Temperature, float32, and the least weight that min-p keeps."""
    at = table_ptr + slot.to(tl.int64) * _WIDTH
    return tl.load(at.to(tl.pointer_type(tl.float64))).to(tl.float32), tl.load(at + _LEAST)


@triton.jit(do_not_specialize=["vocab"])
def _peaks_kernel(logits_ptr, peaks_ptr, places_ptr, vocab, row_stride, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Each block's largest logit and the first position that has it."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    token = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * row_stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("inf"))
    peak = tl.max(logits, 0)
    tl.store(peaks_ptr + row * BLOCKS + block, peak)
    tl.store(places_ptr + row * BLOCKS + block, tl.min(tl.where(logits == peak, token, vocab - 1), 0))


@triton.jit(do_not_specialize=["vocab"])
def _sums_kernel(
    logits_ptr,
    slots_ptr,
    table_ptr,
    peaks_ptr,
    sums_ptr,
    vocab,
    row_stride,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of the blocks' weights, in the rows that draw."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    temperature, least = _parameters(table_ptr, tl.load(slots_ptr + row))
    if temperature > 0:
        index = tl.arange(0, PADDED)
        peak = tl.max(tl.load(peaks_ptr + row * BLOCKS + index, mask=index < BLOCKS, other=float("-inf")), 0)
        token = block * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * row_stride + token, mask=token < vocab, other=float("-inf"))
        weights = _weights(logits.to(tl.float32), peak, temperature, least)
        tl.store(sums_ptr + row * BLOCKS + block, tl.sum(weights, 0))


@triton.jit
def _key(logits):
    """int32 in the order of the float32 logits."""
    bits = logits.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight_of(key, SHIFT: tl.constexpr, peak, temperature, least):
    """The weight of the logit with this key: `_key` without the low bits that the logits' dtype does not have."""
    whole = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    bits = whole.to(tl.int32)
    logit = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.sum(_weights(tl.zeros([1], tl.float32) + logit, peak, temperature, least), 0)


@triton.jit
def _reach(
    row_ptr,
    vocab,
    low,
    high,
    wanted,
    peak,
    temperature,
    least,
    COUNT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key in [low, high) such that the tokens from it on are `wanted` in number, or in weight; `low` must
    be small enough. Each pass over the row divides the interval by four."""
    lane = tl.arange(0, BLOCK)
    while high - low > 1:
        quarter = tl.maximum((high - low) >> 2, 1)
        first = (low + quarter).to(tl.int32)
        second = (low + 2 * quarter).to(tl.int32)
        third = (low + 3 * quarter).to(tl.int32)
        from_first = tl.zeros([BLOCK], tl.int64)
        from_second = tl.zeros([BLOCK], tl.int64)
        from_third = tl.zeros([BLOCK], tl.int64)
        for start in range(0, vocab, BLOCK):
            inside = start + lane < vocab
            logits = tl.load(row_ptr + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
            key = _key(logits) >> SHIFT
            if COUNT:
                amount = inside.to(tl.int64)
            else:
                amount = _weights(logits, peak, temperature, least)
            from_first += tl.where(key >= first, amount, 0)
            from_second += tl.where(key >= second, amount, 0)
            from_third += tl.where(key >= third, amount, 0)
        if tl.sum(from_third, 0).to(tl.float64) >= wanted:
            low = low + 3 * quarter
        elif tl.sum(from_second, 0).to(tl.float64) >= wanted:
            low = low + 2 * quarter
            high = tl.minimum(high, low + quarter)
        elif tl.sum(from_first, 0).to(tl.float64) >= wanted:
            low = low + quarter
            high = tl.minimum(high, low + quarter)
        else:
            high = low + quarter
    return low


@triton.jit
def _load_weights(logits_row, start, vocab, peak, temperature, least, BLOCK: tl.constexpr):
    """The weights of the tokens from `start` on, int64 [BLOCK]. `logits_row` [BLOCK] points to the row's first ones."""
    exists = start + tl.arange(0, BLOCK) < vocab
    logits = tl.load(logits_row + start, mask=exists, other=float("-inf"))
    return _weights(logits.to(tl.float32), peak, temperature, least)


@triton.jit
def _heavier(logits_row, vocab, floor, peak, temperature, least, BLOCK: tl.constexpr):
    """The weights above `floor`, int64, and their number, int32: one per lane [BLOCK], to be summed."""
    above = tl.zeros([BLOCK], tl.int64)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        weights = _load_weights(logits_row, start, vocab, peak, temperature, least, BLOCK)
        above += tl.where(weights > floor, weights, 0)
        counts += (weights > floor).to(tl.int32)
    return above, counts


@triton.jit
def _times(weight, kept, enough):
    """How many times a weight must be added to `kept` to reach `enough`, float64."""
    missing = tl.maximum(enough - kept.to(tl.float64), 0.0)
    times = tl.ceil(missing / tl.maximum(weight, 1).to(tl.float64)).to(tl.int64)
    # The quotient may be rounded, but the reference compares sums.
    one_less = (kept + (times - 1) * weight).to(tl.float64)
    times = tl.where((times > 0) & (one_less >= enough), times - 1, times)
    return tl.where((kept + times * weight).to(tl.float64) < enough, times + 1, times)


@triton.jit
def _store_kept(sums_row, ties_row, logits_row, vocab, floor, allowed, peak, temperature, least, BLOCK: tl.constexpr):
    """Store each block's sum of kept weights, and the number of weights equal to `floor` in the blocks before it."""
    tied = tl.zeros([], tl.int32)
    for start in range(0, vocab, BLOCK):
        weights = _load_weights(logits_row, start, vocab, peak, temperature, least, BLOCK)
        equal = (weights == floor).to(tl.int32)
        place = tied + tl.cumsum(equal, 0) - equal
        keep = (weights > floor) | ((weights == floor) & (place < allowed))
        tl.store(sums_row + start // BLOCK, tl.sum(tl.where(keep, weights, 0), 0))
        tl.store(ties_row + start // BLOCK, tied)
        tied += tl.sum(equal, 0)


@triton.jit(do_not_specialize=["vocab"])
def _filter_kernel(
    logits_ptr,
    slots_ptr,
    table_ptr,
    peaks_ptr,
    sums_ptr,
    floors_ptr,
    allowed_ptr,
    ties_ptr,
    vocab,
    row_stride,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: the weight above which all tokens are kept, how many with exactly that weight are kept,
    lower ids first, and the blocks' sums of kept weights."""
    row = tl.program_id(0).to(tl.int64)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_ptr + row)
    temperature, least = _parameters(table_ptr, slot)
    at = table_ptr + slot.to(tl.int64) * _WIDTH
    top_k = tl.load(at + _TOP_K)
    top_p = tl.load((at + _TOP_P).to(tl.pointer_type(tl.float64)))
    floor = tl.zeros([], tl.int64)
    allowed = tl.zeros([], tl.int64)
    if (temperature > 0) & ((top_k < vocab) | (top_p < 1)):
        index = tl.arange(0, PADDED)
        peak = tl.max(tl.load(peaks_ptr + row * BLOCKS + index, mask=index < BLOCKS, other=float("-inf")), 0)
        lane = tl.arange(0, BLOCK)
        base = logits_ptr + row * row_stride
        logits_row = base + lane
        SHIFT: tl.constexpr = 16 if logits_ptr.dtype.element_ty == tl.bfloat16 else 0
        # Below this key every weight is zero.
        low = (_key(peak - 28 * temperature) >> SHIFT).to(tl.int64)
        high = (_key(peak) >> SHIFT).to(tl.int64) + 1
        if top_k < vocab:
            wanted = top_k.to(tl.float64)
            low = _reach(base, vocab, low, high, wanted, peak, temperature, least, True, SHIFT, BLOCK)
        # The sum of the greater weights, and how many times the weight itself counts.
        floor = _weight_of(low, SHIFT, peak, temperature, least)
        above, counts = _heavier(logits_row, vocab, floor, peak, temperature, least, BLOCK)
        allowed = tl.where(floor > 0, top_k - tl.sum(counts, 0), 0)
        if top_p < 1:
            total = tl.sum(above, 0) + allowed * floor
            enough = tl.maximum(total.to(tl.float64) * top_p, 1.0)
            low = _reach(base, vocab, low, high, enough, peak, temperature, least, False, SHIFT, BLOCK)
            floor = _weight_of(low, SHIFT, peak, temperature, least)
            above, _ = _heavier(logits_row, vocab, floor, peak, temperature, least, BLOCK)
            allowed = _times(floor, tl.sum(above, 0), enough)
        sums_row, ties_row = sums_ptr + row * BLOCKS, ties_ptr + row * BLOCKS
        _store_kept(sums_row, ties_row, logits_row, vocab, floor, allowed, peak, temperature, least, BLOCK)
    tl.store(floors_ptr + row, floor)
    tl.store(allowed_ptr + row, allowed)


@triton.jit(do_not_specialize=["vocab"], do_not_specialize_on_alignment=["ends_ptr", "slots_ptr"])
def _pick_kernel(
    logits_ptr,
    slots_ptr,
    ends_ptr,
    table_ptr,
    peaks_ptr,
    places_ptr,
    sums_ptr,
    floors_ptr,
    allowed_ptr,
    ties_ptr,
    tokens_ptr,
    logprobs_ptr,
    last_ptr,
    vocab,
    row_stride,
    FILTERED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: its token, which becomes its slot's last, and the log of its share of the weights."""
    row = tl.program_id(0).to(tl.int64)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_ptr + row)
    temperature, least = _parameters(table_ptr, slot)
    index = tl.arange(0, PADDED)
    exists = index < BLOCKS
    peaks = tl.load(peaks_ptr + row * BLOCKS + index, mask=exists, other=float("-inf"))
    peak = tl.max(peaks, 0)
    places = tl.load(places_ptr + row * BLOCKS + index, mask=exists, other=0)
    token = tl.min(tl.where(exists & (peaks == peak), places, vocab - 1), 0)
    logprob = tl.zeros([], tl.float32)
    if temperature > 0:
        seed = tl.load(table_ptr + slot.to(tl.int64) * _WIDTH + _SEED)
        counter = tl.load(ends_ptr + row).to(tl.uint32)
        high, low, _, _ = tl.philox(seed, counter, counter * 0, counter * 0, counter * 0)
        bits = (high.to(tl.uint64) << 21) | (low.to(tl.uint64) >> 11)
        uniform = bits.to(tl.float64) * 1.1102230246251565e-16
        sums = tl.load(sums_ptr + row * BLOCKS + index, mask=exists, other=0)
        ends = tl.cumsum(sums, 0)
        total = tl.sum(sums, 0)
        target = tl.minimum((total.to(tl.float64) * uniform).to(tl.int64), total - 1)
        block = tl.minimum(tl.sum((exists & (ends <= target)).to(tl.int32), 0), BLOCKS - 1)
        target -= tl.sum(tl.where(index < block, sums, 0), 0)
        lane = tl.arange(0, BLOCK)
        at = block * BLOCK + lane
        logits = tl.load(logits_ptr + row * row_stride + at, mask=at < vocab, other=float("-inf"))
        weights = _weights(logits.to(tl.float32), peak, temperature, least)
        if FILTERED:
            floor = tl.load(floors_ptr + row)
            if floor > 0:
                equal = (weights == floor).to(tl.int32)
                place = tl.load(ties_ptr + row * BLOCKS + block) + tl.cumsum(equal, 0) - equal
                keep = (weights > floor) | ((weights == floor) & (place < tl.load(allowed_ptr + row)))
                weights = tl.where(keep, weights, 0)
        hit = tl.minimum(tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0), BLOCK - 1)
        token = tl.minimum(block * BLOCK + hit, vocab - 1)
        weight = tl.sum(tl.where(lane == hit, weights, 0), 0)
        logprob = libdevice.log(weight.to(tl.float64) / total.to(tl.float64)).to(tl.float32)
    tl.store(tokens_ptr + row, tl.where(tl.abs(peak) < float("inf"), token, _NO_TOKEN))
    tl.store(logprobs_ptr + row, logprob)
    tl.store(last_ptr + slot, token)  # a valid one: the next step may already be in flight and read it


def sample_rows(
    logits_SV: torch.Tensor,
    slots_S: torch.Tensor,
    ends_S: torch.Tensor,
    table_NP: torch.Tensor,
    last_N: torch.Tensor,
    *,
    filtered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, int32 [S], which become their slots' last ones, and their log-probabilities under the distributions they
    were drawn from, float32 [S], 0 for greedy ones. NO_TOKEN where the logits are not finite; the slot's last token is
    then arbitrary.

    `slots_S` and `ends_S` int32: the rows' slots and the positions of their tokens. `table_NP` int64: see PARAMETERS.
    `filtered`: whether any row has top-k or top-p.
    """
    rows, vocab = logits_SV.shape
    blocks = triton.cdiv(vocab, BLOCK)
    new = logits_SV.new_empty
    peaks, places = new(rows, blocks, dtype=torch.float32), new(rows, blocks, dtype=torch.int32)
    sums, ties = new(rows, blocks, dtype=torch.int64), new(rows, blocks, dtype=torch.int32)
    floors, allowed = new(rows, dtype=torch.int64), new(rows, dtype=torch.int64)
    tokens, logprobs = new(rows, dtype=torch.int32), new(rows, dtype=torch.float32)
    stride, padded = logits_SV.stride(0), triton.next_power_of_2(blocks)
    pdl = {"launch_pdl": early(rows)}
    _peaks_kernel[(blocks, rows)](logits_SV, peaks, places, vocab, stride, BLOCKS=blocks, BLOCK=BLOCK, **pdl)
    sizes = {"BLOCKS": blocks, "PADDED": padded, "BLOCK": BLOCK}
    _sums_kernel[(blocks, rows)](logits_SV, slots_S, table_NP, peaks, sums, vocab, stride, **sizes, **pdl)
    if filtered:
        _filter_kernel[(rows,)](
            logits_SV,
            slots_S,
            table_NP,
            peaks,
            sums,
            floors,
            allowed,
            ties,
            vocab,
            stride,
            **sizes,
            num_warps=16,
            **pdl,
        )
    _pick_kernel[(rows,)](
        logits_SV,
        slots_S,
        ends_S,
        table_NP,
        peaks,
        places,
        sums,
        floors,
        allowed,
        ties,
        tokens,
        logprobs,
        last_N,
        vocab,
        stride,
        FILTERED=filtered,
        **sizes,
        num_warps=8,
        **pdl,
    )
    return tokens, logprobs
