"""What the Triton kernels of latent attention have in common: which rows a program reads, of queries and of the cache,
how decode rows are laid end to end, and how a tile of positions is added to those before it.

Shape suffixes: R rows, H heads, M queries times heads, T positions of a tile, L latent, P rope dimensions, V values.
"""

import triton
import triton.language as tl

_ROWS = 256  # the smallest block for vectors of all rows: one compiled kernel for all usual batches


def block_of_rows(rows: int) -> int:
    """`BLOCK_R` of a launch for so many rows, at least R."""
    return max(_ROWS, 1 << (rows - 1).bit_length())


@triton.jit
def contexts_of(positions_ptr, num_rows, BLOCK_R: tl.constexpr):
    """The rows' contexts, int32 [BLOCK_R], by their last positions; 0 of rows that do not exist."""
    row = tl.arange(0, BLOCK_R)
    return tl.load(positions_ptr + row, mask=row < num_rows, other=-1).to(tl.int32) + 1


@triton.jit
def store_plan(contexts_ptr, prefix_ptr, context, length, num_rows, BLOCK_R: tl.constexpr):
    """The rows' contexts, and prefix[r], how many items the rows before r have. `length`: how many positions an item
    has, in all rows or in each, [BLOCK_R]."""
    row = tl.arange(0, BLOCK_R)
    inside = row < num_rows
    tl.store(contexts_ptr + row, context, mask=inside)
    tl.store(prefix_ptr + 1 + row, tl.cumsum((context + length - 1) // length, 0), mask=inside)
    tl.store(prefix_ptr + row, 0, mask=row == 0)


@triton.jit
def row_of(prefix_ptr, item, num_rows, BLOCK_R: tl.constexpr):
    """The row to which an item belongs, of all rows' laid end to end; see `store_plan`."""
    index = tl.arange(0, BLOCK_R)
    ends = tl.load(prefix_ptr + 1 + index, mask=index < num_rows, other=2147483647)
    return tl.sum((ends <= item).to(tl.int32), 0)


@triton.jit
def cache_row(pages_ptr, row, max_pages, position, PAGE: tl.constexpr):
    """Where a position of a row lies in the cache, int64; those after it, to the end of its page, lie behind it."""
    page = tl.load(pages_ptr + row * max_pages + position // PAGE).to(tl.int64)
    return page * PAGE + position % PAGE


@triton.jit
def load_ropes(q_ptr, row, head, Q_STRIDE: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr):
    """The roped part of some heads' queries of one row, [H, P]."""
    rope = tl.arange(0, ROPE)
    return tl.load(q_ptr + row.to(tl.int64) * Q_STRIDE + head[:, None] * (NOPE + ROPE) + NOPE + rope[None, :])


@triton.jit
def no_tiles(M: tl.constexpr, VALUES: tl.constexpr):
    """Peak, weight and acc of nothing; see `add_tile`."""
    return tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, VALUES], tl.float32)


@triton.jit
def add_tile(peak, weight, acc, scores, values):
    """A tile of positions after those before it, by its scaled scores [M, T] to the base 2 and its values [T, V]: the
    largest score [M], the sum of the weights [M] and of the weighted values [M, V] of all; neither sum is normalised.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    alpha = tl.exp2(peak - new_peak)
    p = tl.exp2(scores - new_peak[:, None])
    weight = weight * alpha + tl.sum(p, 1)
    return new_peak, weight, tl.dot(p.to(values.dtype), values, acc * alpha[:, None])
