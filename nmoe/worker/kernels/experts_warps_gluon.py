"""The work items of the experts' two products, and the warps that load their data, in bfloat16 and FP8; see
warps_gluon.py.

As many programs as multiprocessors take pieces of the existing tiles dynamically (items_gluon.py), because some start
late next to the shared experts. The producer looks up a piece's rows in the experts' lists (lists.py) and tells the
other warps; it also reads ahead, before the first product has finished.

Shape suffixes: K experts per token, D hidden, F intermediate, E experts, C stages of a tile.
"""

from typing import NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nmoe.worker.kernels import lists
from nmoe.worker.kernels.hopper_gluon import wait_for_kernel_before
from nmoe.worker.kernels.items_gluon import make_items, read_word, release_item, tell, wait_for_item
from nmoe.worker.kernels.warps_gluon import LOADERS, Work, load_rows, produce, row_lanes

WORDS = gl.constexpr(lists.WORDS)


class Piece(NamedTuple):
    """A piece of work, as the producer passes it to the other warps."""

    number: gl.tensor  # negative: there are no more
    expert: gl.tensor
    first: gl.tensor  # index in memory of the tile's first row in the experts' lists
    rows: gl.tensor  # how many from there on are the expert's


class ListPointers(NamedTuple):
    """The experts' lists; see lists.py."""

    pairs: gl.tensor  # pointers
    counts: gl.tensor
    capacity: gl.tensor
    most: gl.tensor  # tiles: there is no room for more between the products


@gluon.jit
def make_pieces():
    """Shared memory through which the producer passes pieces to the loader and the two warpgroups."""
    return make_items(3, 4)


@gluon.jit
def told_piece(items, nth, WARPS: gl.constexpr = 4):
    """For a reader of WARPS warps: the program's `nth` piece."""
    wait_for_item(items, nth)
    number = read_word(items, nth, 0, WARPS)
    expert = read_word(items, nth, 1, WARPS)
    first = read_word(items, nth, 2, WARPS)
    rows = read_word(items, nth, 3, WARPS)
    release_item(items, nth)
    return Piece(number, expert, first, rows)


@gluon.jit
def load_now(ptr, mask, other):
    """Load what a kernel before the last one wrote, in warps that have not waited for the last one: the data is in
    memory, but this multiprocessor's own cache may hold an older copy."""
    return gl.load(ptr, mask=mask, other=other, cache_modifier=".cg")


@gluon.jit
def _add(a, b):
    return a + b


@triton.constexpr_function
def _bins(num_experts):
    return max(32, triton.next_power_of_2(num_experts))


