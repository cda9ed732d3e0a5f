"""The pieces of work of the experts' two products, and the warps that bring what they need, in bfloat16 and FP8; see
warps_gluon.py.

As many programs as multiprocessors take pieces of the tiles that exist as they come to them (items_gluon.py): beside
the shared experts some begin late.

Shape suffixes: K experts per token, D hidden, F intermediate, C stages of a tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nmoe.worker.kernels.items_gluon import tell, told
from nmoe.worker.kernels.warps_gluon import LOADERS, Work, load_rows, produce, row_lanes, wait_for_kernel_before


@gluon.jit
def load_now(ptr):
    """What a kernel before the last one has written, in warps that have not waited for the last one: it is there, but
    the multiprocessor's own cache may hold what was there before."""
    return gl.load(ptr, cache_modifier=".cg")


@gluon.jit
def up_count(num_tiles_ptr, F: gl.constexpr):
    """How many pieces of work the first product has."""
    return gl.load(num_tiles_ptr) * (F // 128)


@gluon.jit
def up_work(item, tile_expert_ptr, F: gl.constexpr):
    """Piece of work `item`: a block of the gate and the same of up."""
    BLOCKS: gl.constexpr = F // 128
    tile = item // BLOCKS
    block = item % BLOCKS
    gate = gl.load(tile_expert_ptr + tile) * (2 * BLOCKS) + block
    return Work(tile, block, gate, gate + BLOCKS)


@gluon.jit
def produce_up(
    ring, items, w_desc, tiles, C: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr
):
    """Producer of the first product. `tiles`: the pairs in order, the tiles' experts, how many tiles there are."""
    tile_expert_ptr, num_tiles_ptr = tiles[1], tiles[2]
    count = up_count(num_tiles_ptr, F)
    item = gl.program_id(0)
    nth = 0
    at = 0
    while item < count:
        tell(items, nth, item)
        nth += 1
        work = up_work(item, tile_expert_ptr, F)
        at = produce(ring, w_desc, work, at, C, STAGES, TOGETHER)
        item = gl.num_programs(0) + gl.atomic_add(num_tiles_ptr + 1, 1, sem="relaxed")
    tell(items, nth, item)


@gluon.jit
def _token_of(pair, slots_ptr, K: gl.constexpr):
    token = pair // K
    if slots_ptr is not None:
        token = gl.load(slots_ptr + token, mask=pair >= 0, other=0)
    return token.to(gl.int64)


@gluon.jit
def load_up(ring, scales, items, x, tiles, C: gl.constexpr, F: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr):
    """Loader of the first product: tokens, from wherever they lie."""
    x_ptr, x_scales_ptr, slots_ptr, block_stride = x
    sorted_ptr, tile_expert_ptr, num_tiles_ptr = tiles
    ROWS: gl.constexpr = ring.x.shape[1]
    lane, scale_lane = row_lanes(ring)
    count = up_count(num_tiles_ptr, F)
    nth = 0
    at = 0
    item = told(items, nth, LOADERS)
    while item < count:
        work = up_work(item, tile_expert_ptr, F)
        pair = gl.load(sorted_ptr + work.tile * ROWS + lane)
        rows = (x_ptr + _token_of(pair, slots_ptr, K) * (C * ring.x.shape[2]), pair >= 0)
        row_scales = (None, None)
        if scales is not None:
            pair = gl.load(sorted_ptr + work.tile * ROWS + scale_lane)
            scale = _token_of(pair, slots_ptr, K)
            if slots_ptr is not None:
                scale = scale * C
            row_scales = (x_scales_ptr + scale, pair >= 0)
        at = load_rows(ring, scales, rows, row_scales, block_stride, at, C, STAGES)
        nth += 1
        item = told(items, nth, LOADERS)


@gluon.jit
def down_count(num_tiles_ptr, D: gl.constexpr):
    """How many pieces of work the second product has."""
    return load_now(num_tiles_ptr) * ((D // 128 + 1) // 2)


@gluon.jit
def down_work(item, tile_expert_ptr, D: gl.constexpr):
    """Piece of work `item` of the second product; a last block without a neighbour is computed twice, stored once."""
    BLOCKS: gl.constexpr = D // 128
    PER_TILE: gl.constexpr = (BLOCKS + 1) // 2
    tile = item // PER_TILE
    block = item % PER_TILE * 2
    first = load_now(tile_expert_ptr + tile) * BLOCKS
    second = gl.minimum(block + 1, BLOCKS - 1)
    return Work(tile, block, first + block, first + second)


@gluon.jit
def produce_down(
    ring, items, w_desc, tiles, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr
):
    """Producer of the second product: weights begin to come while the first one ends, which had waited for the tiles
    to be known."""
    tile_expert_ptr, num_tiles_ptr = tiles[1], tiles[2]
    count = down_count(num_tiles_ptr, D)
    item = gl.program_id(0)
    nth = 0
    at = 0
    while item < count:
        tell(items, nth, item)
        nth += 1
        work = down_work(item, tile_expert_ptr, D)
        at = produce(ring, w_desc, work, at, C, STAGES, TOGETHER)
        item = gl.num_programs(0) + gl.atomic_add(num_tiles_ptr + 2, 1, sem="relaxed")
    tell(items, nth, item)


@gluon.jit
def load_down(ring, scales, items, hidden, tiles, num_rows, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Loader of the second product, which waits for the first one."""
    wait_for_kernel_before()
    hidden_ptr, hidden_scales_ptr = hidden
    sorted_ptr, tile_expert_ptr, num_tiles_ptr = tiles
    ROWS: gl.constexpr = ring.x.shape[1]
    lane, scale_lane = row_lanes(ring)
    count = down_count(num_tiles_ptr, D)
    nth = 0
    at = 0
    item = told(items, nth, LOADERS)
    while item < count:
        work = down_work(item, tile_expert_ptr, D)
        row = work.tile * ROWS + lane
        rows = (hidden_ptr + row.to(gl.int64) * (C * ring.x.shape[2]), gl.load(sorted_ptr + row) >= 0)
        row_scales = (None, None)
        if scales is not None:
            row = work.tile * ROWS + scale_lane
            row_scales = (hidden_scales_ptr + row, row >= 0)
        at = load_rows(ring, scales, rows, row_scales, num_rows, at, C, STAGES)
        nth += 1
        item = told(items, nth, LOADERS)
