"""A step being planned, and the Step messages written from it."""

from array import array

import msgspec
import numpy as np
import numpy.typing as npt

from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL, ROW_HAS_IDS, ROW_RETURNS, ROW_SAMPLES, Admit, Step
from nmoe.profiles import Numerics
from nmoe.scheduler.batch import Batch
from nmoe.scheduler.limits import Limits
from nmoe.scheduler.request import Request
from nmoe.scheduler.slots import Ints, SlotTable


class Chunk(msgspec.Struct, frozen=True):
    """A row with ids: `count` tokens of `request` from position `first`; `last` if these complete its known tokens."""

    request: Request
    first: int
    count: int
    last: bool
    flags: int  # as in a Step

    @classmethod
    def of(cls, request: Request, first: int, count: int) -> "Chunk":
        """The next `count` of the request's known tokens."""
        last = first + count == request.known_len
        samples = last and request.max_tokens > 0
        returns = request.returns_in(first + count, samples)
        return cls(request, first, count, last, ROW_HAS_IDS | ROW_SAMPLES * samples | ROW_RETURNS * returns)

    @property
    def comes_back(self) -> bool:
        """Whether it produces any results."""
        return self.flags != ROW_HAS_IDS


class Draft:
    """What each rank's Step will carry in addition to the batch's decode rows."""

    def __init__(self, limits: Limits) -> None:
        world_size = limits.world_size
        self._num_slots = limits.num_slots
        self.left = [0] * world_size  # tokens left for chunks, per rank
        self.routed = 0  # bytes of routing of cached prefixes
        self.closed: set[int] = set()  # ranks that admit nobody else in this step
        self.loads: list[int] | None = None  # in tokens, see nmoe/scheduler/placement.py; computed on first use
        self.chunks: list[list[Chunk]] = [[] for _ in range(world_size)]
        self.pages = [array("i") for _ in range(world_size)]  # slot, page, slot, page, ...
        self.admits: list[list[Admit]] = [[] for _ in range(world_size)]
        self.reserved = [0] * world_size  # cells set aside for the batch's rows, per rank
        self.row_cells: list[list[int]] = [[] for _ in range(world_size)]  # the cells they took
        self.chunk_cells: list[list[int]] = [[] for _ in range(world_size)]

    def set_budget(self, tokens: int) -> None:
        """Give every rank's chunks a budget of `tokens`."""
        self.left = [tokens] * len(self.left)

    def give(self, request: Request, pages: list[int]) -> None:
        """Record that `pages` are appended to the pages of the request's slot."""
        slot = request.slot % self._num_slots
        rows = self.pages[request.rank]
        for page in pages:
            rows.append(slot)
            rows.append(page)

    def has_chunks(self) -> bool:
        """Whether any rank has a row with ids."""
        return any(self.chunks)


class StepWriter:
    """Turns drafts into messages; remembers each rank's last rows so that "same again" takes only a few bytes."""

    def __init__(self, generation: int, table: SlotTable) -> None:
        self._generation = generation
        self._table = table
        self._last: list[tuple[Batch, int] | None] = [None] * table.world_size

    def write(self, step_id: int, numerics: Numerics, batch: Batch, draft: Draft) -> list[Step]:
        """The Steps of all ranks: `batch`'s rows, then the chunks. Call before positions are advanced."""
        bounds = batch.bounds
        ranks = range(len(bounds) - 1)
        tokens = [bounds[r + 1] - bounds[r] + sum(chunk.count for chunk in draft.chunks[r]) for r in ranks]
        channel = CHANNEL_PREFILL if draft.has_chunks() else CHANNEL_DECODE
        rows: Ints | None = None
        steps = []
        for r in ranks:
            chunks = draft.chunks[r]
            state = None if chunks else (batch, batch.changes[r])
            packed: bytes | None = None
            if state is None or state != self._last[r] or bounds[r] == bounds[r + 1]:
                rows = self._decode_rows(batch) if rows is None else rows
                packed = rows[bounds[r] : bounds[r + 1]].tobytes() + self._chunk_rows(chunks)
            self._last[r] = state
            ids = b"".join(c.request.known[4 * c.first : 4 * (c.first + c.count)] for c in chunks)
            pages, admits = draft.pages[r].tobytes(), tuple(draft.admits[r])
            cells = array("i", draft.row_cells[r] + draft.chunk_cells[r]).tobytes()
            steps.append(
                Step(self._generation, step_id, numerics, channel, max(tokens), packed, ids, pages, admits, cells)
            )
        return steps

    def _decode_rows(self, batch: Batch) -> Ints:
        rows: npt.NDArray[np.int32] = np.empty((len(batch.slots), 4), np.int32)
        rows[:, 0] = batch.local
        rows[:, 1] = self._table.position[batch.slots]
        rows[:, 2] = 1
        rows[:, 3] = batch.flags
        return rows

    def _chunk_rows(self, chunks: list[Chunk]) -> bytes:
        rows = array("i")
        for chunk in chunks:
            rows.extend((chunk.request.slot % self._table.num_slots, chunk.first, chunk.count, chunk.flags))
        return rows.tobytes()
