"""The decode rows of one numerics class: per rank an explicit, ordered list of slots, and all of them as arrays.

The arrays are built anew only when a row begins or ends, and never changed in place, so a step in flight keeps its own.
"""

import numpy as np
import numpy.typing as npt

from nmoe.scheduler.slots import Slots, SlotTable


class Batch:
    """Rows keep the order in which they began; a row that ends closes the gap."""

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._rows: list[list[int]] = [[] for _ in range(table.world_size)]
        self._stale = True
        self._slots: Slots = np.empty(0, np.int64)
        self._local: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self._uids: npt.NDArray[np.int64] = np.empty(0, np.int64)
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
            self._bounds = np.cumsum([0, *map(len, self._rows)]).tolist()
            self._stale = False

    @property
    def slots(self) -> Slots:
        """All rows' slots, rank by rank."""
        self._refresh()
        return self._slots

    @property
    def local(self) -> npt.NDArray[np.int32]:
        """The same rows' slots as their ranks number them."""
        self._refresh()
        return self._local

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
