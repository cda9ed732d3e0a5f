"""The work of the experts' kernel, in bfloat16 and FP8, and the warps that load its data; see warps_gluon.py.

A piece of work is a tile of an expert's rows by two blocks of 128 outputs, of the first product or of the second. As
many programs as multiprocessors take the pieces in this order:

    1. first product of the shared experts    needs the tokens only, so it begins while the router still chooses
    2. first product of the routed experts
    3. second product of the shared experts
    4. second product of the routed experts

The shared experts' pieces are there only if their weights are given. Those of 1 are dealt out beforehand, those of 2 to
4 dynamically (items_gluon.py), because some programs start late, or with a piece of 1. The producer looks up a piece's
rows in the experts' lists (lists.py) and tells the other warps.

A piece of the second product needs all results of the first product for its rows. So the warpgroups count what they
have stored, per expert, and the loader waits for the count. It does not wait forever: a program works on its pieces in
order, and whatever is waited for comes before in that order. But some of that is dealt out beforehand, so all programs
must run at some time while others wait: there are no more of them than multiprocessors, kernels beside this one end by
themselves, and this one never runs beside another of its kind.

Between the products, memory is in rows of an expert's intermediate size. A row of the shared experts, whose size is a
multiple of that, takes several.

Shape suffixes: T tokens, K experts per token, D hidden, F intermediate, E experts, C stages of a tile.
"""

from typing import NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nmoe.worker.kernels import lists
from nmoe.worker.kernels.hopper_gluon import thread_barrier, wait_for_kernel_before
from nmoe.worker.kernels.items_gluon import make_items, tell, told
from nmoe.worker.kernels.warps_gluon import LOADERS, load_rows, produce, row_lanes

WORDS = gl.constexpr(lists.WORDS)
UP, DOWN, END = gl.constexpr(0), gl.constexpr(1), gl.constexpr(-1)


class Sizes(NamedTuple):
    """The kernel's constants."""

    hidden: int
    intermediate: int
    slots: int  # experts per token
    experts: int
    shared: int  # the shared experts' intermediate size, in those of an expert; 0: they are not computed here
    up_group: int  # of the first product's weights, see expert_weights.py
    down_group: int  # of the second product's


class Piece(NamedTuple):
    """A piece of work, as the producer passes it to the other warps."""

    kind: gl.tensor  # UP, DOWN, or END if there are no more
    expert: gl.tensor  # E stands for the shared ones
    block: gl.tensor  # of outputs: of gate, which goes with the same one of up; of DOWN the first of two
    first: gl.tensor  # where the tile begins: index of its first pair in the lists' memory, or its first token
    rows: gl.tensor  # how many from there on are the expert's
    between: gl.tensor  # index of the tile's first row between the products
    needs: gl.tensor  # of DOWN: how many results of its expert's first product must have been counted


class ListPointers(NamedTuple):
    """The experts' lists; see lists.py."""

    pairs: gl.tensor  # pointers
    counts: gl.tensor
    capacity: gl.tensor
    most: gl.tensor  # tiles: there is no room for more between the products


@gluon.jit
def make_pieces():
    """Shared memory through which the producer passes pieces to the loader and the two warpgroups."""
    return make_items(3, 7)


@gluon.jit
def told_piece(items, nth, WARPS: gl.constexpr = 4):
    """For a reader of WARPS warps: the program's `nth` piece."""
    kind, expert, block, first, rows, between, needs = told(items, nth, WARPS)
    return Piece(kind, expert, block, first, rows, between, needs)


@gluon.jit
def load_now(ptr, mask, other):
    """Load what kernels wrote that only the producer has waited for: the data is in memory, but this multiprocessor's
    own cache may hold an older copy."""
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
def _find_tile(tile, counts, ends, ROWS: gl.constexpr):
    """A tile's expert, its first place in that expert's list, how many pairs are left from there on, and the expert's
    number of tiles."""
    past = ends <= tile
    expert = gl.sum(past.to(gl.int32), 0)
    begin = gl.max(gl.where(past, ends, 0), 0)
    first = (tile - begin) * ROWS
    bins = gl.arange(0, counts.shape[0], counts.type.layout)
    count = gl.sum(gl.where(bins == expert, counts, 0), 0)
    end = gl.sum(gl.where(bins == expert, ends, 0), 0)
    return expert, first, count - first, end - begin


@triton.constexpr_function
def _together(wanted, stages):
    """How many stages of a product to request at once, of which there are this many."""
    return wanted if stages % wanted == 0 else 1


