"""Per-token state, as arrays with one element per slot of every rank.

A slot is identified by its global number, rank * num_slots + slot. A free slot has uid -1. Positions count tokens of
the whole sequence, prompt and output:

    0 ........ known_len ........ position ........ known ........ limit
    |-- computed from ids --|-- rows planned --|
    a decode row at position p takes token p and returns token p + 1, so rows are planned while position < limit - 1;
    with max_tokens = 0 the whole prompt is computed and nothing is returned, so they are planned while position < limit
"""

import numpy as np
import numpy.typing as npt

from nmoe.messages import ROW_RETURNS, ROW_SAMPLES
from nmoe.scheduler.request import Request

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int32]
Slots = npt.NDArray[np.int64]

TAIL = 64  # output tokens kept per slot before they move to the request's bytes


class SlotTable:
    """The arrays, and which slots are free."""

    def __init__(self, world_size: int, num_slots: int) -> None:
        size = world_size * num_slots
        self.world_size = world_size
        self.num_slots = num_slots
        self.uid = np.full(size, -1, np.int64)
        self.position = np.zeros(size, np.int32)  # where the next row starts
        self.prefilled = np.zeros(size, np.int32)  # ids of rows below this position have been sent
        self.end = np.zeros(size, np.int32)  # no row starts here or later
        self.capacity = np.zeros(size, np.int32)  # tokens that fit its pages
        self.flags = np.zeros(size, np.int32)  # of its decode rows, as in a Step
        self.logits = np.zeros(size, np.bool_)  # whether each of its rows takes a cell of the arena
        self.known = np.zeros(size, np.int32)  # tokens whose ids have been received
        self.eos = np.full((2, size), -1, np.int32)  # padded with -1; as many rows as the longest list seen
        self.tail = np.zeros((size, TAIL), np.int32)
        self.tail_begin = np.zeros(size, np.int32)  # the index of its first token; earlier ones have moved
        self.tail_len = np.zeros(size, np.int32)
        self.requests: list[Request | None] = [None] * size
        self._free = [
            list(range(rank * num_slots + num_slots - 1, rank * num_slots - 1, -1)) for rank in range(world_size)
        ]

    def num_free(self, rank: int) -> int:
        """Free slots of `rank`."""
        return len(self._free[rank])

    def occupy(self, request: Request, rank: int, position: int) -> None:
        """Give `request`, whose known tokens are set, a slot on `rank`; its first row starts at `position`."""
        slot = self._free[rank].pop()
        request.rank, request.slot = rank, slot
        self.requests[slot] = request
        self.uid[slot] = request.uid
        self.position[slot] = position
        self.prefilled[slot] = self.known[slot] = request.known_len
        self.end[slot] = request.last_computed
        self.logits[slot] = request.returns.logits
        self.flags[slot] = ROW_SAMPLES | ROW_RETURNS if request.returns else ROW_SAMPLES
        # Offset by position, so that rows that start together do not fill their tails together.
        self.tail_begin[slot] = self.tail_len[slot] = request.known_len % TAIL
        if (more := len(request.eos_ids) - len(self.eos)) > 0:
            self.eos = np.pad(self.eos, ((0, more), (0, 0)), constant_values=-1)
        self.eos[:, slot] = -1
        self.eos[: len(request.eos_ids), slot] = request.eos_ids

    def vacate(self, request: Request) -> None:
        """Free the request's slot. Results of rows still in flight will find a different uid there, or none."""
        self.flush(request)
        self.uid[request.slot] = -1
        self.position[request.slot] = self.prefilled[request.slot] = self.end[request.slot] = 0
        self.requests[request.slot] = None
        self._free[request.rank].append(request.slot)
        request.rank = request.slot = -1

    def flush(self, request: Request) -> None:
        """Move the slot's newest tokens to the request's output."""
        length = self.tail_len[request.slot]
        request.output += self.tail[request.slot, self.tail_begin[request.slot] : length].tobytes()
        self.tail_begin[request.slot] = length

    def _flush_full(self, slots: Slots) -> None:
        """Flush full tails and start them over, many at a time, since prompts may have equal lengths."""
        width = 4 * TAIL
        tokens, begins = self.tail[slots].tobytes(), self.tail_begin[slots].tolist()
        self.tail_begin[slots] = self.tail_len[slots] = 0
        for at, (slot, begin) in enumerate(zip(slots.tolist(), begins, strict=True)):
            self.request(slot).output += tokens[at * width + 4 * begin : (at + 1) * width]

    def request(self, slot: int) -> Request:
        """The request in an occupied slot. Raises RuntimeError if the slot is free."""
        request = self.requests[slot]
        if request is None:
            raise RuntimeError(f"slot {slot} is free but was planned")
        return request

    def append(self, slots: Slots, tokens: Ints) -> tuple[Bools, Bools]:
        """Append a token to each of `slots` (distinct, all occupied). Returns which ended by EOS, and by length."""
        lengths = self.tail_len[slots]
        self.tail[slots, lengths] = tokens
        lengths += 1
        self.tail_len[slots] = lengths
        known = self.known[slots] + 1
        self.known[slots] = known
        full = lengths == TAIL
        if np.count_nonzero(full):  # an array method such as any() takes four times as long on few rows
            self._flush_full(slots[full])
        return np.logical_or.reduce(self.eos.take(slots, axis=1) == tokens), known > self.end[slots]

    def outstanding(self, most: int) -> list[int]:
        """Per rank: tokens to compute from ids, plus tokens to generate, capped at `most` per request."""
        begun = np.maximum(self.position, self.prefilled)
        tokens = begun - self.position + np.minimum(self.end - begun, most)
        load: list[int] = tokens.reshape(self.world_size, self.num_slots).sum(axis=1).tolist()
        return load
