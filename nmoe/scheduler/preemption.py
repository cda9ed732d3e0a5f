"""Requests that lost their pages, until they wait again.

A preempted request requeues at its old place when its rows in flight have returned: their tokens and blocks are
delivered like all others. Then it knows what has come back, and asks for none of it again.
"""

from nmoe.scheduler.ranks import Ranks
from nmoe.scheduler.request import Request, State
from nmoe.scheduler.stats import Stats
from nmoe.scheduler.waiting import Waiting


class Preemption:
    """Knows which steps are in flight only by their numbers: those sent and not landed."""

    def __init__(self, ranks: Ranks, waiting: Waiting, stats: Stats) -> None:
        self._ranks = ranks
        self._waiting = waiting
        self._stats = stats
        self._sent = self._landed = 0  # numbers of the last steps
        self._draining: list[tuple[int, Request]] = []  # (last step with a row of it, request)

    def preempt(self, request: Request) -> None:
        """Take a request's pages. Its rows in the step that is being planned must not have been planned yet."""
        table = self._ranks.table
        if request.state is State.PREFILL:
            request.returned = max(request.returned, int(table.position[request.slot]))
        self._ranks.stop(request)
        self._ranks.release(request)
        table.position[request.slot] = table.end[request.slot]
        request.state = State.DRAINING
        self._stats.preemptions += 1
        if self._sent > self._landed:
            self._draining.append((self._sent, request))
        else:
            self._requeue(request)

    def sent(self, step_id: int) -> None:
        """A step is in flight."""
        self._sent = step_id

    def landed(self, step_id: int) -> None:
        """A step's results have been delivered, and those of all before it."""
        self._landed = step_id
        drained = [request for step, request in self._draining if step <= step_id]
        if drained:
            self._draining = [(step, request) for step, request in self._draining if step > step_id]
            for request in drained:
                if request.state is State.DRAINING:
                    self._requeue(request)

    def _requeue(self, request: Request) -> None:
        self._ranks.table.vacate(request)
        request.known = request.prompt + request.output
        if request.output:
            request.returned = max(request.returned, request.known_len - 1)
        request.pinned = None
        self._waiting.push(request)
