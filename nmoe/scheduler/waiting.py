"""Requests waiting for a rank, in (priority, arrival) order. Each lane has two queues: a separate one holds the
requests whose logits need arena cells, which others may overtake.

A queue serves all ranks: a request is bound to a rank only when it is admitted. Siblings are the exception: they are
pinned to the rank that has their prompt. A pinned request that finds no room there must not block other ranks, so it
closes only its own rank to everything after it. An unpinned request at the head blocks everything after it.
"""

import bisect

from nmoe.profiles import Lane
from nmoe.scheduler.request import ORDER, Request, State


class WaitingQueue:
    """Sorted lists: one for requests that may run anywhere, and one per rank for those pinned to it."""

    def __init__(self, world_size: int) -> None:
        self._anywhere: list[Request] = []
        self._pinned: list[list[Request]] = [[] for _ in range(world_size)]

    def __len__(self) -> int:
        return len(self._anywhere) + sum(map(len, self._pinned))

    def _queue(self, request: Request) -> list[Request]:
        return self._anywhere if request.pinned is None else self._pinned[request.pinned]

    def push(self, request: Request) -> None:
        """Insert `request` at its place in the order."""
        request.misfits = {}
        bisect.insort(self._queue(request), request, key=ORDER)

    def remove(self, request: Request) -> None:
        """Remove `request`, wherever it is in the queue."""
        queue = self._queue(request)
        del queue[bisect.bisect_left(queue, request.order, key=ORDER)]

    def head(self, closed: set[int]) -> Request | None:
        """The next request, ignoring those pinned to a rank in `closed`."""
        heads = [queue[0] for rank, queue in enumerate(self._pinned) if queue and rank not in closed]
        return min(heads + self._anywhere[:1], key=ORDER, default=None)


class Waiting:
    """The queues of all lanes."""

    def __init__(self, world_size: int) -> None:
        self._queues = {(lane, logits): WaitingQueue(world_size) for lane in Lane for logits in (False, True)}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def count(self, lane: Lane) -> int:
        """How many requests are waiting in a lane."""
        return len(self._queues[lane, False]) + len(self._queues[lane, True])

    def push(self, request: Request) -> None:
        """Queue `request`."""
        request.state = State.WAITING
        self._queues[request.lane, request.returns.logits].push(request)

    def remove(self, request: Request) -> None:
        """Remove a waiting request."""
        self._queues[request.lane, request.returns.logits].remove(request)

    def queues(self, lane: Lane) -> tuple[WaitingQueue, WaitingQueue | None]:
        """The lane's queue of requests that need no cells, and the one of those that do, or None if that is empty."""
        costly = self._queues[lane, True]
        return self._queues[lane, False], costly if len(costly) else None
