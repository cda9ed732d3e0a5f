"""The page through which GPU workers learn of failures: each rank's life, what it waits for, which ranks were silent.

Hosts and the kernels of all GPUs read and write it; each word is written by one rank only.
"""

import ctypes
import mmap
from collections.abc import Iterable

import torch

from nmoe.errors import LaunchError
from nmoe.slab import POISON_BITS, ControlLayout

_MAPPED_EVERYWHERE = 1 | 2  # cudaHostRegisterPortable | cudaHostRegisterMapped


class Control:
    """The page shared by all ranks, as the host sees it, and its address for kernels."""

    def __init__(self, layout: ControlLayout, memory: mmap.mmap) -> None:
        """`memory` is `layout.make()`; it is mapped for this process's GPU. Raises LaunchError if that fails."""
        self._layout = layout
        self._ranks = range(layout.world_size)
        self._words = memoryview(memory).cast("B").cast("q")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = runtime.cudaHostRegister(self.address, len(memory), _MAPPED_EVERYWHERE)
        if error != runtime.cudaError.success:
            raise LaunchError(f"the GPU cannot map the memory that workers share (cudaHostRegister: {error})")

    def begin(self, rank: int, life: int) -> None:
        """Record that `rank` has begun a life: nothing from an earlier one is still running on its GPU."""
        self._words[self._layout.life(rank) // 8] = life

    def compiles(self, rank: int, now: bool) -> None:
        """Record whether `rank` is compiling a kernel: while it is, it does not count as silent and the others wait."""
        self._words[self._layout.compiling(rank) // 8] = now

    def missing(self, life: int) -> set[int]:
        """The ranks that have not begun this life."""
        return {rank for rank in self._ranks if self._words[self._layout.life(rank) // 8] < life}

    def poison(self, by: int, life: int, blamed: Iterable[int]) -> None:
        """End this life on every rank."""
        word = life << POISON_BITS | sum(1 << rank for rank in blamed)
        for rank in self._ranks:
            self._words[self._layout.poison(rank) // 8 + by] = word

    def blamed(self, rank: int, life: int) -> set[int] | None:
        """The ranks whose silence poisoned `rank` in this life, empty if the life was ended; None if it goes on."""
        first = self._layout.poison(rank) // 8
        words = [word for word in self._words[first : first + len(self._ranks)] if word >> POISON_BITS == life]
        return {peer for peer in self._ranks if any(word >> peer & 1 for word in words)} if words else None
