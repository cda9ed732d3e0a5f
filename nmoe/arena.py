"""Shared memory for logits, which are too large for messages: they are written here and passed by reference.

The arena has one row of float32 logits per cell. Every rank has the same number of cells; cell c belongs to rank
c // cells_per_rank. The scheduler owns all cells. It hands them out with a Step (as credits: a row whose logits find no
cell waits for a later step); the rank writes them before its StepDone; the frontend copies the logits out and returns
the cells with `Release`. So no cell ever has two users, and when a frontend dies its cells are recovered.
"""

import mmap

import msgspec

from nmoe.architecture import Architecture
from nmoe.ipc import sparse_memory

_RANK_BYTES = 256 << 20  # of address space; only pages that are touched use memory
_FEWEST, _MOST = 16, 4096  # cells per rank


class ArenaLayout(msgspec.Struct, frozen=True):
    """The layout of a server's arena."""

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
        """Bytes of one cell."""
        return 4 * self.vocab_size

    def cell(self, index: int) -> slice:
        """The byte range of cell `index` in the arena."""
        return slice(index * self.cell_bytes, (index + 1) * self.cell_bytes)

    def make(self) -> mmap.mmap:
        """Anonymous memory for all cells, inherited by fork."""
        return sparse_memory(self.world_size * self.cells_per_rank * self.cell_bytes)
