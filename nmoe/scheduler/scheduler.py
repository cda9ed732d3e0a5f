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

import math
from collections import deque

import msgspec
import numpy as np

from nmoe.messages import Abort, Ended, Finish, Reason, Rejected, Step, StepDone, Submit, Tokens, make_uid, uid_frontend
from nmoe.profiles import Numerics
from nmoe.scheduler.admission import Admission
from nmoe.scheduler.draft import Chunk, Draft, StepWriter
from nmoe.scheduler.flight import Flight
from nmoe.scheduler.landing import append_results
from nmoe.scheduler.limits import Limits
from nmoe.scheduler.outbox import Outbox
from nmoe.scheduler.prefix import extend_keys
from nmoe.scheduler.ranks import Ranks
from nmoe.scheduler.request import Request, State, siblings
from nmoe.scheduler.stats import Stats

_LIFE = make_uid(0, 1, 0)  # the uids of one life of a frontend are a range of this length


class Scheduler:
    """All requests of all frontends, and what every rank does next.

    `submit`, `finish`, `abort`, `complete` are the events; `plan` and `drain` return what to send. The same calls in
    the same order give the same messages.
    """

    def __init__(self, limits: Limits, generation: int = 1) -> None:
        self.limits = limits
        self.stats = Stats()
        self._generation = generation
        self._outbox = Outbox(generation)
        self._arrivals = 0
        self._next_step = 1
        self._requests: dict[int, Request] = {}
        self._clear()

    def _clear(self) -> None:
        self._ranks = Ranks(self.limits, self.stats)
        self._admission = Admission(self.limits, self._ranks)
        self._writer = StepWriter(self._generation, self._ranks.table)
        self._flights: deque[Flight] = deque()
        self._draining: list[tuple[int, Request]] = []  # (last step with a row of it, request)
        self._waiting_siblings = 0
        self._turn = Numerics.EXACT  # the class of the last step

    # ------------------------------------------------------------------------------------------------------- events

    def submit(self, submit: Submit, now: float) -> Rejected | None:
        """Accept a request and its siblings, or say why not."""
        limits = self.limits
        rejected = limits.refusal(submit, self._requests, self.num_waiting, self._generation)
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
                self._admission.push(request)
        return None

    def _lead(self, requests: list[Request]) -> None:
        """Queue the first; the others wait until it has computed the prompt that they share."""
        first, *others = requests
        for other in others:
            self._waiting_siblings += other.state is not State.SIBLING
            other.state = State.SIBLING
            other.keys = list(first.keys)
        first.siblings = others
        self._admission.push(first)

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
        living = None if generation is None else make_uid(frontend, generation, 0) // _LIFE
        for request in list(self._requests.values()):
            if uid_frontend(request.uid) == frontend and request.uid // _LIFE != living:
                self._end(request, "abort", tell=False)

    def reset(self, detail: str) -> None:
        """The workers have lost everything: end every request with an error, and begin anew with empty caches."""
        for request in list(self._requests.values()):
            self._end(request, "error", detail=detail)
        self._clear()

    def drain(self) -> list[tuple[int, Tokens]]:
        """What is to be sent to the frontends, as (frontend, message), in order."""
        return self._outbox.drain()

    # --------------------------------------------------------------------------------------------------------- plan

    def plan(self, now: float) -> list[Step] | None:
        """The next step, one message per rank in rank order; None if enough are in flight or no rank has work.

        The numerics classes take turns when both have work.
        """
        if len(self._flights) >= self.limits.steps_in_flight:
            return None
        for numerics in sorted(Numerics, key=lambda numerics: numerics is self._turn):
            batch = self._ranks.batches[numerics]
            draft = Draft(self.limits)
            self._extend(numerics, draft)
            self._prefill(numerics, draft, now)
            if batch.slots.size or draft.has_chunks():
                self._turn = numerics
                return self._launch(numerics, draft, now)
        return None

    def _extend(self, numerics: Numerics, draft: Draft) -> None:
        """Make sure that every running row has the pages for its next token."""
        ranks, table = self._ranks, self._ranks.table
        slots = ranks.batches[numerics].slots
        last = np.minimum(table.position[slots] + self.limits.lookahead, table.end[slots] - 1)
        short = last >= table.capacity[slots]
        if not np.count_nonzero(short):
            return
        slots = slots[short]
        counts = (last[short] + 1 - table.capacity[slots] + self.limits.page_size - 1) // self.limits.page_size
        demand = np.bincount(slots // self.limits.num_slots, counts, self.limits.world_size).astype(int).tolist()
        needs = [(table.request(slot), count) for slot, count in zip(slots.tolist(), counts.tolist(), strict=True)]
        if all(need <= pool.available for need, pool in zip(demand, ranks.pools, strict=True)):
            ranks.grow_all(needs, demand, draft)
        else:
            self._grow_by_age(needs, draft)

    def _grow_by_age(self, needs: list[tuple[Request, int]], draft: Draft) -> None:
        """Oldest first: whoever is preempted is younger than who needs the page, so it was given none in this step."""
        ranks = self._ranks
        for request, count in sorted(needs, key=lambda need: need[0].order):
            while request.state is State.DECODE and ranks.pools[request.rank].available < count:
                self._preempt(ranks.youngest(request.rank))
            if request.state is State.DECODE:
                ranks.grow(request, ranks.pools[request.rank].take(count), draft)

    def _preempt(self, request: Request) -> None:
        """Take a request's pages; it requeues at its old place when its rows in flight have returned."""
        self._ranks.stop(request)
        self._ranks.release(request)
        self._ranks.table.position[request.slot] = self._ranks.table.end[request.slot]
        request.state = State.DRAINING
        self.stats.preemptions += 1
        if self._flights:
            self._draining.append((self._flights[-1].step_id, request))
        else:
            self._requeue(request)

    def _requeue(self, request: Request) -> None:
        self._ranks.table.vacate(request)
        request.known = request.prompt + request.output
        request.pinned = None
        self._admission.push(request)

    def _prefill(self, numerics: Numerics, draft: Draft, now: float) -> None:
        """Fill the budget with chunks; a waiting request goes before those begun that come after it in the order."""
        draft.set_budget(self.limits.chunk(any(batch.slots.size for batch in self._ranks.batches.values())))
        for request in sorted(self._ranks.prefills[numerics], key=lambda request: request.order):
            self._admit(numerics, draft, request.order, now)
            self._chunk(request, draft)
        self._admit(numerics, draft, (math.inf, 0), now)

    def _admit(self, numerics: Numerics, draft: Draft, before: tuple[float, float], now: float) -> None:
        for request in self._admission.admit(numerics, draft, before):
            if not request.scheduled_at:
                request.scheduled_at = now
                request.cached_tokens = int(self._ranks.table.position[request.slot])
                self._count_admitted(request)
            self._chunk(request, draft)

    def _chunk(self, request: Request, draft: Draft) -> None:
        first = int(self._ranks.table.position[request.slot])
        count = min(draft.left[request.rank], request.known_len - first)
        if count:
            draft.left[request.rank] -= count
            draft.chunks[request.rank].append(Chunk(request, first, count, first + count == request.known_len))

    def _launch(self, numerics: Numerics, draft: Draft, now: float) -> list[Step]:
        batch = self._ranks.batches[numerics]
        steps = self._writer.write(self._next_step, numerics, batch, draft)
        self._flights.append(Flight.of(self._next_step, now, batch, draft))
        self._next_step += 1
        self._advance(numerics, draft)
        return steps

    def _advance(self, numerics: Numerics, draft: Draft) -> None:
        ranks, table = self._ranks, self._ranks.table
        slots = ranks.batches[numerics].slots
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
                self._release_siblings(request, request.rank)

    def _release_siblings(self, request: Request, rank: int) -> None:
        """The prompt is computed on `rank`: those that waited for it may follow."""
        for sibling in request.siblings:
            if sibling.state is State.SIBLING:
                sibling.pinned = rank
                self._waiting_siblings -= 1
                self._admission.push(sibling)
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
        for request in flight.prefilled:
            if request.state is not State.ENDED and not request.first_token_at:
                request.first_token_at = now
                self.stats.prefill_times.append(now - request.scheduled_at)
        results = append_results(flight, self._ranks)
        for slot, reason in results.ended:
            self._end(self._ranks.table.request(slot), reason)
        self._outbox.tokens(results.uids, results.tokens, results.counts)
        self._count_landed(flight, len(results.tokens), now)
        drained = [request for step, request in self._draining if step <= flight.step_id]
        self._draining = [(step, request) for step, request in self._draining if step > flight.step_id]
        for request in drained:
            if request.state is State.DRAINING:
                self._requeue(request)

    def _end(
        self,
        request: Request,
        reason: Reason,
        *,
        keep: int | None = None,
        detail: str = "",
        tell: bool = True,
    ) -> None:
        """The only end of a request: everything it has is free, its terminal entry is on its way.

        `keep` is how many of its output tokens are wanted; `tell` is false if there is nobody to be told.
        """
        ranks = self._ranks
        if request.state is State.WAITING:
            self._admission.remove(request)
        self._waiting_siblings -= request.state is State.SIBLING
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
            times = request.scheduled_at, request.first_token_at
            self._outbox.end(Ended(request.uid, reason, request.cached_tokens, detail, *times))
        if orphans := [sibling for sibling in request.siblings if sibling.state is State.SIBLING]:
            self._waiting_siblings -= 1
            self._lead(orphans)

    # ------------------------------------------------------------------------------------------------------ numbers

    def _count_admitted(self, request: Request) -> None:
        self.stats.prompt_tokens += request.prompt_len
        self.stats.prefix_queries += request.prompt_len * self.limits.enable_prefix_cache
        self.stats.prefix_hits += request.cached_tokens
        self.stats.queue_times.append(request.scheduled_at - request.arrived_at)

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

    @property
    def num_waiting(self) -> int:
        """Requests that are in no batch: queued, or waiting for a sibling's prompt."""
        return len(self._admission) + self._waiting_siblings

    @property
    def num_running(self) -> int:
        """Requests with rows still to be launched, all ranks."""
        return sum(self._ranks.running)

    @property
    def usage(self) -> float:
        """The share of all pages that requests hold, 0 to 1."""
        pools = self._ranks.pools
        return 1 - sum(pool.available for pool in pools) / (len(pools) * self.limits.num_pages)
