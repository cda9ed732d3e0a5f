"""A step in flight, and how to read its results."""

import msgspec
import numpy as np
import numpy.typing as npt

from nmoe.messages import ROW_RETURNS, ROW_SAMPLES, StepDone
from nmoe.scheduler.batch import Batch
from nmoe.scheduler.draft import Draft
from nmoe.scheduler.request import Request
from nmoe.scheduler.slots import Bools, Ints, Slots


class Cargo(msgspec.Struct, frozen=True):
    """The cells that a step's rows took, each with the slot and uid it was taken for."""

    cells: Ints
    slots: Slots
    uids: npt.NDArray[np.int64]

    @classmethod
    def of(cls, batch: Batch, draft: Draft) -> "Cargo | None":
        """The cells of the step made of `batch`'s rows and `draft`'s chunks; None if there are none."""
        cells = [cell for taken in (*draft.row_cells, *draft.chunk_cells) for cell in taken]
        if not cells:
            return None
        slots = [] if batch.logits is None else batch.slots[batch.logits].tolist()
        for chunk in (chunk for chunks in draft.chunks for chunk in chunks):
            slots += [chunk.request.slot] * chunk.request.cells_for(chunk.first, chunk.count)
        of = np.array(slots, np.int64)
        return cls(np.array(cells, np.int32), of, batch.uids_of(of))


class Flight(msgspec.Struct):
    """Who gets which token and which block once every rank has answered.

    `slots` and `uids` name the rows that return something, rank by rank and in row order. If a row's slot has a
    different uid by now, its request has ended and its results are dropped.
    """

    step_id: int
    started_at: float  # when it was sent, or when the previous step completed
    num_tokens: int  # all ranks
    slots: Slots
    uids: npt.NDArray[np.int64]
    bounds: list[int]  # rank r's rows are bounds[r] to bounds[r + 1]
    samples: Bools | None  # which of the rows return tokens; None: all
    returns: Bools | None  # which of the rows return a block; None: none
    prefilled: list[Request]  # requests whose last chunk is in this step
    cargo: Cargo | None  # None: no row takes cells
    answers: list[StepDone | None]

    @classmethod
    def of(cls, step_id: int, now: float, batch: Batch, draft: Draft) -> "Flight":
        """The flight of the step made of `batch`'s rows and `draft`'s chunks."""
        slots, uids, bounds, returns = batch.slots, batch.uids, batch.bounds, batch.returns
        num_tokens = len(slots) + sum(chunk.count for chunks in draft.chunks for chunk in chunks)
        samples = None
        back = [[chunk for chunk in chunks if chunk.comes_back] for chunks in draft.chunks]
        if any(back):
            each = [
                slot for rank, mine in enumerate(back) for slot in (*batch.rows(rank), *(c.request.slot for c in mine))
            ]
            flags = np.concatenate(
                [
                    part
                    for rank, mine in enumerate(back)
                    for part in (batch.flags[bounds[rank] : bounds[rank + 1]], [chunk.flags for chunk in mine])
                ]
            ).astype(np.int32)
            slots = np.array(each, np.int64)
            uids = batch.uids_of(slots)
            bounds = [start + sum(map(len, back[:rank])) for rank, start in enumerate(bounds)]
            samples, returns = flags & ROW_SAMPLES != 0, flags & ROW_RETURNS != 0
            samples = None if samples.all() else samples
            returns = returns if returns.any() else None
        prefilled = [chunk.request for chunks in draft.chunks for chunk in chunks if chunk.last]
        answers: list[StepDone | None] = [None] * len(back)
        cargo = Cargo.of(batch, draft)
        return cls(step_id, now, num_tokens, slots, uids, bounds, samples, returns, prefilled, cargo, answers)

    def answer(self, done: StepDone) -> None:
        """Store one rank's results. Raises RuntimeError if they do not match the step."""
        mine = slice(self.bounds[done.rank], self.bounds[done.rank + 1])
        rows = mine.stop - mine.start if self.samples is None else int(np.count_nonzero(self.samples[mine]))
        tokens = rows if done.counts is None else int(np.frombuffer(done.counts, np.int32).sum())
        if self.answers[done.rank] is not None or len(done.tokens) != 4 * tokens or not _plausible(done, rows):
            raise RuntimeError(
                f"rank {done.rank} answered step {self.step_id} with {len(done.tokens) // 4} tokens for {rows} rows"
                f"{'' if self.answers[done.rank] is None else ', a second time'}"
            )
        if self.returns is not None or done.blocks or done.block_sizes:
            self._check_blocks(done, 0 if self.returns is None else int(np.count_nonzero(self.returns[mine])))
        self.answers[done.rank] = done

    def _check_blocks(self, done: StepDone, rows: int) -> None:
        sizes = np.frombuffer(done.block_sizes, np.int32)
        if len(sizes) != rows or int(sizes.sum()) != len(done.blocks) or (sizes <= 0).any():
            raise RuntimeError(
                f"rank {done.rank} answered step {self.step_id} with {len(sizes)} blocks of {int(sizes.sum())} bytes"
                f" in {len(done.blocks)} bytes for {rows} rows that return one"
            )

    @property
    def landed(self) -> bool:
        """Whether all ranks have answered."""
        return None not in self.answers

    def results(self) -> tuple[Ints, Ints | None]:
        """All ranks' tokens, and the number of tokens of each sampling row; None: one each."""
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

    def failed(self, num_slots: int) -> list[int]:
        """The slots, with `num_slots` per rank, whose rows produced invalid results."""
        return [
            done.rank * num_slots + slot
            for done in self.answers
            if done is not None and done.failed
            for slot in np.frombuffer(done.failed, np.int32).tolist()
        ]

    def blocks(self) -> "Blocks | None":
        """All ranks' blocks; None if no row returns one."""
        if self.returns is None:
            return None
        answers = [answer for answer in self.answers if answer is not None]
        sizes = np.zeros(len(self.slots), np.int32)
        sizes[self.returns] = np.frombuffer(b"".join(answer.block_sizes for answer in answers), np.int32)
        return Blocks(b"".join(answer.blocks for answer in answers), sizes)


class Blocks(msgspec.Struct, frozen=True):
    """The blocks of some rows, concatenated, and each row's size in bytes, 0 for a row without one."""

    data: bytes
    sizes: Ints

    def of(self, rows: Bools) -> "Blocks":
        """The blocks of a subset of the rows."""
        given = self.sizes > 0
        width = int(self.sizes.max(initial=0))
        if width * np.count_nonzero(given) == len(self.data):  # equal sizes: one gather instead of a slice per row
            table = np.frombuffer(self.data, np.uint8).reshape(-1, max(1, width))
            return Blocks(table[rows[given]].tobytes(), self.sizes[rows])
        ends = np.cumsum(self.sizes, dtype=np.int64)
        (chosen,) = (rows & given).nonzero()
        view, begins = memoryview(self.data), ends - self.sizes
        parts = [view[a:b] for a, b in zip(begins[chosen].tolist(), ends[chosen].tolist(), strict=True)]
        return Blocks(b"".join(parts), self.sizes[rows])


def _plausible(done: StepDone, rows: int) -> bool:
    if done.counts is None:
        return True
    counts = np.frombuffer(done.counts, np.int32)
    return len(counts) == rows and bool((counts > 0).all())
