"""Plans one lane's part of a step: pages for running rows, prompt chunks, and admissions while there is room.

The budget is smaller while any lane but BULK has decode rows, whichever lane's step it is, because those rows wait for
the step's chunks. Outside BULK, running rows come first, then chunks. In BULK, prompts come first: its rows run only
when nobody else can be admitted, so that the batch is as full as it gets.
"""

import math

import numpy as np

from nmoe.profiles import Lane
from nmoe.scheduler.admission import Admission
from nmoe.scheduler.batch import Batch
from nmoe.scheduler.draft import Chunk, Draft
from nmoe.scheduler.limits import Limits
from nmoe.scheduler.preemption import Preemption
from nmoe.scheduler.ranks import Ranks
from nmoe.scheduler.request import Request, State
from nmoe.scheduler.slots import Bools, Slots
from nmoe.scheduler.stats import Stats
from nmoe.scheduler.waiting import Waiting

# Of cached prefixes starting in one step; about what the chunks of a 16,384-token step return for DeepSeek-V3.
_ROUTED_BYTES = 8 << 20


class Planner:
    """Fills drafts."""

    def __init__(
        self,
        limits: Limits,
        ranks: Ranks,
        waiting: Waiting,
        preemption: Preemption,
        stats: Stats,
    ) -> None:
        self._limits = limits
        self._ranks = ranks
        self._waiting = waiting
        self._admission = Admission(limits, ranks, waiting, preemption)
        self._preemption = preemption
        self._stats = stats

    def has_work(self, lane: Lane) -> bool:
        """Whether the lane has anything to plan, ignoring room."""
        ranks = self._ranks
        return bool(
            ranks.prefills[lane] or self._waiting.count(lane) or ranks.batches[lane].slots.size or ranks.costly[lane]
        )

    def plan(self, lane: Lane, now: float) -> tuple[Batch, Draft]:
        """The rows that continue, and everything else the lane does in the next step; both may be empty."""
        draft = Draft(self._limits)
        batch = self._ranks.batches[lane]
        if lane is not Lane.BULK:
            self._ration(lane)
            self._extend(batch, draft)
            self._reserve(batch, draft)
            self._prefill(lane, draft, now)
            self._take_cells(batch, draft)
            return batch, draft
        self._prefill(lane, draft, now)
        self._ration(lane)
        # Rows that must preempt others for pages wait for a step without chunks: a victim may have a chunk in this one.
        if draft.has_chunks() and (self._admission.continues(lane, draft) or self._lacks_pages(batch)):
            return self._ranks.no_rows, draft
        self._extend(batch, draft)
        self._reserve(batch, draft)
        self._take_cells(batch, draft)
        return batch, draft

    def _ration(self, lane: Lane) -> None:
        """Each row with logits needs a cell of the arena. The oldest go first; those that get none, or are read too
        slowly, stall."""
        ranks = self._ranks
        if costly := ranks.costly[lane]:
            left = [ranks.cells.num_free(rank) for rank in range(self._limits.world_size)]
            for request in sorted(costly, key=lambda request: request.order):
                if left[request.rank] and ranks.cells.held(request.uid) < self._limits.cells_share:
                    left[request.rank] -= 1
                    ranks.resume(request)
                else:
                    ranks.stall(request)

    def _reserve(self, batch: Batch, draft: Draft) -> None:
        """Set aside cells for the batch's rows, so that chunks do not take them."""
        if batch.logits is not None:
            by_rank = batch.slots[batch.logits] // self._limits.num_slots
            draft.reserved = np.bincount(by_rank, minlength=self._limits.world_size).tolist()

    def _take_cells(self, batch: Batch, draft: Draft) -> None:
        if batch.logits is not None:
            draft.row_cells = [self._ranks.cells.take(rank, count) for rank, count in enumerate(draft.reserved)]

    def _short(self, batch: Batch) -> Bools:
        """Which rows need another page for their next token."""
        table, slots = self._ranks.table, batch.slots
        last = np.minimum(table.position[slots] + self._limits.lookahead, table.end[slots] - 1)
        short: Bools = last >= table.capacity[slots]
        return short

    def _page_counts(self, slots: Slots) -> tuple[list[int], list[int]]:
        """The number of pages needed by each of `slots`, all of which are short of some, and the total per rank."""
        table, limits = self._ranks.table, self._limits
        last = np.minimum(table.position[slots] + limits.lookahead, table.end[slots] - 1)
        counts = (last + 1 - table.capacity[slots] + limits.page_size - 1) // limits.page_size
        demand = np.bincount(slots // limits.num_slots, counts, limits.world_size).astype(int)
        return counts.tolist(), demand.tolist()

    def _covered(self, demand: list[int]) -> bool:
        return all(need <= pool.available for need, pool in zip(demand, self._ranks.pools, strict=True))

    def _lacks_pages(self, batch: Batch) -> bool:
        slots = batch.slots[self._short(batch)]
        return bool(len(slots)) and not self._covered(self._page_counts(slots)[1])

    def _extend(self, batch: Batch, draft: Draft) -> None:
        """Make sure every running row has the pages for its next token."""
        short = self._short(batch)
        if not np.count_nonzero(short):
            return
        slots = batch.slots[short]
        counts, demand = self._page_counts(slots)
        needs = [(self._ranks.table.request(slot), count) for slot, count in zip(slots.tolist(), counts, strict=True)]
        if self._covered(demand):
            self._ranks.grow_all(needs, demand, draft)
        else:
            self._grow_by_age(needs, draft)

    def _grow_by_age(self, needs: list[tuple[Request, int]], draft: Draft) -> None:
        """Oldest first. A victim is younger than the request it yields to, so it was given no pages in this step."""
        ranks = self._ranks
        for request, count in sorted(needs, key=lambda need: need[0].order):
            while request.state is State.DECODE and ranks.pools[request.rank].available < count:
                self._preemption.preempt(ranks.next_victim(request.rank))
            if request.state is State.DECODE:
                ranks.grow(request, ranks.pools[request.rank].take(count), draft)

    def _prefill(self, lane: Lane, draft: Draft, now: float) -> None:
        """Fill the budget with chunks. A waiting request precedes any started request that follows it in the order."""
        batches = self._ranks.batches
        decoding = any(batches[other].slots.size for other in Lane if other is not Lane.BULK)
        draft.set_budget(self._limits.chunk(decoding))
        for request in sorted(self._ranks.prefills[lane], key=lambda request: request.order):
            self._admit(lane, draft, request.order, now)
            if request.state is State.PREFILL:  # otherwise it was preempted for one of them
                self._chunk(request, draft)
        self._admit(lane, draft, (math.inf, 0), now)

    def _admit(self, lane: Lane, draft: Draft, before: tuple[float, float], now: float) -> None:
        for request in self._admission.admit(lane, draft, before):
            if not request.scheduled_at:
                request.scheduled_at = now
                request.cached_tokens = int(self._ranks.table.position[request.slot])
                self._count_admitted(request)
            self._chunk(request, draft, least=1)
            self._route_cached(request, draft)

    def _route_cached(self, request: Request, draft: Draft) -> None:
        """A cached prefix returns its routing at once, however long it is. Together the siblings of one long prompt
        would return hundreds of megabytes and hold up all ranks, so spread them over several steps."""
        if request.returns.routing:
            cached = int(self._ranks.table.position[request.slot]) - request.returned
            draft.routed += max(0, cached) * self._limits.routing_bytes
            if draft.routed > _ROUTED_BYTES:
                draft.set_budget(0)

    def _chunk(self, request: Request, draft: Draft, least: int = 0) -> None:
        """`least`: 1 for a request admitted in this step, which must get a row; admission found a cell for it."""
        first = int(self._ranks.table.position[request.slot])
        most = min(draft.left[request.rank], self._limits.chunk_of(request.returns))
        count = min(most, request.known_len - first)
        if request.returns.logits and count:
            count = max(least, self._affordable(request, first, count, draft))
            self._ranks.mark_stalled(request, not count)
            draft.chunk_cells[request.rank] += self._ranks.cells.take(request.rank, request.cells_for(first, count))
        if count:
            draft.left[request.rank] -= count
            draft.chunks[request.rank].append(Chunk.of(request, first, count))

    def _affordable(self, request: Request, first: int, count: int, draft: Draft) -> int:
        """How many of the `count` tokens from `first` have cells available; each needs at most one."""
        cells = self._ranks.cells
        left = min(
            cells.num_free(request.rank) - draft.reserved[request.rank],
            max(0, self._limits.cells_share - cells.held(request.uid)),
        )
        while request.cells_for(first, count) > left:
            count -= max(1, request.cells_for(first, count) - left - 1)  # the last cell may be for the sample
        return count

    def _count_admitted(self, request: Request) -> None:
        self._stats.prompt_tokens += request.prompt_len
        self._stats.prefix_queries += request.prompt_len * self._limits.enable_prefix_cache
        self._stats.prefix_hits += request.cached_tokens
        self._stats.queue_times.append(request.scheduled_at - request.arrived_at)
