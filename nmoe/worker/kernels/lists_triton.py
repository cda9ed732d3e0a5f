"""Every expert's list of pairs, built by the kernels that learn a token's experts, and read in tiles of rows; see
`lists.py` for the format.

One kernel zeroes the counts, a later one adds pairs, and kernels after that read them.

Shape suffixes as in lists.py.
"""

import triton
import triton.language as tl

from nmoe.worker.kernels import lists

WORDS = tl.constexpr(lists.WORDS)


@triton.jit
def clear_counts(counts_ptr, count, program, programs, BLOCK: tl.constexpr):
    """Zero `count` words; each program takes a share."""
    for first in range(program * BLOCK, count, programs * BLOCK):
        word = first + tl.arange(0, BLOCK)
        tl.store(counts_ptr + word, tl.zeros([BLOCK], tl.int32), mask=word < count)


@triton.jit
def add_pairs(ids, pairs, exist, counts_ptr, pairs_ptr, capacity):
    """Add these pairs to their experts' lists. If the ids are not a router's, one may occur more often than its list is
    long; what does not fit is dropped."""
    place = tl.atomic_add(counts_ptr + ids * WORDS, 1, mask=exist, sem="relaxed")
    tl.store(pairs_ptr + ids * capacity + place, pairs, mask=exist & (place < capacity))


@triton.jit
def load_counts(counts_ptr, capacity, most, E: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr):
    """For each expert: its number of pairs, and where its tiles end when tiles are numbered across all experts, up to
    the `most` that there is room for, because a void step's counts may be anything. A kernel after the first one that
    reads them may call this before its wait (early.py)."""
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins * WORDS, mask=bins < E, other=0, cache_modifier=".cg")
    counts = tl.minimum(counts, capacity)
    return counts, tl.minimum(tl.cumsum((counts + ROWS - 1) // ROWS, 0), most)


@triton.jit
def find_tile(tile, counts, ends, ROWS: tl.constexpr):
    """A tile's expert, its first place in that expert's list, and how many pairs are left from there on."""
    past = ends <= tile
    expert = tl.sum(past.to(tl.int32), 0)
    first = (tile - tl.max(tl.where(past, ends, 0), 0)) * ROWS
    count = tl.sum(tl.where(tl.arange(0, counts.shape[0]) == expert, counts, 0), 0)
    return expert, first, count - first
