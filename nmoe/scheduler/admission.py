"""Admission: which waiting request goes next and on which rank, given the room each rank has left.

Requests are ordered by (priority, arrival), within a lane and across lanes. A request that finds no room (as opposed to
no step budget, which is renewed every step) also holds back younger requests of other lanes; otherwise they would take
the pages it is waiting for. There are two exceptions:

- BULK, whose queue may hold hundreds of thousands, only gets room nobody else wants. Any request waiting for room holds
  BULK back; BULK holds back nobody. When a request of another lane finds no room, BULK requests are preempted, youngest
  first, until it fits or none is left. So no other lane ever waits for BULK's pages or slots.
- Requests whose logits find no free cell in the arena, because frontends have not read the ones they were given. While
  waiting they are overtaken; while running they are preempted for any request that finds no room. So only requests that
  need cells ever wait for a frontend.
"""

from collections.abc import Iterator

from nmoe.profiles import Lane
from nmoe.scheduler.draft import Draft
from nmoe.scheduler.limits import Limits
from nmoe.scheduler.placement import EXPECTED_OUTPUT, place
from nmoe.scheduler.preemption import Preemption
from nmoe.scheduler.ranks import Ranks
from nmoe.scheduler.request import ORDER, Request, State
from nmoe.scheduler.waiting import Waiting


class Admission:
    """Makes the decisions. Nothing else removes requests from the queues, except requests ending."""

    def __init__(self, limits: Limits, ranks: Ranks, waiting: Waiting, preemption: Preemption) -> None:
        self._limits = limits
        self._ranks = ranks
        self._waiting = waiting
        self._preemption = preemption
        self._blocked: dict[Lane, Request | None] = dict.fromkeys(Lane)

    def admit(self, lane: Lane, draft: Draft, before: tuple[float, float]) -> Iterator[Request]:
        """Admit requests of one lane while the next one precedes `before` in the order and finds room.

        The caller deducts each request's chunk from the budget before asking for the next.
        """
        self._blocked[lane] = None
        while any(draft.left) and (request := self._head(lane, draft)) and request.order < before:
            if self._held_back(request):
                return
            place = self._place(request, draft) or self._make_room(request, draft)
            if place is not None:
                self._waiting.remove(request)
                self._ranks.admit(request, *place, draft)
                yield request
            elif request.pinned is not None:
                draft.closed.add(request.pinned)
            else:
                return

    def continues(self, lane: Lane, draft: Draft) -> bool:
        """Whether, after `admit`, only the step budget keeps another request from being admitted."""
        head = self._head(lane, draft)
        return head is not None and not self._held_back(head) and bool(self._roomy(head, draft))

    def _head(self, lane: Lane, draft: Draft) -> Request | None:
        """The next request, skipping those that need cells where none are free."""
        plain, costly = self._waiting.queues(lane)
        heads = [plain.head(draft.closed)]
        if costly:
            dry = {rank for rank in range(self._limits.world_size) if not self._has_cells(rank, draft)}
            if len(dry) < self._limits.world_size:
                heads.append(costly.head(draft.closed | dry))
        return min((head for head in heads if head), key=ORDER, default=None)

    def _has_cells(self, rank: int, draft: Draft) -> bool:
        return self._ranks.cells.num_free(rank) > draft.reserved[rank]

    def _held_back(self, request: Request) -> bool:
        """Whether a request that precedes `request` is waiting for room."""
        return any(
            other.state is State.WAITING and (request.lane is Lane.BULK or other.order < request.order)
            for lane, other in self._blocked.items()
            if other and lane not in (request.lane, Lane.BULK)
        )

    def _open(self, request: Request, draft: Draft) -> list[int]:
        """The ranks `request` may run on, ignoring room and budget."""
        wanted = range(self._limits.world_size) if request.pinned is None else (request.pinned,)
        return [
            r for r in wanted if r not in draft.closed and (not request.returns.logits or self._has_cells(r, draft))
        ]

    def _roomy(self, request: Request, draft: Draft) -> list[int]:
        """The ranks that may have room for `request`."""
        ranks = self._ranks
        # A request that did not fit still does not until something changes on that rank, so skip the prefix lookup.
        return [r for r in self._open(request, draft) if ranks.has_room(r) and request.misfits.get(r) != ranks.news[r]]

    def _place(self, request: Request, draft: Draft) -> tuple[int, int] | None:
        """The rank for `request` and how many of its pages are cached there, if a rank has both room and budget."""
        roomy = self._roomy(request, draft)
        now = [rank for rank in roomy if draft.left[rank]]
        if now and (found := self._fit(request, now, draft)):
            return found
        request.misfits.update((rank, self._ranks.news[rank]) for rank in now)
        if request.pinned is None and len(now) == len(roomy):
            self._blocked[request.lane] = request
        return None

    def _fit(self, request: Request, on: list[int], draft: Draft) -> tuple[int, int] | None:
        ranks, limits = self._ranks, self._limits
        if draft.loads is None:
            draft.loads = ranks.table.outstanding(EXPECTED_OUTPUT)
        loads, need = {rank: draft.loads[rank] for rank in on}, ranks.pages_needed(request)
        found = place(request, need, ranks.pools, loads, ranks.running, limits.page_size)
        if found is not None:
            rank, cached = found
            uncached = request.known_len - cached * limits.page_size
            draft.loads[rank] += uncached + min(max(0, request.limit - 1 - request.known_len), EXPECTED_OUTPUT)
        return found

    def _make_room(self, request: Request, draft: Draft) -> tuple[int, int] | None:
        """Preempt others for a request that found no room, on the rank where that frees the most pages."""
        ranks = self._ranks
        if request.pinned is None and self._blocked[request.lane] is not request:
            return None  # it only waits for the budget
        best: tuple[int, list[Request]] | None = None
        need, keys = ranks.pages_needed(request), request.shared_keys(self._limits.page_size)
        for rank in self._open(request, draft):
            yielding = ranks.yielding(rank, request.lane)
            if yielding and draft.left[rank] and ranks.table.num_free(rank):
                spare = ranks.pools[rank].available + sum(len(other.pages) for other in yielding)
                spare -= need - ranks.pools[rank].tree.match(keys)
                if spare >= 0 and (best is None or spare > best[0]):
                    best = spare, yielding
        if best is None:
            return None
        for other in sorted(best[1], key=ORDER, reverse=True):
            rank = other.rank
            self._preemption.preempt(other)
            if ranks.has_room(rank) and (found := self._fit(request, [rank], draft)):
                self._blocked[request.lane] = None
                return found
        return None
