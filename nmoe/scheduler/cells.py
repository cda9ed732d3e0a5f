"""The arena's cells (nmoe/arena.py). The scheduler owns them all: each is free, in flight, or at a frontend.

    free ----take----> in flight ---deliver---> at a frontend, in one of its lives ---release, forget---> free
      ^                    |
      +------deliver-------+    to nobody: the request has already ended; or the workers are gone

A row takes one cell for each record whose logits it returns. Conservation: free + in flight + at frontends == all
cells, each counted once; none is in flight when no step is.

For cells at frontends we track which request they belong to, because a slow reader must not hold all of them: see
`Limits.cells_share`.

A frontend can only give back cells it holds. So a release meant for an earlier life of the scheduler is ignored, and
the cells a frontend held when it died become free once its death is known, and no sooner.
"""

from collections import Counter

import numpy as np

from nmoe.messages import make_uid
from nmoe.scheduler.slots import Ints, Slots

LIFE = make_uid(0, 1, 0)  # the uids of one life of a frontend span a range of this length
_FREE, _IN_FLIGHT = -1, -2  # owners that are not lives


def life_of(frontend: int, generation: int) -> int:
    """The number of one life of a frontend; a uid belongs to life uid // LIFE."""
    return make_uid(frontend, generation, 0) // LIFE


class Cells:
    """Tracks the owner of every cell. Cell c belongs to rank c // cells_per_rank."""

    def __init__(self, world_size: int, cells_per_rank: int) -> None:
        self._cells_per_rank = cells_per_rank
        self._owner = np.full(world_size * cells_per_rank, _FREE, np.int64)  # a life, or one of the two constants above
        self._uid = np.full(world_size * cells_per_rank, -1, np.int64)  # of cells at frontends
        self._held: Counter[int] = Counter()  # the same, counted by uid
        self._free = [
            list(range((rank + 1) * cells_per_rank - 1, rank * cells_per_rank - 1, -1)) for rank in range(world_size)
        ]
        self._touched = False  # whether any cell has moved since the last check

    def num_free(self, rank: int) -> int:
        """How many cells `take` can provide."""
        return len(self._free[rank])

    def held(self, uid: int) -> int:
        """How many cells of a request its frontend has not given back."""
        return self._held[uid]

    def take(self, rank: int, count: int) -> list[int]:
        """Take `count` cells of `rank` for rows of a step. The caller has checked `num_free`."""
        free = self._free[rank]
        taken = [free.pop() for _ in range(count)]
        self._owner[taken] = _IN_FLIGHT
        self._touched = True
        return taken

    def deliver(self, cells: Ints, uids: Slots) -> None:
        """Hand the cells of a landed step to the frontends of `uids`, int64; a uid of -1 means nobody."""
        nobody = uids < 0
        self._owner[cells] = uids // LIFE
        self._uid[cells] = uids
        self._held.update(uids[~nobody].tolist())
        self._put_back(cells[nobody])

    def release(self, cells: bytes, life: int) -> int:
        """Take back `cells`, int32, from a life. Returns how many of them it did not hold; those are ignored."""
        given = np.unique(np.frombuffer(cells, np.int32))
        given = given[(given >= 0) & (given < len(self._owner))]
        mine = given[self._owner[given] == life]
        self._put_back(mine)
        return len(cells) // 4 - len(mine)

    def forget(self, frontend: int, generation: int | None) -> None:
        """Free the cells held by the lives of a frontend, except those of its life `generation`."""
        first, last = life_of(frontend, 0), life_of(frontend + 1, 0)
        gone = (self._owner >= first) & (self._owner < last)
        if generation is not None:
            gone &= self._owner != life_of(frontend, generation)
        self._put_back(np.flatnonzero(gone).astype(np.int32))

    def reset(self) -> None:
        """The workers are gone, so no step will land. Frontends keep the cells they hold."""
        self._put_back(np.flatnonzero(self._owner == _IN_FLIGHT).astype(np.int32))

    def _put_back(self, cells: Ints) -> None:
        for uid in self._uid[cells].tolist():
            if uid >= 0:
                self._held[uid] -= 1
                if not self._held[uid]:
                    del self._held[uid]
        self._uid[cells] = -1
        self._owner[cells] = _FREE
        for cell in cells.tolist():
            self._free[cell // self._cells_per_rank].append(cell)
        self._touched = self._touched or len(cells) > 0

    def check(self) -> None:
        """With no step in flight, raise RuntimeError unless every cell is in exactly one place."""
        if not self._touched:
            return
        self._touched = False
        listed = np.bincount([cell for free in self._free for cell in free], minlength=len(self._owner))
        wrong = (listed != (self._owner == _FREE)) | ((self._owner >= 0) != (self._uid >= 0))
        if wrong.any() or (self._owner == _IN_FLIGHT).any() or self._held.total() != np.count_nonzero(self._uid >= 0):
            raise RuntimeError(
                f"the arena's cells do not add up: {int(listed.sum())} free of {len(self._owner)},"
                f" {int((self._owner >= 0).sum())} at frontends, {int((self._owner == _IN_FLIGHT).sum())} still in"
                f" flight, though no step is"
            )
