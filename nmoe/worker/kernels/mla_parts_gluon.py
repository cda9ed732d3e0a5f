"""Which part of the decode rows' contexts a program attends to, and its pieces of rows, in Gluon; mla_decode_triton.py
describes the cuts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def part_of(prefix_ptr, num_rows, BLOCK_R: gl.constexpr, WARPS: gl.constexpr):
    """The program's part [at, stop) of all rows' concatenated pages, and the row in which it starts."""
    total = gl.load(prefix_ptr + num_rows)
    pages = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
    at = gl.program_id(0) * pages
    index = gl.arange(0, BLOCK_R, gl.BlockedLayout([1], [32], [WARPS], [0]))
    ends = gl.load(prefix_ptr + 1 + index, mask=index < num_rows, other=2147483647)
    return at, gl.minimum(at + pages, total), gl.sum((ends <= at).to(gl.int32), 0)


@gluon.jit
def piece_of(contexts_ptr, prefix_ptr, row, at, stop, PAGE: gl.constexpr):
    """The positions [begin, end) of a row that start at page `at` of all rows' pages and precede page `stop`; and the
    page after them."""
    first = gl.load(prefix_ptr + row)
    last = gl.minimum(gl.load(prefix_ptr + row + 1), stop)
    return (at - first) * PAGE, gl.minimum((last - first) * PAGE, gl.load(contexts_ptr + row)), last
