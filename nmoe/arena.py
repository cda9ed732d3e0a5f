"""Shared memory for logits: they are too large for messages, so they are written here and passed on by reference.

The arena is one row of float32 logits per cell. Every rank has the same number of cells; cell c belongs to rank
c // cells_per_rank. The scheduler owns all cells: it gives them out with a Step (credits: a row whose logits find no
cell waits for a later step), the rank writes them before its StepDone, the frontend copies what it got out of them and
gives them back with `Release`. So no cell has two users at a time, and a frontend's death gives back what it held.
"""

import mmap

import msgspec

from nmoe.architecture import Architecture
from nmoe.ipc import sparse_memory

_RANK_BYTES = 256 << 20  # of address space; only what is used becomes memory
_FEWEST, _MOST = 16, 4096  # cells per rank


class ArenaLayout(msgspec.Struct, frozen=True):
    """The arena of a server."""

    world_size: int
    cells_per_rank: int
    vocab_size: int

    @classmethod
    def of(cls, architecture: Architecture, world_size: int) -> "ArenaLayout":
        """For a model served by `world_size` ranks."""
        fitting = _RANK_BYTES // (4 * architecture.vocab_size)
        return cls(world_size, max(_FEWEST, min(_MOST, fitting)), architecture.vocab_size)

    @property
    def cell_bytes(self) -> int:
        """Of one cell."""
        return 4 * self.vocab_size

    def cell(self, index: int) -> slice:
        """Where cell `index` lies in the arena's bytes."""
        return slice(index * self.cell_bytes, (index + 1) * self.cell_bytes)

    def make(self) -> mmap.mmap:
        """Anonymous memory for all cells, inherited by fork."""
        return sparse_memory(self.world_size * self.cells_per_rank * self.cell_bytes)
