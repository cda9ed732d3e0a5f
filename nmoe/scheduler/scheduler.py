"""The policy: which tokens of which requests each rank computes in the next step.

No sockets, no clock, no torch; the time is passed in. There is no prefill or decode phase: a request has tokens to
compute and tokens already computed. A step is planned in four moves:

    extend   every running row advances by one token; rows with full pages get another, by preemption if need be
    prefill  chunks in (priority, arrival) order, for started requests and those admitted within the budget
    write    one Step message per rank
    advance  fully planned rows leave the batch; computed prompts join the batch and the prefix tree

Invariants:
- A page gets a new owner only in a later step than its last writer's. Pages are freed by results, aborts and
  preemptions, all of which happen after the last step that writes them was sent; a preempted row is not in the step
  being planned.
- Steps run on the device in order, so a step may read the pages that the previous step writes: prompt pages enter the
  tree as soon as the step that computes them has been planned.
- Every accepted uid gets exactly one terminal entry: `_end` is the only way out of `_requests`.
"""

from collections import deque

import msgspec

from nmoe.errors import RequestError
from nmoe.messages import Abort, Ended, Finish, Reason, Rejected, Step, StepDone, Submit, Tokens, uid_frontend
from nmoe.profiles import PROFILES, Lane
from nmoe.scheduler.batch import Batch
from nmoe.scheduler.cells import LIFE, Cells, life_of
from nmoe.scheduler.draft import Draft, StepWriter
from nmoe.scheduler.flight import Flight
from nmoe.scheduler.landing import append_results, deliver_cells
from nmoe.scheduler.limits import Limits
from nmoe.scheduler.outbox import Outbox
from nmoe.scheduler.planner import Planner
from nmoe.scheduler.preemption import Preemption
from nmoe.scheduler.prefix import extend_keys
from nmoe.scheduler.ranks import Ranks
from nmoe.scheduler.request import Request, State, siblings
from nmoe.scheduler.stats import Stats
from nmoe.scheduler.turns import Turns
from nmoe.scheduler.waiting import Waiting

_NOT_FINITE = RequestError(
    "the model's logits are not finite here; check the checkpoint and [model] dtype",
    status=500,
    code="logits_not_finite",
)


