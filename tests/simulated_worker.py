"""A worker without a model: it applies Steps as a device would and draws each token from the whole true history.

A cache entry holds a digest of all tokens up to its position. So a token that was lost, doubled, computed in the wrong
order or written to a page that somebody else owns changes every later token of the request, and is caught at the latest
when the request's output is compared with `expected_output`. What can be caught earlier is asserted on the spot.
"""

import dataclasses

import numpy as np

from nmoe.messages import ROW_HAS_IDS, ROW_RETURNS, ROW_SAMPLES, Step, StepDone
from nmoe.outputs import Returns, pack

VOCABULARY = 40


def digest(previous: int, token: int) -> int:
    """The digest of a history that ends in `token`."""
    return (previous * 1000003 + token + 1) % (2**61 - 1)


def draw(history: int, seed: int) -> int:
    """The token after a history."""
    return ((history ^ seed * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 % 2**64 >> 24) % VOCABULARY


def expected_output(prompt: list[int], seed: int, max_tokens: int, eos_ids: tuple[int, ...]) -> list[int]:
    """What a request must return if nobody stops it."""
    history = 0
    for token in prompt:
        history = digest(history, token)
    output: list[int] = []
    while len(output) < max_tokens and not (output and output[-1] in eos_ids):
        output.append(draw(history, seed))
        history = digest(history, output[-1])
    return output


def record(position: int, token: int, history: int, returns: Returns) -> bytes:
    """Of the token after `position`, before which lies `history`: it names all three, so that none can be mistaken."""
    named = np.array([position, token, history % 2**31], np.int32).tobytes()
    return named + bytes(returns.record_bytes - len(named))


def routing(position: int, history: int) -> bytes:
    """Of a position, history included."""
    return np.array([position, history % 2**31], np.int32).tobytes()


@dataclasses.dataclass
class Slot:
    """One row of the slot table."""

    tenancy: int  # which admission
    seed: int
    floor: int  # positions below are in shared pages
    end: int  # the next position
    prompt_len: int
    past: list[int]
    returns: Returns
    returned: int  # what positions below return has come back
    last: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Entry:
    """One position of the cache."""

    previous: int
    history: int
    tenancy: int
    step: int
    broken: bool  # not finite


class SimulatedWorker:
    """One rank. `limits_by_seed` says how long the request with a seed may get, which a device need not know."""

    def __init__(
        self,
        rank: int,
        num_slots: int,
        page_size: int,
        row_tokens: int,
        limits_by_seed: dict[int, int],
        arena: dict[int, bytes] | None = None,
    ) -> None:
        self.rank = rank
        self.num_slots = num_slots
        self.page_size = page_size
        self.row_tokens = row_tokens
        self.limits_by_seed = limits_by_seed
        self.arena = {} if arena is None else arena  # cell -> the record whose logits it has
        self.broken: set[int] = set()  # seeds of requests whose logits are not finite any more
        self.slots: dict[int, Slot] = {}
        self.cache: dict[tuple[int, int], Entry] = {}  # (page, offset)
        self.writers: dict[int, tuple[int, int]] = {}  # page -> (tenancy, step) of the last write
        self.previous_rows: list[tuple[int, int, int, int]] = []
        self.tenancies = 0
        self.last_step = 0

    def apply(self, step: Step) -> StepDone:
        """Do what `step` says. Rows of a step run side by side: all write before any is checked."""
        assert step.step_id == self.last_step + 1
        self.last_step = step.step_id
        self._admit(step)
        rows = self.rows_of(step)
        ids = np.frombuffer(step.ids, np.int32).tolist()
        computed = []
        for slot_id, first, count, flags in rows:
            slot = self.slots[slot_id]
            if flags & ROW_HAS_IDS:
                tokens, ids = ids[:count], ids[count:]
                assert len(tokens) == count
            else:
                assert count == 1
                assert slot.last is not None, "a decode row needs a sampled token"
                tokens = [slot.last]
            computed.append(self._compute(step.step_id, slot, first, tokens, flags))
        assert not ids, "ids that belong to no row"
        broken = {slot_id for slot_id, *_ in rows if self._check_context(step.step_id, self.slots[slot_id])}
        self.previous_rows = rows
        cells = np.frombuffer(step.cells, np.int32).tolist()
        blocks = [
            self._block(self.slots[row[0]], row[1], new, cells)
            for row, new in zip(rows, computed, strict=True)
            if row[3] & ROW_RETURNS
        ]
        failed = []
        for place, (slot_id, *_, flags) in enumerate(rows):
            slot, new = self.slots[slot_id], computed[place]
            if slot_id in broken and (new is not None or (flags & ROW_RETURNS and slot.returns.prompt)):
                failed.append(slot_id)
                computed[place] = None if new is None else [-1] * len(new)
        sampled = [new for new in computed if new is not None]
        tokens_of_all = np.array([token for new in sampled for token in new], np.int32).tobytes()
        counts = None
        if self.row_tokens > 1:
            counts = np.array([len(new) for new in sampled], np.int32).tobytes()
        assert not cells, "cells that belong to no record"
        sizes = np.array([len(block) for block in blocks], np.int32).tobytes()
        ids_of_failed = np.array(failed, np.int32).tobytes()
        return StepDone(1, self.rank, step.step_id, tokens_of_all, counts, b"".join(blocks), sizes, ids_of_failed)

    def _block(self, slot: Slot, first: int, new: list[int] | None, cells: list[int]) -> bytes:
        """What the positions before `slot.end` return that has not come back: see `record` and `routing`.

        Takes what it needs from the front of `cells`.
        """
        new = new or []
        known = dict(enumerate(slot.past))
        known.update(zip(range(slot.end - len(new) + 1, slot.end + 1), new, strict=True))
        records = []
        if slot.returns.records:
            begin = max(first, slot.returned)
            told = range(begin if slot.returns.prompt else max(begin, slot.prompt_len - 1), slot.end)
            records = [
                record(p, known[p + 1], self._history(slot, p + 1), slot.returns) for p in told if p + 1 in known
            ]
        routed = []
        if slot.returns.routing:
            routed = [routing(p, self._history(slot, p + 1)) for p in range(slot.returned, slot.end)]
        slot.returned = slot.end
        taken = []
        if slot.returns.logits:
            taken, cells[:] = cells[: len(records)], cells[len(records) :]
            self.arena.update(zip(taken, records, strict=True))
        packed = np.array(taken, np.int32).tobytes()
        return pack(packed, b"".join(records), len(records), b"".join(routed), len(routed))

    def _admit(self, step: Step) -> None:
        for admit in step.admits:
            self.tenancies += 1
            assert 0 <= admit.slot < self.num_slots
            self.slots[admit.slot] = Slot(
                self.tenancies,
                admit.sampling.seed,
                admit.cached,
                admit.cached,
                admit.prompt_len,
                np.frombuffer(admit.past, np.int32).tolist(),
                admit.returns,
                admit.returned,
            )
        with_rows = {row[0] for row in self.rows_of(step)}
        assert {admit.slot for admit in step.admits} <= with_rows
        for slot_id, page in np.frombuffer(step.pages, np.int32).reshape(-1, 2).tolist():
            assert slot_id in with_rows, "a page for a slot without a row"
            assert page not in self.slots[slot_id].pages
            self.slots[slot_id].pages.append(page)

    def rows_of(self, step: Step) -> list[tuple[int, int, int, int]]:
        """The rows of a step, also of one that says "as before"."""
        if step.rows is not None:
            rows = [tuple(row) for row in np.frombuffer(step.rows, np.int32).reshape(-1, 4).tolist()]
        else:
            assert self.previous_rows
            assert all(flags & ~ROW_RETURNS == ROW_SAMPLES for *_, flags in self.previous_rows)
            rows = [(slot, first + count, 1, flags) for slot, first, count, flags in self.previous_rows]
        decodes = [not row[3] & ROW_HAS_IDS for row in rows]
        assert decodes == sorted(decodes, reverse=True), "decode rows come first"
        assert len({row[0] for row in rows}) == len(rows), "a slot has two rows"
        return rows

    def _compute(self, step_id: int, slot: Slot, first: int, tokens: list[int], flags: int) -> list[int] | None:
        if self.row_tokens == 1 or flags & ROW_HAS_IDS:
            fresh = not slot.pages or (first == slot.floor - 1 and slot.end == slot.floor)
            assert first == slot.end or fresh, "a row goes on where its slot ends"
        else:
            assert first <= slot.end, "with several tokens per row, the plan is a lower bound"
            first = slot.end
        limit = self.limits_by_seed[slot.seed]
        if first >= limit - 1 and first >= slot.prompt_len:
            assert self.row_tokens > 1, "planned beyond max_tokens"
            return [0]
        history = self._history(slot, first)
        for position, token in enumerate(tokens, first):
            history = self._write(step_id, slot, position, history, token)
        slot.end = first + len(tokens)
        if not flags & ROW_SAMPLES:
            return None
        new = [draw(history, slot.seed)]
        # A draft of a speculative decoder: how many of it are right depends on the history alone.
        for _ in range(history % self.row_tokens):
            if slot.end >= limit - 1:
                break
            history = self._write(step_id, slot, slot.end, history, new[-1])
            slot.end += 1
            new.append(draw(history, slot.seed))
        slot.last = new[-1]
        return new

    def _history(self, slot: Slot, end: int) -> int:
        return self.cache[self._place(slot, end - 1)].history if end else 0

    def _place(self, slot: Slot, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.page_size)
        assert index < len(slot.pages), f"position {position} has no page"
        return slot.pages[index], offset

    def _write(self, step_id: int, slot: Slot, position: int, history: int, token: int) -> int:
        new = digest(history, token)
        page, offset = self._place(slot, position)
        if position >= slot.floor:
            tenancy, last = self.writers.get(page, (slot.tenancy, 0))
            assert tenancy == slot.tenancy or last < step_id, f"page {page} has two writers in step {step_id}"
            self.writers[page] = (slot.tenancy, step_id)
            self.cache[page, offset] = Entry(history, new, slot.tenancy, step_id, slot.seed in self.broken)
        else:
            assert self.cache[page, offset].history == new, "a shared page holds other tokens"
        return new

    def _check_context(self, step_id: int, slot: Slot) -> bool:
        """Whether something in it is not finite, and so neither are the logits."""
        history, broken = 0, slot.seed in self.broken
        for position in range(slot.end):
            entry = self.cache[self._place(slot, position)]
            assert entry.previous == history, f"position {position} is not in the page that should hold it"
            assert entry.step < step_id or entry.tenancy == slot.tenancy, "read in the step that writes it"
            history, broken = entry.history, broken or entry.broken
        return broken
