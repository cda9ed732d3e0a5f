"""What the Triton kernels of latent attention have in common: which rows a program reads, of queries and of the cache,
and how a tile of positions is added to those before it.

Shape suffixes: R rows, H heads, M queries times heads, T positions of a tile, L latent, P rope dimensions, V values.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(prefix_ptr, item, num_rows, BLOCK_R: tl.constexpr):
    """The row to which an item belongs, of all rows' laid end to end: prefix[r] is how many the rows before r have.
    `BLOCK_R` is at least R."""
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
