"""The decode rows of one lane: an explicit, ordered list of slots per rank, plus arrays over all rows.

The arrays are rebuilt only when a row starts or ends, and never modified in place, so a step in flight keeps its own.
"""

import numpy as np
import numpy.typing as npt

from nmoe.messages import ROW_RETURNS
from nmoe.scheduler.slots import Bools, Ints, Slots, SlotTable


class Batch:
    """Rows keep the order in which they started; when a row ends, later rows move up."""

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
        self.changes = [0] * table.world_size  # per rank, how many times its rows have changed

    def add(self, rank: int, slot: int) -> None:
        """Append a row."""
        self._rows[rank].append(slot)
        self.changes[rank] += 1
        self._stale = True

    def remove(self, rank: int, slot: int) -> None:
        """Remove a row."""
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
        """The slots of all rows, rank by rank."""
        self._refresh()
        return self._slots

    @property
    def local(self) -> Ints:
        """The same slots, numbered within their rank."""
        self._refresh()
        return self._local

    @property
    def flags(self) -> Ints:
        """The flags of the same rows, as in a Step."""
        self._refresh()
        return self._flags

    @property
    def returns(self) -> Bools | None:
        """Which of the rows return a block; None if none does."""
        self._refresh()
        return self._returns

    @property
    def logits(self) -> Bools | None:
        """Which of the rows take a cell of the arena; None if none does."""
        self._refresh()
        return self._logits

    @property
    def uids(self) -> npt.NDArray[np.int64]:
        """The uids of the same rows."""
        self._refresh()
        return self._uids

    def uids_of(self, slots: Slots) -> npt.NDArray[np.int64]:
        """The uids of the requests that occupy `slots`."""
        uids: npt.NDArray[np.int64] = self._table.uid[slots]
        return uids

    @property
    def bounds(self) -> list[int]:
        """Rank r's rows are bounds[r] to bounds[r + 1]."""
        self._refresh()
        return self._bounds