class Scheduler:
    """All requests of all frontends, and what every rank does next.

    The events are `submit`, `finish`, `abort` and `complete`; `plan` and `drain` return what to send. It is
    deterministic: the same calls in the same order produce the same messages. `cells` outlives it, as frontends do.
    """

    def __init__(self, limits: Limits, cells: Cells, generation: int = 1) -> None:
        self.limits = limits
        self._cells = cells
        self.stats = Stats()
        self._generation = generation
        self._outbox = Outbox(generation)
        self._arrivals = 0
        self._next_step = 1
        self._requests: dict[int, Request] = {}
        self._clear()

    def _clear(self) -> None:
        self._ranks = Ranks(self.limits, self.stats, self._cells)
        self._waiting = Waiting(self.limits.world_size)
        self._writer = StepWriter(self._generation, self._ranks.table)
        self._flights: deque[Flight] = deque()
        self._preemption = Preemption(self._ranks, self._waiting, self.stats)
        self._planner = Planner(self.limits, self._ranks, self._waiting, self._preemption, self.stats)
        self._turns = Turns()
        self._waiting_siblings = dict.fromkeys(Lane, 0)

    # ------------------------------------------------------------------------------------------------------- events

    def submit(self, submit: Submit, now: float) -> Rejected | None:
        """Accept a request and its siblings, or return why not."""
        limits = self.limits
        rejected = limits.refusal(submit, self._requests, self._num_waiting_beside(submit), self._generation)
        if rejected is not None:
            return rejected
        requests = siblings(submit, self._arrivals, now)
        self._arrivals += submit.n
        if limits.enable_prefix_cache:
            extend_keys(requests[0].keys, submit.prompt, limits.page_size, requests[0].numerics)
        for request in requests:
            self._requests[request.uid] = request
        if limits.enable_prefix_cache:
            self._lead(requests)
        else:
            for request in requests:
                self._waiting.push(request)
        return None

    def _num_waiting_beside(self, submit: Submit) -> int:
        """The length of the queue that `submit` would join. Each lane has its own, so no lane fills another's."""
        profile = PROFILES.get(submit.profile)
        return self._waiting.count(profile.lane) + self._waiting_siblings[profile.lane] if profile else 0

    def _lead(self, requests: list[Request]) -> None:
        """Queue the first request; the others wait until it has computed their common prompt."""
        first, *others = requests
        for other in others:
            if other.state is not State.SIBLING:  # they already are if the request they waited for has ended
                self._waiting_siblings[other.lane] += 1
                other.state = State.SIBLING
                other.keys = list(first.keys)
        first.siblings = others
        self._waiting.push(first)

    def finish(self, finish: Finish) -> None:
        """The frontend has all it wants of a request. Ignored if the request has already ended."""
        if request := self._requests.get(finish.uid):
            self._end(request, "stop", keep=finish.count)

    def abort(self, abort: Abort) -> None:
        """Nobody is waiting for a request any more. Ignored if it has already ended."""
        if request := self._requests.get(abort.uid):
            self._end(request, "abort")

    def forget(self, frontend: int, generation: int | None) -> None:
        """Silently end the requests of a frontend that is gone, except those of its life `generation`."""
        living = None if generation is None else life_of(frontend, generation)
        for request in list(self._requests.values()):
            if uid_frontend(request.uid) == frontend and request.uid // LIFE != living:
                self._end(request, "abort", tell=False)

    def fail(self, frontend: int, error: RequestError) -> int:
        """End the requests of a frontend with an error. Returns how many there were."""
        failed = [request for request in self._requests.values() if uid_frontend(request.uid) == frontend]
        for request in failed:
            self._end(request, "error", error=error)
        return len(failed)

    def reset(self, detail: str) -> None:
        """The workers have lost everything: end every request with an error and start over with empty caches.

        Frontends keep the arena cells they hold.
        """
        for request in list(self._requests.values()):
            self._end(request, "error", error=RequestError(detail, status=503, code="engine_restarted"))
        self._cells.reset()
        self._clear()

    def drain(self) -> list[tuple[int, Tokens]]:
        """The messages to send to frontends, as (frontend, message), in order."""
        return self._outbox.drain()

    # --------------------------------------------------------------------------------------------------------- plan

    def plan(self, now: float) -> list[Step] | None:
        """The next step, one message per rank in rank order; None if enough are in flight or no rank has work.

        A step belongs to one lane (nmoe/scheduler/turns.py).
        """
        if len(self._flights) >= self.limits.steps_in_flight:
            return None
        news = -1
        # A request that stalled, or was preempted for one that then did not fit, left room for others, possibly in
        # lanes that have already been tried.
        while news != sum(self._ranks.news):
            news = sum(self._ranks.news)
            for lane in self._turns.order():
                if self._planner.has_work(lane):
                    batch, draft = self._planner.plan(lane, now)
                    if batch.slots.size or draft.has_chunks():
                        self._turns.took(lane)
                        return self._launch(lane, batch, draft, now)
        return None

    def _launch(self, lane: Lane, batch: Batch, draft: Draft, now: float) -> list[Step]:
        steps = self._writer.write(self._next_step, lane.numerics, batch, draft)
        self._flights.append(Flight.of(self._next_step, now, batch, draft))
        self._preemption.sent(self._next_step)
        self._next_step += 1
        self._advance(batch, draft)
        return steps

    def _advance(self, batch: Batch, draft: Draft) -> None:
        ranks, table = self._ranks, self._ranks.table
        slots = batch.slots
        positions = table.position[slots] + 1
        table.position[slots] = positions
        for slot in slots[positions >= table.end[slots]].tolist():
            ranks.finish_decode(table.request(slot))
        for chunk in (chunk for chunks in draft.chunks for chunk in chunks):
            request, planned = chunk.request, chunk.first + chunk.count
            table.position[request.slot] = planned
            ranks.publish(request, planned)
            if chunk.last:
                ranks.start_decode(request)
                self._release_siblings(request)

    def _release_siblings(self, request: Request) -> None:
        """The prompt has been computed on the request's rank: queue the siblings that waited for it."""
        for sibling in request.siblings:
            if sibling.state is State.SIBLING:
                sibling.pinned = request.rank
                self._waiting_siblings[request.lane] -= 1
                self._waiting.push(sibling)
        request.siblings = []

    # ----------------------------------------------------------------------------------------------------- complete

    def complete(self, done: StepDone, now: float) -> None:
        """Take one rank's results. A step completes when all ranks have answered; steps complete in order."""
        flight = next((flight for flight in self._flights if flight.step_id == done.step_id), None)
        if flight is None:
            raise RuntimeError(f"rank {done.rank} answered step {done.step_id}, which is not in flight")
        flight.answer(done)
        while self._flights and self._flights[0].landed:
            self._land(self._flights.popleft(), now)

    def _land(self, flight: Flight, now: float) -> None:
        results = append_results(flight, self._ranks)
        for slot in results.failed:  # first, so that the results of their rows go to nobody
            request = self._ranks.table.request(slot)
            self._ranks.distrust(request)
            self._end(request, "error", error=_NOT_FINITE)
        deliver_cells(flight, self._ranks)
        for request in flight.prefilled:
            if request.state is not State.ENDED:
                self._begin_output(request, now)
        for slot, reason in results.ended:
            self._end(self._ranks.table.request(slot), reason)
        self._outbox.tokens(results.uids, results.tokens, results.counts, results.blocks)
        self._count_landed(flight, len(results.tokens), now)
        self._preemption.landed(flight.step_id)
        if not self._flights:
            self._cells.check()

    def _begin_output(self, request: Request, now: float) -> None:
        """All known tokens of the request have been computed."""
        if not request.max_tokens:
            self._end(request, "length")
            return
        self._ranks.prove(request)
        if not request.first_token_at:
            request.first_token_at = now
            self.stats.prefill_times.append(now - request.scheduled_at)

    def _end(
        self,
        request: Request,
        reason: Reason,
        *,
        keep: int | None = None,
        error: RequestError | None = None,
        tell: bool = True,
    ) -> None:
        """The only way a request ends: free everything it holds and queue its terminal entry.

        `keep` is how many of its output tokens are wanted; `error` accompanies the reason "error"; `tell` is False if
        there is nobody to tell.
        """
        ranks = self._ranks
        if request.state is State.WAITING:
            self._waiting.remove(request)
        self._waiting_siblings[request.lane] -= request.state is State.SIBLING
        if request.slot >= 0:
            if request.caches_outputs and request.pages and self.limits.enable_prefix_cache and reason != "error":
                ranks.publish_output(request, request.limit if keep is None else request.prompt_len + keep)
            ranks.stop(request)
            ranks.release(request)
            ranks.table.vacate(request)
        request.state = State.ENDED
        del self._requests[request.uid]
        self.stats.ended[reason] += 1
        if tell:
            told = (str(error), error.status, error.code or "") if error is not None else ("", 0, "")
            times = request.scheduled_at, request.first_token_at
            self._outbox.end(Ended(request.uid, reason, request.cached_tokens, told[0], *times, *told[1:]))
        if orphans := [sibling for sibling in request.siblings if sibling.state is State.SIBLING]:
            self._waiting_siblings[request.lane] -= 1
            self._lead(orphans)

    # ------------------------------------------------------------------------------------------------------ numbers

    def _count_landed(self, flight: Flight, num_tokens: int, now: float) -> None:
        self.stats.generation_tokens += num_tokens
        self.stats.step_times.append(now - flight.started_at)
        self.stats.step_tokens.append(flight.num_tokens)
        if self._flights:
            self._flights[0].started_at = now

    def take_stats(self) -> Stats:
        """The counts since the last call."""
        taken, empty = msgspec.structs.replace(self.stats), Stats()
        for name in Stats.__struct_fields__:
            setattr(self.stats, name, getattr(empty, name))
        return taken

    @property
    def oldest(self) -> Flight | None:
        """The oldest step in flight."""
        return self._flights[0] if self._flights else None

    @property
    def num_open(self) -> int:
        """Requests that have been accepted and have not ended."""
        return len(self._requests)

    @property
    def idle(self) -> bool:
        """Whether no request is open and no step in flight."""
        return not self._requests and not self._flights

    def check_idle(self) -> None:
        """Raise RuntimeError if slots are held although no request is open. Pages are checked when released."""
        table = self._ranks.table
        held = [self.limits.num_slots - table.num_free(rank) for rank in range(self.limits.world_size)]
        if any(held):
            raise RuntimeError(f"the engine is idle, and slots are held: {held} by rank")

    @property
    def num_waiting(self) -> int:
        """Requests in no batch: queued, or waiting for a sibling's prompt."""
        return len(self._waiting) + sum(self._waiting_siblings.values())

    @property
    def num_running(self) -> int:
        """Requests with rows left to launch, on all ranks."""
        return sum(self._ranks.running)

    @property
    def usage(self) -> float:
        """The fraction of all pages held by requests, 0 to 1."""
        pools = self._ranks.pools
        return 1 - sum(pool.available for pool in pools) / (len(pools) * self.limits.num_pages)
