"""A tile of x @ w^T on the tensor cores, plain or transposed: w @ x^T puts the weights on the wide side, which a few
rows would not fill. The accumulator is [ROWS, COLUMNS] or, transposed, [COLUMNS, ROWS]: rows of x, output columns.
"""

import triton
import triton.language as tl


@triton.jit
def empty_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Zeros, float32."""
    return tl.zeros([COLUMNS, ROWS], tl.float32) if TRANSPOSED else tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def add_product(tile, x, w, TRANSPOSED: tl.constexpr):
    """The tile plus x [ROWS, DEPTH] times w [COLUMNS, DEPTH]."""
    return tl.dot(w, tl.trans(x), tile) if TRANSPOSED else tl.dot(x, tl.trans(w), tile)


@triton.jit
def scaled_product(x, w, scales, TRANSPOSED: tl.constexpr):
    """x [ROWS, DEPTH] times w [COLUMNS, DEPTH] times the rows' scales, float32 [ROWS]; to be added to a tile."""
    return tl.dot(w, tl.trans(x)) * scales[None, :] if TRANSPOSED else tl.dot(x, tl.trans(w)) * scales[:, None]


@triton.jit
def by_rows(tile, TRANSPOSED: tl.constexpr):
    """The tile as [ROWS, COLUMNS]."""
    return tl.trans(tile) if TRANSPOSED else tile


@triton.jit
def load_tiles(at, there, SPAN: tl.constexpr, DEPTH: tl.constexpr):
    """SPAN / DEPTH tiles, DEPTH apart, as a tuple: all are loading before the first is used."""
    tiles = ()
    for k in tl.static_range(0, SPAN, DEPTH):
        tiles = tiles + (tl.load(at + k, mask=there, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return tiles
