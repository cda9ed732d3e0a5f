"""The rows of a step: the part that does not change while Steps say that the rows continue.

Shape suffixes: T tokens of the step, R its rows, S rows that sample, D those of them that draw.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from nmoe.messages import ROW_HAS_IDS, ROW_SAMPLES
from nmoe.worker.slots import MalformedStep, SlotTable

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """All arrays are int64 on the host."""

    slots: Array  # [R]
    counts: Array  # [R]: tokens
    flags: Array  # [R]
    floors: Array  # [R]: positions below are shared and not written
    starts: Array  # [R + 1]: where each row's tokens begin
    num_tokens: int  # T
    num_continued: int  # rows without ids, which come first; their input is their slot's last token
    num_ids: int  # ids that the Step must carry
    num_decodes: int  # leading rows with one token
    sampling: Array  # [S]: the rows that sample
    sampling_slots: Array  # [S]
    last_tokens: Array  # [S]: the sampling rows' last tokens, in T

    @classmethod
    def of(cls, given: Array, table: SlotTable) -> "Rows":
        """From a Step's rows [R, 4]. Raises MalformedStep."""
        slots, counts, flags = (given[:, column].astype(np.int64) for column in (0, 2, 3))
        num_continued = len(slots) - int(np.count_nonzero(flags & ROW_HAS_IDS))
        _check(slots, counts, flags, num_continued, table)
        starts = np.concatenate(([0], counts.cumsum()))
        sampling = np.flatnonzero(flags & ROW_SAMPLES)
        long = np.flatnonzero(counts != 1)
        return cls(
            slots=slots,
            counts=counts,
            flags=flags,
            floors=table.floors[slots],
            starts=starts,
            num_tokens=int(starts[-1]),
            num_continued=num_continued,
            num_ids=int(counts[num_continued:].sum()),
            num_decodes=int(long[0]) if len(long) else len(slots),
            sampling=sampling,
            sampling_slots=slots[sampling],
            last_tokens=starts[1:][sampling] - 1,
        )


def _check(slots: Array, counts: Array, flags: Array, num_continued: int, table: SlotTable) -> None:
    """Reject rows that would be invalid for any slot table."""
    wrong = (slots < 0) | (slots >= table.num_slots) | (counts < 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise MalformedStep(f"row {row}: slot {slots[row]} of {table.num_slots}, {counts[row]} tokens")
    if len(np.unique(slots)) != len(slots):
        raise MalformedStep(f"two rows share a slot: {sorted(slots.tolist())}")
    wrong = ~table.sampled[slots] | (counts != 1) | (flags & ROW_SAMPLES == 0)
    wrong[num_continued:] = False
    wrong |= (flags & ROW_HAS_IDS != 0) != (np.arange(len(slots)) >= num_continued)
    if wrong.any():
        row = int(wrong.argmax())
        raise MalformedStep(
            f"row {row} (slot {slots[row]}): a row without ids has one token, samples, follows a sampled token and"
            " comes before all rows with ids"
        )
