"""The likeliest tokens of each row on the GPU, in two launches; `likeliest` in records.py is the reference.

Tokens have distinct keys: ordered by logit, then lower id first. A row's vocabulary is divided into blocks, and each
block's greatest key, its peak, is found; this reads the logits once. Let T be the k-th greatest peak. The k greatest
peaks are keys not less than T, so none of the row's k greatest keys is less than T; and a block with a key not less
than T has a peak not less than T, so it is one of the k blocks with those peaks. Hence only these blocks are read
again, and only their keys from T up are sorted: a few more than k, or in the worst case all of them.

A program processes one row, or one part of it, and compares keys, no two of which are equal: its result depends on
nothing else, in whatever order it is found.

Shape suffixes as in records.py, B blocks of a row, and Q keys that may have to be sorted.
"""

import torch
import triton
import triton.language as tl

from nmoe.worker.kernels.early import early
from nmoe.worker.sampler import ID_BITS

_BLOCK = 128  # tokens
_PART = 32  # blocks per program that finds peaks
_FEWEST = 32  # k is rounded up to a power of two, and to this: fewer kernels to compile
_WARPS = 16  # per row: 128 blocks are read at once
_ID_BITS, _LAST_ID = tl.constexpr(ID_BITS), tl.constexpr((1 << ID_BITS) - 1)
_LOWEST = tl.constexpr(-(1 << 31))  # below the order of any logit
_NONE = tl.constexpr(-(1 << 31 + ID_BITS))  # below the key of any token


@triton.jit
def _order(logits):
    """int32 in the order of the logits. NaN is the largest."""
    logits = logits.to(tl.float32) + 0.0  # -0.0 becomes 0.0
    bits = logits.to(tl.int32, bitcast=True)
    return tl.where(logits == logits, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _keys(orders, ids):
    """int64 keys from the order of the logits and the ids, both int32."""
    return (orders.to(tl.int64) << _ID_BITS) | (ids ^ _LAST_ID)


@triton.jit
def _ids(keys):
    """The ids of these keys, int32."""
    return (keys & _LAST_ID).to(tl.int32) ^ _LAST_ID


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["rows_ptr"])
def _peaks_kernel(logits_ptr, rows_ptr, peaks_ptr, vocab, blocks, BLOCK: tl.constexpr, PART: tl.constexpr):
    """The greatest key of each block."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    n, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    row_ptr = logits_ptr + tl.load(rows_ptr + n) * vocab
    block = part * PART + tl.arange(0, PART)
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    orders = _order(tl.load(row_ptr + ids, mask=ids < vocab, other=0.0))
    orders = tl.where(ids < vocab, orders, _LOWEST)
    highest = tl.max(orders, 1)
    first = tl.min(tl.where(orders == highest[:, None], ids, vocab), 1)
    tl.store(peaks_ptr + n * blocks + block, _keys(highest, first), mask=block < blocks)


@triton.jit
def _greatest(keys_ptr, num_keys, K: tl.constexpr):
    """The K greatest of these keys, descending, int64 [K], padded with `_NONE`."""
    best = tl.full([K], _NONE, tl.int64)
    lane = tl.arange(0, K)
    for start in range(0, num_keys, K):
        more = tl.load(keys_ptr + start + lane, mask=start + lane < num_keys, other=_NONE)
        best = tl.topk(tl.reshape(tl.join(best, more), [2 * K]), K)
    return best


@triton.jit(do_not_specialize=["blocks", "count"], do_not_specialize_on_alignment=["rows_ptr"])
def _likeliest_kernel(
    logits_ptr,
    rows_ptr,
    peaks_ptr,
    kept_ptr,
    ids_ptr,
    vocab,
    blocks,
    count,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
):
    """One program per row: its `count` likeliest ids. Keys to sort pass through `kept_ptr`, K * BLOCK per row."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K)
    index = tl.arange(0, PADDED)
    peaks = tl.topk(tl.load(peaks_ptr + n * blocks + index, mask=index < blocks, other=_NONE), K)
    least = tl.sum(tl.where(place == count - 1, peaks, 0), 0)
    block = tl.where(peaks >= least, _ids(peaks) // BLOCK, blocks)
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    row_ptr = logits_ptr + tl.load(rows_ptr + n) * vocab
    keys = _keys(_order(tl.load(row_ptr + ids, mask=ids < vocab, other=0.0)), ids)
    keep = (keys >= least) & (ids < vocab)
    counts = tl.sum(keep.to(tl.int32), 1)
    ends = (tl.cumsum(counts, 0) - counts)[:, None] + tl.cumsum(keep.to(tl.int32), 1)
    kept_ptr += n * (K * BLOCK)
    tl.store(kept_ptr + ends - 1, keys, mask=keep)
    tl.debug_barrier()  # threads read what other threads wrote
    best = _greatest(kept_ptr, tl.sum(counts, 0), K)
    tl.store(ids_ptr + n * count + place, _ids(best).to(tl.int64), mask=place < count)


def likeliest(logits_SV: torch.Tensor, rows_N: torch.Tensor, count: int) -> torch.Tensor:
    """See records.py. `logits_SV` is contiguous, bfloat16 or float32; `count` is at most V."""
    num_rows, vocab = len(rows_N), logits_SV.shape[1]
    most = max(_FEWEST, triton.next_power_of_2(count))
    blocks = triton.cdiv(vocab, _BLOCK)
    padded = max(most, triton.next_power_of_2(blocks))
    peaks_NB = logits_SV.new_empty(num_rows, blocks, dtype=torch.int64)
    kept_NQ = logits_SV.new_empty(num_rows, most * _BLOCK, dtype=torch.int64)
    ids_NK = logits_SV.new_empty(num_rows, count, dtype=torch.int64)
    grid, pdl = (triton.cdiv(blocks, _PART), num_rows), early(num_rows)
    _peaks_kernel[grid](
        logits_SV, rows_N, peaks_NB, vocab, blocks, BLOCK=_BLOCK, PART=_PART, num_warps=4, launch_pdl=pdl
    )
    _likeliest_kernel[(num_rows,)](
        logits_SV,
        rows_N,
        peaks_NB,
        kept_NQ,
        ids_NK,
        vocab,
        blocks,
        count,
        PADDED=padded,
        BLOCK=_BLOCK,
        K=most,
        num_warps=_WARPS,
        launch_pdl=pdl,
    )
    return ids_NK
