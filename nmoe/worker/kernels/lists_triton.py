"""Every expert's list of pairs, made by the kernels that learn which experts a token has, and read in tiles of rows;
`lists.py` says what they are.

Which kernel does what: one sets the counts to zero, a later one adds pairs, and after that one they are read.

Shape suffixes as in lists.py.
"""

import triton
import triton.language as tl

from nmoe.worker.kernels import lists

WORDS = tl.constexpr(lists.WORDS)


@triton.jit
def clear_counts(counts_ptr, count, program, programs, BLOCK: tl.constexpr):
    """Set so many words to zero; each of the programs takes a part."""
    for first in range(program * BLOCK, count, programs * BLOCK):
        word = first + tl.arange(0, BLOCK)
        tl.store(counts_ptr + word, tl.zeros([BLOCK], tl.int32), mask=word < count)


@triton.jit
def add_pairs(ids, pairs, exist, counts_ptr, pairs_ptr, capacity):
    """Add these pairs to their experts' lists. Of ids that are no router's, one may come more often than a list is
    long; what does not fit is left out."""
    place = tl.atomic_add(counts_ptr + ids * WORDS, 1, mask=exist, sem="relaxed")
    tl.store(pairs_ptr + ids * capacity + place, pairs, mask=exist & (place < capacity))


@triton.jit
def load_counts(counts_ptr, capacity, most, E: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr):
    """Of each expert: how many pairs it has, and where its tiles end when all experts' are counted on, up to the `most`
    that there is room for: counts of a void step may be any. Also before the wait (early.py) of a kernel behind the
    first that reads them."""
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins * WORDS, mask=bins < E, other=0, cache_modifier=".cg")
    counts = tl.minimum(counts, capacity)
    return counts, tl.minimum(tl.cumsum((counts + ROWS - 1) // ROWS, 0), most)


@triton.jit
def find_tile(tile, counts, ends, ROWS: tl.constexpr):
    """A tile's expert, its first place in that expert's list, and how many are left from there on."""
    past = ends <= tile
    expert = tl.sum(past.to(tl.int32), 0)
    first = (tile - tl.max(tl.where(past, ends, 0), 0)) * ROWS
    count = tl.sum(tl.where(tl.arange(0, counts.shape[0]) == expert, counts, 0), 0)
    return expert, first, count - first
