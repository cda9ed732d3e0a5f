"""What a program of absorbed attention loads into its shared memory, in Gluon: the queries of its pieces of work, and
tiles of positions from the pages, in a ring that carries over from piece to piece. Latents are stored in quarters of
their columns.

Shape suffixes: N queries times heads, L latent, P rope dimensions.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from nmoe.worker.kernels.hopper_gluon import copy_tile


class Ring(NamedTuple):
    """Shared memory: places for queries, and stages with a tile each."""

    q_latent: gl.shared_memory_descriptor  # [places * 4, N, L / 4]
    q_rope: gl.shared_memory_descriptor  # [places, N / heads, heads, P]
    k_latent: gl.shared_memory_descriptor  # [stages * 4, tile, L / 4]
    k_rope: gl.shared_memory_descriptor  # [stages, tile, P]
    # Barriers
    q_bars: gl.shared_memory_descriptor  # [places * 2]: queries are present; are free
    filled: gl.shared_memory_descriptor  # [stages * split]: a share of the latents each, ropes with the first
    free: gl.shared_memory_descriptor  # [stages * split]


@gluon.jit
def make_ring(descs, STAGES: gl.constexpr, SPLIT: gl.constexpr, PLACES: gl.constexpr, READERS: gl.constexpr):
    """Initialise for the program's warps. `descs`: of latents and ropes of the cache, then of the queries. A stage's
    latents are filled and freed in SPLIT shares; queries are free once READERS groups of warps have said so."""
    latent_desc, rope_desc, q_desc, q_rope_desc = descs
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    TILE: gl.constexpr = latent_desc.block_type.shape[0]
    QUARTER: gl.constexpr = latent_desc.block_type.shape[1]
    QUERIES: gl.constexpr = q_rope_desc.block_type.shape[0]
    HEADS: gl.constexpr = q_rope_desc.block_type.shape[1]
    ROPE: gl.constexpr = rope_desc.block_type.shape[1]
    ring = Ring(
        q_latent=gl.allocate_shared_memory(gl.bfloat16, [PLACES * 4, QUERIES * HEADS, QUARTER], q_desc.layout),
        q_rope=gl.allocate_shared_memory(gl.bfloat16, [PLACES, QUERIES, HEADS, ROPE], q_rope_desc.layout),
        k_latent=gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, TILE, QUARTER], latent_desc.layout),
        k_rope=gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, ROPE], rope_desc.layout),
        q_bars=gl.allocate_shared_memory(gl.int64, [PLACES * 2, 1], BARRIER),
        filled=gl.allocate_shared_memory(gl.int64, [STAGES * SPLIT, 1], BARRIER),
        free=gl.allocate_shared_memory(gl.int64, [STAGES * SPLIT, 1], BARRIER),
    )
    for i in gl.static_range(PLACES):
        mbarrier.init(ring.q_bars.index(i), count=1)
        mbarrier.init(ring.q_bars.index(PLACES + i), count=READERS)
    for i in gl.static_range(STAGES * SPLIT):
        mbarrier.init(ring.filled.index(i), count=1)
        mbarrier.init(ring.free.index(i), count=1)
    return ring


@gluon.jit
def rope_queries(ring, place):
    """The roped part of the queries in this place, [N, P]."""
    SHAPE: gl.constexpr = ring.q_rope.shape
    return ring.q_rope.index(place).reshape([SHAPE[1] * SHAPE[2], SHAPE[3]])


@gluon.jit
def load_queries(ring, descs, where, rope_where, nth):
    """Producer: load the queries of a program's piece of work, its `nth`: latents from a row and column of the queries'
    matrix, ropes from a token, head and column on; zeros where there are no tokens."""
    _, _, q_desc, q_rope_desc = descs
    PLACES: gl.constexpr = ring.q_rope.shape[0]
    QUARTER: gl.constexpr = ring.q_latent.shape[2]
    place = nth % PLACES
    present = ring.q_bars.index(place)
    mbarrier.wait(ring.q_bars.index(PLACES + place), (nth // PLACES & 1) ^ 1)
    mbarrier.expect(present, ring.q_latent.shape[1] * (4 * QUARTER + ring.q_rope.shape[3]) * 2)
    for i in gl.static_range(4):
        copy_tile(q_desc, [where[0], where[1] + i * QUARTER], present, ring.q_latent.index(place * 4 + i))
    copy_tile(q_rope_desc, rope_where, present, ring.q_rope.index(place))


@gluon.jit
def load_tiles(ring, descs, row_pages_ptr, begin, stop, at, PAGE: gl.constexpr):
    """Producer: load the tiles from position `begin` to `stop` of the row with these pages. Returns how many there have
    been in total; `at` of them came before."""
    latent_desc, rope_desc, _, _ = descs
    STAGES: gl.constexpr = ring.k_rope.shape[0]
    SPLIT: gl.constexpr = ring.free.shape[0] // STAGES
    TILE: gl.constexpr = ring.k_latent.shape[1]
    QUARTER: gl.constexpr = ring.k_latent.shape[2]
    ROPE: gl.constexpr = ring.k_rope.shape[2]
    for position in range(begin, stop, TILE):
        stage = at % STAGES
        k_row = gl.load(row_pages_ptr + position // PAGE).to(gl.int32) * PAGE + position % PAGE
        for share in gl.static_range(SPLIT):
            filled = ring.filled.index(stage * SPLIT + share)
            mbarrier.wait(ring.free.index(stage * SPLIT + share), (at // STAGES & 1) ^ 1)
            mbarrier.expect(filled, TILE * (4 // SPLIT * QUARTER + (ROPE if share == 0 else 0)) * 2)
            for i in gl.static_range(share * 4 // SPLIT, (share + 1) * 4 // SPLIT):
                copy_tile(latent_desc, [k_row, i * QUARTER], filled, ring.k_latent.index(stage * 4 + i))
            if share == 0:
                copy_tile(rope_desc, [k_row, 4 * QUARTER], filled, ring.k_rope.index(stage))
        at += 1
    return at


@gluon.jit
def load_old_tiles(ring, descs, row_pages_ptr, context, begin, end, MOST: gl.constexpr, PAGE: gl.constexpr):
    """Producer, before the kernel before has ended: load the first tiles of the first piece, at most MOST, as far as
    they were cached in earlier steps: all but the last position of the row's context. Returns their number."""
    TILE: gl.constexpr = ring.k_latent.shape[1]
    old = gl.minimum(end, context - 1)
    ahead = gl.minimum(begin + MOST * TILE, old // TILE * TILE)
    at = 0
    return load_tiles(ring, descs, row_pages_ptr, begin, ahead, at, PAGE)
