"""Preempted requests, from losing their pages until they are queued again.

A preempted request returns to its old place in the queue once its rows in flight have returned; their tokens and blocks
are delivered as usual. By then it knows what it has already returned, and does not request any of it again.
"""

from nmoe.scheduler.ranks import Ranks
from nmoe.scheduler.request import Request, State
from nmoe.scheduler.stats import Stats
from nmoe.scheduler.waiting import Waiting


class Preemption:
    """Tracks the steps in flight only by number: those sent but not landed."""

    def __init__(self, ranks: Ranks, waiting: Waiting, stats: Stats) -> None:
        self._ranks = ranks
        self._waiting = waiting
        self._stats = stats
        self._sent = self._landed = 0  # numbers of the last steps
        self._draining: list[tuple[int, Request]] = []  # (last step with a row of it, request)

    def preempt(self, request: Request) -> None:
        """Take away a request's pages. None of its rows may have been planned yet in the step being planned."""
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
        """A step has been sent."""
        self._sent = step_id

    def landed(self, step_id: int) -> None:
        """The results of a step, and of all steps before it, have been delivered."""
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
