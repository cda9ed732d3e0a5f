"""The policy: which tokens of which requests each rank computes in the next step.

No socket, no clock, no torch; the time is passed in. There is no prefill or decode phase: a request has tokens to
compute and tokens computed. A step is planned in four moves:

    extend   every running row goes on by one token; rows at the end of their pages get one, maybe the youngest's
    prefill  chunks in (priority, arrival) order: of requests that have begun, and of those admitted within the budget
    write    one Step message per rank
    advance  rows planned to their end leave the batch, computed prompts join it and the prefix tree

What holds at all times:
- A page gets a new owner only in a step later than its last writer's. Pages are freed by results, aborts and
  preemptions, all of which come after the last step that writes them was sent; a preempted row is not in the step
  being planned.
- Steps run on the device in order, so a page that a step writes may be read by the next one: prompt pages enter the
  tree when the step that computes them has been planned.
- Every accepted uid gets one terminal entry: `_end` is the only way out of `_requests`.
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

    `submit`, `finish`, `abort`, `complete` are the events; `plan` and `drain` return what to send. The same calls in
    the same order give the same messages. `cells` outlives it, since frontends do: what they give back goes there.
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
        """Accept a request and its siblings, or say why not."""
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
        """The length of the queue that `submit` would join: each lane has its own, so that none fills another's."""
        profile = PROFILES.get(submit.profile)
        return self._waiting.count(profile.lane) + self._waiting_siblings[profile.lane] if profile else 0

    def _lead(self, requests: list[Request]) -> None:
        """Queue the first; the others wait until it has computed the prompt that they share."""
        first, *others = requests
        for other in others:
            if other.state is not State.SIBLING:  # they are when the one that they waited for has ended
                self._waiting_siblings[other.lane] += 1
                other.state = State.SIBLING
                other.keys = list(first.keys)
        first.siblings = others
        self._waiting.push(first)

    def finish(self, finish: Finish) -> None:
        """The frontend has all it wants of a request. Ignored when the request has ended meanwhile."""
        if request := self._requests.get(finish.uid):
            self._end(request, "stop", keep=finish.count)

    def abort(self, abort: Abort) -> None:
        """Nobody waits for a request any more. Ignored when it has ended meanwhile."""
        if request := self._requests.get(abort.uid):
            self._end(request, "abort")

    def forget(self, frontend: int, generation: int | None) -> None:
        """End, without a word, the requests of a frontend that is gone, but for those of its life `generation`."""
        living = None if generation is None else life_of(frontend, generation)
        for request in list(self._requests.values()):
            if uid_frontend(request.uid) == frontend and request.uid // LIFE != living:
                self._end(request, "abort", tell=False)

    def fail(self, frontend: int, error: RequestError) -> int:
        """End the requests of a frontend with an error; how many there were."""
        failed = [request for request in self._requests.values() if uid_frontend(request.uid) == frontend]
        for request in failed:
            self._end(request, "error", error=error)
        return len(failed)

    def reset(self, detail: str) -> None:
        """The workers have lost everything: end every request with an error, and begin anew with empty caches.

        What frontends have of the arena is still theirs.
        """
        for request in list(self._requests.values()):
            self._end(request, "error", error=RequestError(detail, status=503, code="engine_restarted"))
        self._cells.reset()
        self._clear()

    def drain(self) -> list[tuple[int, Tokens]]:
        """What is to be sent to the frontends, as (frontend, message), in order."""
        return self._outbox.drain()

    # --------------------------------------------------------------------------------------------------------- plan

    def plan(self, now: float) -> list[Step] | None:
        """The next step, one message per rank in rank order; None if enough are in flight or no rank has work.

        It is one lane's (nmoe/scheduler/turns.py).
        """
        if len(self._flights) >= self.limits.steps_in_flight:
            return None
        news = -1
        # Whoever came to a standstill, or was preempted for somebody who then did not fit, made room for others, who
        # may have had their chance before.
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
        """The prompt is computed on the request's rank: those that waited for it may follow."""
        for sibling in request.siblings:
            if sibling.state is State.SIBLING:
                sibling.pinned = request.rank
                self._waiting_siblings[request.lane] -= 1
                self._waiting.push(sibling)
        request.siblings = []

    # ----------------------------------------------------------------------------------------------------- complete

    def complete(self, done: StepDone, now: float) -> None:
        """Take one rank's results. A step counts as complete when all ranks have answered, in the order of steps."""
        flight = next((flight for flight in self._flights if flight.step_id == done.step_id), None)
        if flight is None:
            raise RuntimeError(f"rank {done.rank} answered step {done.step_id}, which is not in flight")
        flight.answer(done)
        while self._flights and self._flights[0].landed:
            self._land(self._flights.popleft(), now)

    def _land(self, flight: Flight, now: float) -> None:
        results = append_results(flight, self._ranks)
        for slot in results.failed:  # first: what their rows brought goes to nobody
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
        """Its known tokens have been computed."""
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
        """The only end of a request: everything it has is free, its terminal entry is on its way.

        `keep` is how many of its output tokens are wanted; `error` is what to tell for the reason of that name; `tell`
        is false if there is nobody to be told.
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
        """What was counted since the last call."""
        taken, empty = msgspec.structs.replace(self.stats), Stats()
        for name in Stats.__struct_fields__:
            setattr(self.stats, name, getattr(empty, name))
        return taken

    @property
    def oldest(self) -> Flight | None:
        """The first of the steps in flight."""
        return self._flights[0] if self._flights else None

    @property
    def num_open(self) -> int:
        """Requests that were accepted and have not ended."""
        return len(self._requests)

    @property
    def idle(self) -> bool:
        """Whether no request is open and no step in flight."""
        return not self._requests and not self._flights

    def check_idle(self) -> None:
        """Raises RuntimeError when slots are held though no request is open. Pages are checked as they are released."""
        table = self._ranks.table
        held = [self.limits.num_slots - table.num_free(rank) for rank in range(self.limits.world_size)]
        if any(held):
            raise RuntimeError(f"the engine is idle, and slots are held: {held} by rank")

    @property
    def num_waiting(self) -> int:
        """Requests that are in no batch: queued, or waiting for a sibling's prompt."""
        return len(self._waiting) + sum(self._waiting_siblings.values())

    @property
    def num_running(self) -> int:
        """Requests with rows still to be launched, all ranks."""
        return sum(self._ranks.running)

    @property
    def usage(self) -> float:
        """The share of all pages that requests hold, 0 to 1."""
        pools = self._ranks.pools
        return 1 - sum(pool.available for pool in pools) / (len(pools) * self.limits.num_pages)
