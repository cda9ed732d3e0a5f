"""A step that was sent, and what its results mean."""

import msgspec
import numpy as np
import numpy.typing as npt

from nmoe.messages import StepDone
from nmoe.scheduler.batch import Batch
from nmoe.scheduler.draft import Draft
from nmoe.scheduler.request import Request
from nmoe.scheduler.slots import Ints, Slots


class Flight(msgspec.Struct):
    """Who gets which token when every rank has answered.

    `slots` and `uids` name the rows that sample, rank by rank and in row order; a row whose slot has another uid by now
    belongs to a request that has ended, and its tokens are dropped.
    """

    step_id: int
    started_at: float  # when it was sent, or when the step before it was complete
    num_tokens: int  # all ranks
    slots: Slots
    uids: npt.NDArray[np.int64]
    bounds: list[int]  # rank r's sampling rows are bounds[r] to bounds[r + 1]
    prefilled: list[Request]  # those whose last chunk is in this step
    answers: list[StepDone | None]

    @classmethod
    def of(cls, step_id: int, now: float, batch: Batch, draft: Draft) -> "Flight":
        """The flight of the step that `batch`'s rows and `draft`'s chunks make."""
        slots, uids, bounds = batch.slots, batch.uids, batch.bounds
        prefilled = [[chunk.request for chunk in chunks if chunk.last] for chunks in draft.chunks]
        num_tokens = len(slots) + sum(chunk.count for chunks in draft.chunks for chunk in chunks)
        if any(prefilled):
            ends = [
                slot for rank, mine in enumerate(prefilled) for slot in (*batch.rows(rank), *(r.slot for r in mine))
            ]
            slots = np.array(ends, np.int64)
            uids = batch.uids_of(slots)
            bounds = [start + sum(map(len, prefilled[:rank])) for rank, start in enumerate(bounds)]
        requests = [request for mine in prefilled for request in mine]
        return cls(step_id, now, num_tokens, slots, uids, bounds, requests, [None] * len(prefilled))

    def answer(self, done: StepDone) -> None:
        """Keep one rank's results."""
        rows = self.bounds[done.rank + 1] - self.bounds[done.rank]
        tokens = rows if done.counts is None else int(np.frombuffer(done.counts, np.int32).sum())
        if self.answers[done.rank] is not None or len(done.tokens) != 4 * tokens or not _plausible(done, rows):
            raise RuntimeError(
                f"rank {done.rank} answered step {self.step_id} with {len(done.tokens) // 4} tokens for {rows} rows"
                f"{'' if self.answers[done.rank] is None else ', a second time'}"
            )
        self.answers[done.rank] = done

    @property
    def landed(self) -> bool:
        """Whether all ranks have answered."""
        return None not in self.answers

    def results(self) -> tuple[Ints, Ints | None]:
        """All ranks' tokens, and how many each row has; None: one each."""
        answers = [answer for answer in self.answers if answer is not None]
        tokens = np.frombuffer(b"".join(answer.tokens for answer in answers), np.int32)
        if all(answer.counts is None for answer in answers):
            return tokens, None
        counts = [
            np.ones(len(answer.tokens) // 4, np.int32)
            if answer.counts is None
            else np.frombuffer(answer.counts, np.int32)
            for answer in answers
        ]
        return tokens, np.concatenate(counts)


def _plausible(done: StepDone, rows: int) -> bool:
    if done.counts is None:
        return True
    counts = np.frombuffer(done.counts, np.int32)
    return len(counts) == rows and bool((counts > 0).all())