@gluon.jit
def _produce_shared_up(
    ring, items, w_desc, lists, tokens, sizes: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr
):
    """The pieces of 1; tiles of the same weights follow one another. Returns the numbers of pieces and of stages."""
    ROWS: gl.constexpr = ring.x.shape[1]
    C: gl.constexpr = sizes.hidden // ring.x.shape[2]
    BLOCKS: gl.constexpr = sizes.shared * sizes.intermediate // 128
    E: gl.constexpr = sizes.experts
    tiles = gl.cdiv(tokens, ROWS)
    nth = 0
    at = 0
    for number in range(gl.program_id(0), tiles * BLOCKS, gl.num_programs(0)):
        block = number // tiles
        first = number % tiles * ROWS
        between = lists.most * ROWS + first * sizes.shared
        tell(items, nth, (UP, E, block, first, tokens - first, between, 0))
        at = produce(ring, w_desc, (block, block + BLOCKS), at, C, 0, STAGES, _together(TOGETHER, C))
        nth += 1
    return nth, at


@gluon.jit
def produce_pieces(
    ring, items, descs, lists, tokens, sizes: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr
):
    """Producer. `descs`: the weights' descriptors: first product, second; the shared experts' first, second."""
    ROWS: gl.constexpr = ring.x.shape[1]
    E: gl.constexpr = sizes.experts
    UP_C: gl.constexpr = sizes.hidden // ring.x.shape[2]
    DOWN_C: gl.constexpr = sizes.intermediate // ring.x.shape[2]
    UP_PIECES: gl.constexpr = sizes.intermediate // 128
    DOWN_BLOCKS: gl.constexpr = sizes.hidden // 128
    DOWN_PIECES: gl.constexpr = (DOWN_BLOCKS + 1) // 2
    up_desc, down_desc, shared_up_desc, shared_down_desc = descs
    nth = 0
    at = 0
    shared_downs = 0
    if sizes.shared > 0:
        nth, at = _produce_shared_up(ring, items, shared_up_desc, lists, tokens, sizes, STAGES, TOGETHER)
        shared_downs = gl.cdiv(tokens, ROWS) * DOWN_PIECES
    wait_for_kernel_before()
    counts, ends = _load_counts(lists, E, ROWS)
    ups = gl.max(ends, 0) * UP_PIECES
    count = ups + shared_downs + gl.max(ends, 0) * DOWN_PIECES
    item = gl.program_id(0)
    while item < count:
        if item < ups:
            tile = item // UP_PIECES
            block = item % UP_PIECES
            expert, first, rows, _ = _find_tile(tile, counts, ends, ROWS)
            tell(items, nth, (UP, expert, block, expert * lists.capacity + first, rows, tile * ROWS, 0))
            blocks = up_blocks(expert, block, sizes)
            at = produce(ring, up_desc, blocks, at, UP_C, sizes.up_group, STAGES, _together(TOGETHER, UP_C))
        elif item < ups + shared_downs:
            if sizes.shared > 0:
                SHARED_C: gl.constexpr = sizes.shared * DOWN_C
                block = (item - ups) % DOWN_PIECES * 2
                first = (item - ups) // DOWN_PIECES * ROWS
                between = lists.most * ROWS + first * sizes.shared
                tell(items, nth, (DOWN, E, block, first, tokens - first, between, 2 * gl.num_programs(0)))
                blocks = down_blocks(0, block, sizes)
                at = produce(ring, shared_down_desc, blocks, at, SHARED_C, 0, STAGES, _together(TOGETHER, SHARED_C))
        else:
            tile = (item - ups - shared_downs) // DOWN_PIECES
            block = (item - ups - shared_downs) % DOWN_PIECES * 2
            expert, first, rows, tiles = _find_tile(tile, counts, ends, ROWS)
            needs = tiles * (2 * UP_PIECES)
            tell(items, nth, (DOWN, expert, block, expert * lists.capacity + first, rows, tile * ROWS, needs))
            blocks = down_blocks(expert, block, sizes)
            at = produce(ring, down_desc, blocks, at, DOWN_C, sizes.down_group, STAGES, _together(TOGETHER, DOWN_C))
        nth += 1
        item = gl.num_programs(0) + gl.atomic_add(lists.counts + E * WORDS, 1, sem="relaxed")
    tell(items, nth, (END, 0, 0, 0, 0, 0, 0))


