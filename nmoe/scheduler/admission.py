"""Who is admitted next, and where: the queues of the lanes against the room on the ranks.

The order is (priority, arrival), within a lane and between them: a request that finds no room (other than for the
step's budget, which is new every time) holds back younger ones of other lanes too, or they would take the pages it
waits for.
"""

from collections.abc import Iterator

from nmoe.profiles import Lane
from nmoe.scheduler.draft import Draft
from nmoe.scheduler.limits import Limits
from nmoe.scheduler.placement import EXPECTED_OUTPUT, place
from nmoe.scheduler.ranks import Ranks
from nmoe.scheduler.request import Request, State
from nmoe.scheduler.waiting import WaitingQueue


class Admission:
    """The waiting requests."""

    def __init__(self, limits: Limits, ranks: Ranks) -> None:
        self._limits = limits
        self._ranks = ranks
        self._queues = {lane: WaitingQueue(limits.world_size) for lane in Lane}
        self._blocked: dict[Lane, Request | None] = dict.fromkeys(Lane)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def waiting(self, lane: Lane) -> int:
        """How many wait in one lane."""
        return len(self._queues[lane])

    def push(self, request: Request) -> None:
        """Queue `request`."""
        request.state = State.WAITING
        self._queues[request.lane].push(request)

    def remove(self, request: Request) -> None:
        """Take a waiting request out."""
        self._queues[request.lane].remove(request)

    def admit(self, lane: Lane, draft: Draft, before: tuple[float, float]) -> Iterator[Request]:
        """Admit requests of one lane as long as the next one comes before `before` in the order and finds room.

        The caller takes each one's chunk out of the budget before it asks for the next.
        """
        queue = self._queues[lane]
        self._blocked[lane] = None
        while any(draft.left) and (request := queue.head(draft.closed)) and request.order < before:
            if self._held_back(request):
                return
            place = self._place(request, draft)
            if place is not None:
                queue.remove(request)
                self._ranks.admit(request, *place, draft)
                yield request
            elif request.pinned is not None:
                draft.closed.add(request.pinned)
            else:
                return

    def continues(self, lane: Lane, draft: Draft) -> bool:
        """Whether, after `admit`, only the step's budget keeps somebody from being admitted."""
        head = self._queues[lane].head(draft.closed)
        return head is not None and not self._held_back(head) and bool(self._roomy(head, draft))

    def _held_back(self, request: Request) -> bool:
        """Whether an older request waits for room."""
        return any(
            other and other.state is State.WAITING and other.order < request.order for other in self._blocked.values()
        )

    def _roomy(self, request: Request, draft: Draft) -> list[int]:
        """The ranks that may have room for `request`."""
        ranks = self._ranks
        wanted = range(self._limits.world_size) if request.pinned is None else (request.pinned,)
        # What did not fit does not fit until something changed there: no need to look its prefix up again.
        return [
            r for r in wanted if ranks.has_room(r) and request.misfits.get(r) != ranks.news[r] and r not in draft.closed
        ]

    def _place(self, request: Request, draft: Draft) -> tuple[int, int] | None:
        ranks, limits = self._ranks, self._limits
        roomy = self._roomy(request, draft)
        now = [rank for rank in roomy if draft.left[rank]]
        if now:
            if draft.loads is None:
                draft.loads = ranks.table.outstanding(EXPECTED_OUTPUT)
            found = place(
                request,
                ranks.pages_needed(request),
                ranks.pools,
                {rank: draft.loads[rank] for rank in now},
                ranks.running,
                limits.page_size,
            )
            if found is not None:
                rank, cached = found
                uncached = request.known_len - cached * limits.page_size
                draft.loads[rank] += uncached + min(request.limit - 1 - request.known_len, EXPECTED_OUTPUT)
                return found
            request.misfits.update((rank, ranks.news[rank]) for rank in now)
        if request.pinned is None and len(now) == len(roomy):
            self._blocked[request.lane] = request
        return None
