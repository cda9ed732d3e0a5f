"""Pieces of work that programs take as they come to them, in Gluon: a program that begins late, or shares its
multiprocessor, then takes fewer.

The producer warp takes the numbers, from a counter in memory as a rule, and tells the program's other warps.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


class Items(NamedTuple):
    """Shared memory: which pieces the producer has taken for the program, the last two."""

    numbers: gl.shared_memory_descriptor  # [2, 1]
    # Barriers
    there: gl.shared_memory_descriptor  # [2]
    free: gl.shared_memory_descriptor  # [2]


@gluon.jit
def make_items(READERS: gl.constexpr):
    """None taken yet. So many groups of warps will be told."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    items = Items(
        numbers=gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])),
        there=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        free=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
    )
    for i in gl.static_range(2):
        mbarrier.init(items.there.index(i), count=1)
        mbarrier.init(items.free.index(i), count=READERS)
    return items


@gluon.jit
def tell(items, nth, item):
    """Producer: which piece is the program's `nth`."""
    mbarrier.wait(items.free.index(nth % 2), (nth // 2 & 1) ^ 1)
    items.numbers.index(nth % 2).store(gl.zeros([1], gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + item)
    mbarrier.arrive(items.there.index(nth % 2), count=1)


@gluon.jit
def told(items, nth, WARPS: gl.constexpr = 4):
    """A reader of so many warps: the same."""
    mbarrier.wait(items.there.index(nth % 2), nth // 2 & 1)
    item = gl.max(items.numbers.index(nth % 2).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(items.free.index(nth % 2), count=1)
    return item