@gluon.jit
def up_blocks(expert, block, sizes: gl.constexpr):
    """A routed expert's block of gate and the same block of up, numbered as they are stored, over all experts."""
    gate = (expert * (sizes.intermediate // 128) + block) * 2
    return gate, gate + 1


@gluon.jit
def down_blocks(expert, block, sizes: gl.constexpr):
    """An expert's block of the second product and the next one, numbered over all experts. A last block without a
    partner is computed twice and stored once."""
    BLOCKS: gl.constexpr = sizes.hidden // 128
    return expert * BLOCKS + block, expert * BLOCKS + gl.minimum(block + 1, BLOCKS - 1)


@gluon.jit
def is_shared(piece, sizes: gl.constexpr):
    """Whether a piece is the shared experts'."""
    return piece.expert == sizes.experts


@gluon.jit
def rows_apart(piece, sizes: gl.constexpr):
    """From one of the piece's rows to the next, between the products."""
    if sizes.shared > 0:
        apart = 1 + is_shared(piece, sizes).to(gl.int32) * (sizes.shared - 1)
    else:
        apart = 1
    return apart


@gluon.jit
def _stored_ptr(lists, expert):
    return lists.counts + expert * WORDS + 1


@gluon.jit
def count_stored(lists, expert):
    """A warpgroup: its part of a result of the expert's first product is stored; for the shared experts, its parts of
    all the program's pieces."""
    thread_barrier()
    gl.atomic_add(_stored_ptr(lists, expert), 1, sem="release")


@gluon.jit
def _wait_for_stored(lists, piece):
    address = _stored_ptr(lists, piece.expert).to(gl.int64)
    stored = piece.needs - 1
    while stored < piece.needs:
        stored = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def _tokens_of(piece, lane, lists, slots_ptr, sizes: gl.constexpr):
    """For these lanes of the piece's tile: where their tokens are, and whether they exist."""
    exists = lane < piece.rows
    if sizes.shared > 0:
        pair = load_now(lists.pairs + piece.first + lane, exists & (piece.expert < sizes.experts), 0)
        token = gl.where(is_shared(piece, sizes), piece.first + lane, pair // sizes.slots)
    else:
        token = load_now(lists.pairs + piece.first + lane, exists, 0) // sizes.slots
    if slots_ptr is not None:
        token = load_now(slots_ptr + token, exists, 0)
    return token.to(gl.int64), exists


@gluon.jit
def pairs_of(piece, lane, lists, tokens, sizes: gl.constexpr):
    """For these lanes of the piece's tile: the rows of the output, which are pairs, then tokens; -1 if they do not
    exist."""
    exists = lane < piece.rows
    if sizes.shared > 0:
        pair = load_now(lists.pairs + piece.first + lane, exists & (piece.expert < sizes.experts), -1)
        token = gl.where(exists, tokens * sizes.slots + piece.first + lane, -1)
        pair = gl.where(is_shared(piece, sizes), token, pair)
    else:
        pair = load_now(lists.pairs + piece.first + lane, exists, -1)
    return pair


@gluon.jit
def _load_tokens(ring, scales, piece, x, lists, at, sizes: gl.constexpr, STAGES: gl.constexpr):
    """A tile's tokens, wherever they are."""
    x_ptr, x_scales_ptr, block_stride, slots_ptr = x
    C: gl.constexpr = sizes.hidden // ring.x.shape[2]
    lane, scale_lane = row_lanes(ring)
    token, exists = _tokens_of(piece, lane, lists, slots_ptr, sizes)
    rows = (x_ptr + token * sizes.hidden, exists)
    row_scales = (None, None)
    if scales is not None:
        scale, has_scale = _tokens_of(piece, scale_lane, lists, slots_ptr, sizes)
        if slots_ptr is not None:
            scale = scale * C
        row_scales = (x_scales_ptr + scale, has_scale)
    return load_rows(ring, scales, rows, row_scales, block_stride, at, C, STAGES)


@gluon.jit
def _load_between(ring, scales, piece, hidden, at, sizes: gl.constexpr, STAGES: gl.constexpr):
    """The first product's results for a tile."""
    hidden_ptr, hidden_scales_ptr, block_stride = hidden
    lane, scale_lane = row_lanes(ring)
    apart = rows_apart(piece, sizes)
    for i in range(apart):
        row = piece.between + lane * apart + i
        rows = (hidden_ptr + row.to(gl.int64) * sizes.intermediate, lane < piece.rows)
        row_scales = (None, None)
        if scales is not None:
            scale = piece.between + scale_lane * apart + i
            row_scales = (hidden_scales_ptr + scale, scale >= 0)
        at = load_rows(ring, scales, rows, row_scales, block_stride, at, sizes.intermediate // ring.x.shape[2], STAGES)
    return at


@gluon.jit
def load_pieces(ring, scales, items, x, hidden, lists, sizes: gl.constexpr, STAGES: gl.constexpr):
    """Loader. `x` and `hidden`, the tokens and the first product's results: pointers to the values and, in FP8, to the
    scales, and the stride of the scales' blocks; of tokens also to their places, if they are not in order."""
    nth = 0
    at = 0
    piece = told_piece(items, nth, LOADERS)
    while piece.kind >= 0:
        if piece.kind == UP:
            at = _load_tokens(ring, scales, piece, x, lists, at, sizes, STAGES)
        else:
            _wait_for_stored(lists, piece)
            at = _load_between(ring, scales, piece, hidden, at, sizes, STAGES)
        nth += 1
        piece = told_piece(items, nth, LOADERS)
