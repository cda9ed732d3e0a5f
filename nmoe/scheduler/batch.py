"""The decode rows of one lane: per rank an explicit, ordered list of slots, and all of them as arrays.

The arrays are built anew only when a row begins or ends, and never changed in place, so a step in flight keeps its own.
"""

import numpy as np
import numpy.typing as npt

from nmoe.messages import ROW_RETURNS
from nmoe.scheduler.slots import Bools, Ints, Slots, SlotTable


class Batch:
    """Rows keep the order in which they began; a row that ends closes the gap."""

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._rows: list[list[int]] = [[] for _ in range(table.world_size)]
        self._stale = True
        self._slots: Slots = np.empty(0, np.int64)
        self._local: Ints = np.empty(0, np.int32)
        self._flags: Ints = np.empty(0, np.int32)
        self._uids: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._returns: Bools | None = None
        self._logits: Bools | None = None
        self._bounds: list[int] = []
        self.changes = [0] * table.world_size  # per rank, how often its rows changed

    def add(self, rank: int, slot: int) -> None:
        """Append a row."""
        self._rows[rank].append(slot)
        self.changes[rank] += 1
        self._stale = True

    def remove(self, rank: int, slot: int) -> None:
        """Take a row out."""
        self._rows[rank].remove(slot)
        self.changes[rank] += 1
        self._stale = True

    def rows(self, rank: int) -> list[int]:
        """The slots of one rank, in batch order."""
        return self._rows[rank]

    def _refresh(self) -> None:
        if self._stale:
            self._slots = np.array([slot for rows in self._rows for slot in rows], np.int64)
            self._local = (self._slots % self._table.num_slots).astype(np.int32)
            self._uids = self._table.uid[self._slots]
            self._flags = self._table.flags[self._slots]
            returns = self._flags & ROW_RETURNS != 0
            self._returns = returns if returns.any() else None
            logits = self._table.logits[self._slots]
            self._logits = logits if logits.any() else None
            self._bounds = np.cumsum([0, *map(len, self._rows)]).tolist()
            self._stale = False

    @property
    def slots(self) -> Slots:
        """All rows' slots, rank by rank."""
        self._refresh()
        return self._slots

    @property
    def local(self) -> Ints:
        """The same rows' slots as their ranks number them."""
        self._refresh()
        return self._local

    @property
    def flags(self) -> Ints:
        """The same rows' flags, as in a Step."""
        self._refresh()
        return self._flags

    @property
    def returns(self) -> Bools | None:
        """Which of the same rows return a block; None if none does."""
        self._refresh()
        return self._returns

    @property
    def logits(self) -> Bools | None:
        """Which of the same rows take a cell of the arena; None if none does."""
        self._refresh()
        return self._logits

    @property
    def uids(self) -> npt.NDArray[np.int64]:
        """The same rows' uids."""
        self._refresh()
        return self._uids

    def uids_of(self, slots: Slots) -> npt.NDArray[np.int64]:
        """Who lives in `slots`."""
        uids: npt.NDArray[np.int64] = self._table.uid[slots]
        return uids

    @property
    def bounds(self) -> list[int]:
        """Rank r's rows are bounds[r] to bounds[r + 1]."""
        self._refresh()
        return self._bounds
