"""Dynamic work distribution in Gluon: programs take pieces of work one at a time, so a program that starts late, or
shares its multiprocessor, takes fewer.

The producer warp draws the numbers, usually from a counter in memory, and passes them to the program's other warps.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


class Items(NamedTuple):
    """Shared memory: the last two pieces that the producer has taken for the program, in W words each."""

    words: gl.shared_memory_descriptor  # [2 * W, 1]
    # Barriers
    there: gl.shared_memory_descriptor  # [2]
    free: gl.shared_memory_descriptor  # [2]


@gluon.jit
def make_items(READERS: gl.constexpr, WORDS: gl.constexpr = 1):
    """Start with none taken. READERS groups of warps will read each piece, in WORDS words."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    items = Items(
        words=gl.allocate_shared_memory(gl.int32, [2 * WORDS, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])),
        there=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        free=gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
    )
    for i in gl.static_range(2):
        mbarrier.init(items.there.index(i), count=1)
        mbarrier.init(items.free.index(i), count=READERS)
    return items


@gluon.jit
def tell(items, nth, words):
    """Producer: publish the program's `nth` piece, as a tuple of words."""
    WORD: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(items.free.index(nth % 2), (nth // 2 & 1) ^ 1)
    for i in gl.static_range(len(words)):
        items.words.index(nth % 2 * len(words) + i).store(gl.zeros([1], gl.int32, WORD) + words[i])
    mbarrier.arrive(items.there.index(nth % 2), count=1)


@gluon.jit
def told(items, nth, WARPS: gl.constexpr = 4):
    """A reader of WARPS warps: wait for the `nth` piece. Returns its words as a tuple."""
    WORDS: gl.constexpr = items.words.shape[0] // 2
    mbarrier.wait(items.there.index(nth % 2), nth // 2 & 1)
    words = ()
    for i in gl.static_range(WORDS):
        word = items.words.index(nth % 2 * WORDS + i).load(gl.BlockedLayout([1], [32], [WARPS], [0]))
        words = words + (gl.max(word, 0),)  # type: ignore[assignment]  # noqa: RUF005
    mbarrier.arrive(items.free.index(nth % 2), count=1)
    return words