@gluon.jit
def _load_counts(lists, E: gl.constexpr, ROWS: gl.constexpr):
    """For each expert: its number of pairs, and where its tiles end when tiles are numbered across all experts."""
    BINS: gl.constexpr = _bins(E)
    bins = gl.arange(0, BINS, gl.BlockedLayout([BINS // 32], [32], [1], [0]))
    counts = gl.minimum(load_now(lists.counts + bins * WORDS, bins < E, 0), lists.capacity)
    ends = gl.associative_scan((counts + ROWS - 1) // ROWS, 0, _add)
    return counts, gl.minimum(ends, lists.most)  # a void step's counts may be anything


@gluon.jit
def _piece(number, tile, counts, ends, lists, ROWS: gl.constexpr):
    past = ends <= tile
    expert = gl.sum(past.to(gl.int32), 0)
    first = (tile - gl.max(gl.where(past, ends, 0), 0)) * ROWS
    bins = gl.arange(0, counts.shape[0], counts.type.layout)
    count = gl.sum(gl.where(bins == expert, counts, 0), 0)
    return Piece(number, expert, expert * lists.capacity + first, count - first)


@gluon.jit
def produce_pieces(
    ring,
    items,
    w_desc,
    lists,
    E: gl.constexpr,
    C: gl.constexpr,
    BLOCKS: gl.constexpr,
    UP: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    """Producer of the first product (`UP`), whose gate has BLOCKS blocks of outputs, or of the second one, whose
    weights start to load while the first one finishes: that has waited for the lists."""
    ROWS: gl.constexpr = ring.x.shape[1]
    PER_TILE: gl.constexpr = BLOCKS if UP else (BLOCKS + 1) // 2
    counts, ends = _load_counts(lists, E, ROWS)
    count = gl.max(ends, 0) * PER_TILE
    taken_ptr = lists.counts + E * WORDS + (0 if UP else 1)
    item = gl.program_id(0)
    nth = 0
    at = 0
    while item < count:
        piece = _piece(item, item // PER_TILE, counts, ends, lists, ROWS)
        tell(items, nth, (piece.number, piece.expert, piece.first, piece.rows))
        nth += 1
        work = up_work(piece, BLOCKS) if UP else down_work(piece, BLOCKS)
        at = produce(ring, w_desc, work, at, C, GROUP, STAGES, TOGETHER)
        taken = gl.atomic_add(taken_ptr, 1, sem="relaxed")
        gl.store(taken_ptr, 0, mask=taken == count - 1)  # that was the last one to be taken
        item = gl.num_programs(0) + taken
    tell(items, nth, (-1, 0, 0, 0))


@gluon.jit
def up_work(piece, BLOCKS: gl.constexpr):
    """A piece of the first product: a block of gate and the same block of up; each has BLOCKS of them."""
    block = piece.number % BLOCKS
    gate = (piece.expert * BLOCKS + block) * 2
    return Work(piece.number // BLOCKS, block, gate, gate + 1)


@gluon.jit
def _token_of(piece, lane, pairs_ptr, slots_ptr, K: gl.constexpr):
    exists = lane < piece.rows
    token = gl.load(pairs_ptr + piece.first + lane, mask=exists, other=0) // K
    if slots_ptr is not None:
        token = gl.load(slots_ptr + token, mask=exists, other=0)
    return token.to(gl.int64), exists


@gluon.jit
def load_up(ring, scales, items, x, pairs_ptr, C: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr):
    """Loader of the first product: tokens, wherever they are."""
    x_ptr, x_scales_ptr, slots_ptr, block_stride = x
    lane, scale_lane = row_lanes(ring)
    nth = 0
    at = 0
    piece = told_piece(items, nth, LOADERS)
    while piece.number >= 0:
        token, exists = _token_of(piece, lane, pairs_ptr, slots_ptr, K)
        rows = (x_ptr + token * (C * ring.x.shape[2]), exists)
        row_scales = (None, None)
        if scales is not None:
            scale, exists = _token_of(piece, scale_lane, pairs_ptr, slots_ptr, K)
            if slots_ptr is not None:
                scale = scale * C
            row_scales = (x_scales_ptr + scale, exists)
        at = load_rows(ring, scales, rows, row_scales, block_stride, at, C, STAGES)
        nth += 1
        piece = told_piece(items, nth, LOADERS)


@gluon.jit
def down_work(piece, BLOCKS: gl.constexpr):
    """A piece of the second product: two of BLOCKS blocks. A last block without a partner is computed twice and stored
    once."""
    PER_TILE: gl.constexpr = (BLOCKS + 1) // 2
    block = piece.number % PER_TILE * 2
    first = piece.expert * BLOCKS
    return Work(piece.number // PER_TILE, block, first + block, first + gl.minimum(block + 1, BLOCKS - 1))


@gluon.jit
def load_down(ring, scales, items, hidden, num_rows, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Loader of the second product, which waits for the first one."""
    wait_for_kernel_before()
    hidden_ptr, hidden_scales_ptr = hidden
    ROWS: gl.constexpr = ring.x.shape[1]
    lane, scale_lane = row_lanes(ring)
    nth = 0
    at = 0
    piece = told_piece(items, nth, LOADERS)
    while piece.number >= 0:
        work = down_work(piece, D // 128)
        row = work.tile * ROWS + lane
        rows = (hidden_ptr + row.to(gl.int64) * (C * ring.x.shape[2]), lane < piece.rows)
        row_scales = (None, None)
        if scales is not None:
            row = work.tile * ROWS + scale_lane
            row_scales = (hidden_scales_ptr + row, row >= 0)
        at = load_rows(ring, scales, rows, row_scales, num_rows, at, C, STAGES)
        nth += 1
        piece = told_piece(items, nth, LOADERS)
