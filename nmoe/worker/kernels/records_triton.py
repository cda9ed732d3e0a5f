"""Records on the GPU; `records.py` is the reference.

One program processes one row of logits. The bits depend neither on the batch nor on the dtype that the same logits come
in: the dtype affects which thread holds which logits, and hence the order of a sum. So the exponentials are summed as
integers, whose sum is the same in any order; the rounding error of each is below 2**-41 of the largest.

Shape suffixes as in records.py.
"""

import torch
import triton
import triton.language as tl

from nmoe.outputs import MAX_SCORED, MAX_TOP_K
from nmoe.worker.kernels.records import HEAD

_BLOCK = 4096
_ONE = 2.0**40  # the likeliest token's exponential
_MOST_IDS = MAX_TOP_K + MAX_SCORED  # room for all in every shape: only one kernel to compile


@triton.jit(do_not_specialize=["width", "top_k", "num_ids"])
def _records_kernel(
    logits_ptr,
    rows_ptr,
    tokens_ptr,
    drawn_ptr,
    ids_ptr,
    words_ptr,
    width,
    top_k,
    num_ids,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HEAD: tl.constexpr,
    ONE: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + tl.load(rows_ptr + n) * V
    token = tl.load(row_ptr + tl.maximum(tl.load(tokens_ptr + n), 0)).to(tl.float32)  # in case of NO_TOKEN
    lane = tl.arange(0, BLOCK)
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    greater = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        peaks = tl.maximum(peaks, tl.where(x == x, x, float("inf")))  # a maximum would not propagate NaN
        greater += (x > token).to(tl.int32)
    peak = tl.max(peaks, 0)
    peak = tl.where(tl.abs(peak) < float("inf"), peak, float("nan"))
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        sums += (tl.exp(x - peak) * ONE + 0.5).to(tl.int64)
    log_sum = tl.log((tl.sum(sums, 0).to(tl.float64) / ONE).to(tl.float32))
    words = words_ptr + n * width
    tl.store(words, (token - peak - log_sum).to(tl.int32, bitcast=True))
    tl.store(words + 1, tl.load(drawn_ptr + n).to(tl.int32, bitcast=True))
    tl.store(words + 2, tl.sum(greater, 0) + 1)
    place = tl.arange(0, BLOCK_C)
    exists = place < num_ids
    ids = tl.load(ids_ptr + n * num_ids + place, mask=exists, other=0)
    logprobs = tl.load(row_ptr + ids, mask=exists, other=0.0).to(tl.float32) - peak - log_sum
    tl.store(words + HEAD + place, ids.to(tl.int32), mask=place < top_k)
    tl.store(words + HEAD + top_k + place, logprobs.to(tl.int32, bitcast=True), mask=exists)


def records(
    logits_SV: torch.Tensor,
    rows_N: torch.Tensor,
    tokens_N: torch.Tensor,
    drawn_N: torch.Tensor | float,
    ids_NC: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """See records.py. `logits_SV` is contiguous, in any dtype."""
    count, num_ids = ids_NC.shape
    width = HEAD + top_k + num_ids
    words_NW = torch.empty(count, width, dtype=torch.int32, device=logits_SV.device)
    if isinstance(drawn_N, float):
        drawn_N = torch.full((count,), drawn_N, device=logits_SV.device)
    _records_kernel[(count,)](
        logits_SV,
        rows_N,
        tokens_N,
        drawn_N,
        ids_NC,
        words_NW,
        width,
        top_k,
        num_ids,
        V=logits_SV.shape[1],
        BLOCK=_BLOCK,
        BLOCK_C=_MOST_IDS,
        HEAD=HEAD,
        ONE=_ONE,
        num_warps=8,
    )
    return words_NW
