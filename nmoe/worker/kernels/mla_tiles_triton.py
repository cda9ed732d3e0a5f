"""What the Triton kernels of latent attention share: which rows of queries and of the cache a program reads, how decode
rows are concatenated, and how a tile of positions is added to those before it.

Shape suffixes: R rows, H heads, M queries times heads, T positions of a tile, L latent, P rope dimensions, V values.
"""

import triton
import triton.language as tl

_ROWS = 256  # the smallest block for vectors over all rows: one compiled kernel for all usual batches


def block_of_rows(rows: int) -> int:
    """`BLOCK_R` for a launch with this many rows, at least R."""
    return max(_ROWS, 1 << (rows - 1).bit_length())


@triton.jit
def contexts_of(positions_ptr, num_rows, BLOCK_R: tl.constexpr):
    """The rows' contexts, int32 [BLOCK_R], from their last positions; 0 for rows that do not exist."""
    row = tl.arange(0, BLOCK_R)
    return tl.load(positions_ptr + row, mask=row < num_rows, other=-1).to(tl.int32) + 1


@triton.jit
def store_plan(contexts_ptr, prefix_ptr, context, length, num_rows, BLOCK_R: tl.constexpr):
    """Store the rows' contexts, and prefix[r], the number of items in the rows before r. `length`: positions per item,
    for all rows or for each, [BLOCK_R]."""
    row = tl.arange(0, BLOCK_R)
    inside = row < num_rows
    tl.store(contexts_ptr + row, context, mask=inside)
    tl.store(prefix_ptr + 1 + row, tl.cumsum((context + length - 1) // length, 0), mask=inside)
    tl.store(prefix_ptr + row, 0, mask=row == 0)


@triton.jit
def row_of(prefix_ptr, item, num_rows, BLOCK_R: tl.constexpr):
    """The row that an item belongs to, with all rows' items concatenated; see `store_plan`."""
    index = tl.arange(0, BLOCK_R)
    ends = tl.load(prefix_ptr + 1 + index, mask=index < num_rows, other=2147483647)
    return tl.sum((ends <= item).to(tl.int32), 0)


@triton.jit
def cache_row(pages_ptr, row, max_pages, position, PAGE: tl.constexpr):
    """The cache index of a position of a row, int64; later positions, up to the end of its page, follow it."""
    page = tl.load(pages_ptr + row * max_pages + position // PAGE).to(tl.int64)
    return page * PAGE + position % PAGE


@triton.jit
def load_ropes(q_ptr, row, head, Q_STRIDE: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr):
    """The roped part of one row's queries for some heads, [H, P]."""
    rope = tl.arange(0, ROPE)
    return tl.load(q_ptr + row.to(tl.int64) * Q_STRIDE + head[:, None] * (NOPE + ROPE) + NOPE + rope[None, :])


@triton.jit
def no_tiles(M: tl.constexpr, VALUES: tl.constexpr):
    """Initial peak, weight and acc; see `add_tile`."""
    return tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, VALUES], tl.float32)


@triton.jit
def add_tile(peak, weight, acc, scores, values):
    """Add a tile of positions to those before it, given its scaled scores [M, T] in base 2 and its values [T, V].
    Returns the largest score [M] and the sums of the weights [M] and of the weighted values [M, V], neither normalised.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    alpha = tl.exp2(peak - new_peak)
    p = tl.exp2(scores - new_peak[:, None])
    weight = weight * alpha + tl.sum(p, 1)
    return new_peak, weight, tl.dot(p.to(values.dtype), values, acc * alpha[:, None])
