"""The policy with simulated workers and clients around it; after every event everything that must hold is asserted."""

import dataclasses
from collections import deque

import msgspec
import numpy as np

from nmoe.messages import (
    CHANNEL_DECODE,
    ROW_HAS_IDS,
    Abort,
    Ended,
    Finish,
    Rejected,
    Sampling,
    Step,
    StepDone,
    Submit,
    make_uid,
    uid_frontend,
)
from nmoe.outputs import Returns, unpack
from nmoe.profiles import Lane
from nmoe.scheduler.cells import Cells, life_of
from nmoe.scheduler.limits import Limits
from nmoe.scheduler.request import Request, State, sibling_seed
from nmoe.scheduler.scheduler import Scheduler
from tests.simulated_worker import VOCABULARY, SimulatedWorker, digest, expected_output, record, routing


def limits(**overrides) -> Limits:
    """Small limits; num_slots and max_seq_len follow the others unless given."""
    sizes = {
        "world_size": 1,
        "num_pages": 16,
        "page_size": 4,
        "max_batch_size": 4,
        "max_prefill_tokens": 16,
        "max_queue": 64,
        "cells_per_rank": 8,
        "vocab_size": VOCABULARY,
    } | overrides
    derived = {
        "num_slots": 2 * sizes["max_batch_size"],
        "max_seq_len": sizes["num_pages"] * sizes["page_size"],
    }
    return Limits(**(derived | sizes))


@dataclasses.dataclass
class Client:
    """What one uid has seen."""

    prompt: list[int]
    max_tokens: int
    seed: int
    eos_ids: tuple[int, ...]
    returns: Returns
    tokens: list[int] = dataclasses.field(default_factory=list)
    records: list[bytes] = dataclasses.field(default_factory=list)
    routed: list[bytes] = dataclasses.field(default_factory=list)
    ended: Ended | None = None
    stopped: str = ""  # "finish" or "abort" when the client asked for it


class Engine:
    """Drives a Scheduler by hand: submit, plan, answer."""

    def __init__(self, sizes: Limits) -> None:
        self.limits = sizes
        self.cells = Cells(sizes.world_size, sizes.cells_per_rank)
        self.scheduler = Scheduler(sizes, self.cells)
        self.arena: dict[int, bytes] = {}  # outlives the workers
        self.unread: dict[int, tuple[int, bytes]] = {}  # cell at a frontend -> (frontend, what it must have)
        self.stubborn: set[int] = set()  # frontends that release nothing
        self.lives: dict[int, int] = {}  # of frontends, the first is 1
        self.forgotten = 0  # clients of frontends that died
        self.clients: dict[int, Client] = {}
        self.now = 1.0
        self.next_counter = 0
        self.planned: list[list[Step]] = []
        self.lanes: list[Lane] = []  # of the planned steps
        self.missed = dict.fromkeys(Lane, 0)  # steps of others since a lane with work had its last
        self.requests: list[Request] = []  # all that were ever accepted
        self.parents: dict[bytes, bytes | None] = {}  # of every key seen
        self.boot_workers()

    def boot_workers(self) -> None:
        """New workers with empty caches."""
        s = self.limits
        self.seeds: dict[int, int] = getattr(self, "seeds", {})
        first_step = len(self.planned)
        self.workers = [
            SimulatedWorker(rank, s.num_slots, s.page_size, s.row_tokens, self.seeds, self.arena)
            for rank in range(s.world_size)
        ]
        for worker in self.workers:
            worker.last_step = first_step
        self.unanswered: list[deque[StepDone]] = [deque() for _ in self.workers]

    # ----------------------------------------------------------------------------------------------------- events

    def submit(
        self, prompt: list[int], max_tokens: int = 4, *, n=1, frontend=0, eos_ids=(), **fields
    ) -> int | Rejected:
        """Submit; the uid of the first sibling, or the refusal."""
        life = self.lives.setdefault(frontend, 1)
        uid = make_uid(frontend, life, self.next_counter)
        self.next_counter += n
        seed = 1000 + uid
        message = Submit(
            life,
            uid,
            np.array(prompt, np.int32).tobytes(),
            max_tokens,
            Sampling(seed=seed),
            tuple(eos_ids),
            n,
            **fields,
        )
        rejected = self.scheduler.submit(message, self.now)
        if rejected is None:
            for i in range(n):
                own = sibling_seed(seed, i)
                self.seeds[own] = len(prompt) + max_tokens
                returns = message.returns if i == 0 else msgspec.structs.replace(message.returns, prompt=False)
                self.clients[uid + i] = Client(prompt, max_tokens, own, tuple(eos_ids), returns)
                self.requests.append(self.request(uid + i))
        self.after()
        return uid if rejected is None else rejected

    def abort(self, uid: int) -> None:
        """The client goes away."""
        if self.clients[uid].ended is None:
            self.clients[uid].stopped = "abort"
        self.scheduler.abort(Abort(1, uid))
        self.after()

    def finish(self, uid: int, count: int) -> None:
        """The client has seen enough."""
        if self.clients[uid].ended is None:
            self.clients[uid].stopped = "finish"
        self.scheduler.finish(Finish(1, uid, count))
        self.after()

    def break_logits(self, uid: int) -> None:
        """From the next step on the request's logits are not finite."""
        for worker in self.workers:
            worker.broken.add(self.clients[uid].seed)

    def release(self, most: int | None = None) -> None:
        """The frontends read cells and give them back, the last ones they got first."""
        willing = [cell for cell, (frontend, _) in self.unread.items() if frontend not in self.stubborn]
        for cell in willing[::-1][:most]:
            frontend, content = self.unread.pop(cell)
            assert self.arena[cell] == content, "a cell was written while a frontend had it"
            assert (
                self.cells.release(np.array([cell], np.int32).tobytes(), life_of(frontend, self.lives[frontend])) == 0
            )
        self.after()

    def die(self, frontend: int) -> None:
        """A frontend dies, and its next life is there before anything else happens."""
        self.lives[frontend] = self.lives.get(frontend, 1) + 1
        self.scheduler.forget(frontend, self.lives[frontend])
        self.cells.forget(frontend, self.lives[frontend])
        gone = [uid for uid in self.clients if uid_frontend(uid) == frontend]
        self.forgotten += len(gone)
        for uid in gone:
            del self.clients[uid]
        self.unread = {cell: (owner, content) for cell, (owner, content) in self.unread.items() if owner != frontend}
        self.after()

    def plan(self) -> list[Step] | None:
        """Plan and send one step; the workers run it at once, their answers wait for `answer`."""
        self.now += 1.0
        before = {uid: request.state for uid, request in self.scheduler._requests.items()}
        known_before = {uid: request.known_len for uid, request in self.scheduler._requests.items()}
        steps = self.scheduler.plan(self.now)
        if steps is not None:
            self.check_steps(steps, before, known_before)
            self.planned.append(steps)
            for worker, answers, step in zip(self.workers, self.unanswered, steps, strict=True):
                answers.append(worker.apply(step))
        self.after()
        return steps

    def answer(self, rank: int) -> bool:
        """Deliver the oldest result of `rank`, if there is one."""
        if not self.unanswered[rank]:
            return False
        self.now += 1.0
        self.scheduler.complete(self.unanswered[rank].popleft(), self.now)
        self.after()
        return True

    def answer_all(self) -> None:
        """Deliver all results."""
        for rank in range(len(self.workers)):
            while self.answer(rank):
                pass

    def reset(self) -> None:
        """The workers die and come back."""
        self.scheduler.reset("the workers restarted")
        self.boot_workers()
        self.after()

    def run(self, most: int = 20_000) -> None:
        """Plan and answer, two steps in flight, until nothing is left to do.

        While some frontends release nothing, only requests that need cells may be left; then they do.
        """
        if self.stubborn:
            self._run(most)
            assert all(client.ended or client.returns.logits for client in self.clients.values()), (
                "a bystander is stuck"
            )
            self.stubborn.clear()
        self._run(most)
        assert self.scheduler.idle, "work is left but nothing is planned"
        self.scheduler.check_idle()
        assert all(client.ended for client in self.clients.values())

    def _run(self, most: int) -> None:
        for _ in range(most):
            self.release()
            if self.plan() is None and not any(self.unanswered):
                break
            if all(len(answers) == self.limits.steps_in_flight for answers in self.unanswered) or self.starved():
                for rank in range(len(self.workers)):
                    self.answer(rank)

    def starved(self) -> bool:
        """Whether nothing more can be planned without results."""
        steps = self.plan()
        return steps is None

    def request(self, uid: int) -> Request:
        """The scheduler's view of a live request."""
        return self.scheduler._requests[uid]

    # ----------------------------------------------------------------------------------------------------- checks

    def after(self) -> None:
        """Deliver to the clients, then check what must hold at all times."""
        for frontend, message in self.scheduler.drain():
            uids = np.frombuffer(message.uids, np.int64).tolist()
            tokens = np.frombuffer(message.tokens, np.int32).tolist()
            counts = [1] * len(uids) if message.counts is None else np.frombuffer(message.counts, np.int32).tolist()
            sizes = np.frombuffer(message.block_sizes or bytes(4 * len(uids)), np.int32).tolist()
            assert sum(counts) == len(tokens)
            assert sum(sizes) == len(message.blocks)
            at = 0
            for uid, count, size in zip(uids, counts, sizes, strict=True):
                assert count > 0 or size > 0, "a row of nothing"
                self.take_block(frontend, self.clients[uid], memoryview(message.blocks)[at : at + size])
                at += size
                assert uid_frontend(uid) == frontend
                assert self.clients[uid].ended is None, "tokens after the end"
                self.clients[uid].tokens += tokens[:count]
                tokens = tokens[count:]
            for ended in message.ended:
                assert uid_frontend(ended.uid) == frontend
                self.check_end(self.clients[ended.uid], ended)
        self.check_pages()
        self.check_cells()
        open_uids = {uid for uid, client in self.clients.items() if client.ended is None}
        assert open_uids == self.scheduler._requests.keys()

    def take_block(self, frontend: int, client: Client, data: memoryview) -> None:
        """Read what one row returned."""
        if not data:
            return
        assert client.returns
        block, size = unpack(data, client.returns), client.returns.record_bytes
        assert len(block.cells) == (len(block.records) // size if client.returns.logits else 0)
        for i, cell in enumerate(block.cells):
            assert cell not in self.unread, "a cell has two readers"
            self.unread[cell] = frontend, bytes(block.records[i * size : (i + 1) * size])
            assert self.arena[cell] == self.unread[cell][1], "a cell was written before it was read"
        client.records += [bytes(block.records[at : at + size]) for at in range(0, len(block.records), size)]
        client.routed += [bytes(block.routing[at : at + 8]) for at in range(0, len(block.routing), 8)]

    def check_blocks(self, client: Client) -> None:
        """Every computed position came back once, in order, as far as tokens did."""
        records, routed, history = [], [], 0
        ids = client.prompt + client.tokens
        # The last sampled token is not computed on; without one the whole prompt is, if it ended by itself.
        for position, token in enumerate(ids):
            history = digest(history, token)
            if position < len(ids) - bool(client.tokens):
                routed.append(routing(position, history))
            if position + 1 < len(ids) and (client.returns.prompt or position + 1 >= len(client.prompt)):
                records.append(record(position, ids[position + 1], history, client.returns))
        records = records if client.returns.records else []
        routed = routed if client.returns.routing else []
        whole = client.tokens or client.ended.reason == "length"
        for given, expected in ((client.records, records), (client.routed, routed)):
            assert given == (expected if whole else expected[: len(given)])

    def check_end(self, client: Client, ended: Ended) -> None:
        """One terminal entry, and the right tokens before it."""
        assert client.ended is None, "two terminal entries"
        client.ended = ended
        expected = expected_output(client.prompt, client.seed, client.max_tokens, client.eos_ids)
        assert client.tokens == expected[: len(client.tokens)]
        if self.limits.row_tokens == 1:
            self.check_blocks(client)
        if client.stopped:
            assert ended.reason == {"abort": "abort", "finish": "stop"}[client.stopped]
        elif ended.reason != "error":
            assert client.tokens == expected
            assert ended.reason == ("stop" if expected and expected[-1] in client.eos_ids else "length")

    def check_pages(self) -> None:
        """Conservation, counted from the requests' side; private pages in one place; no tree node without parent."""
        scheduler = self.scheduler
        for request in self.requests:
            self.parents.update(zip(request.keys, [None, *request.keys], strict=False))
        for rank, pool in enumerate(scheduler._ranks.pools):
            users = [request for request in scheduler._requests.values() if request.rank == rank]
            pool.check(idle=not any(request.pages for request in users))
            held: dict[int, int] = {}
            for request in users:
                assert len(set(request.pages)) == len(request.pages)
                for page in request.pages:
                    held[page] = held.get(page, 0) + 1
            assert all(pool.tree.holds[page] for page, count in held.items() if count > 1), "shared outside the tree"
            free, cached = set(pool._free), {*pool._cached, *pool._cached_last}
            assert len(free) + pool.num_cached + len(held) == self.limits.num_pages
            assert free | cached | held.keys() == set(range(self.limits.num_pages))
            assert all(self.parents[key] in (None, *pool.tree._pages) for key in pool.tree._pages), (
                "an orphan in the tree"
            )
            lasting = {key for key, page in pool.tree._pages.items() if pool._lasting[page]}
            assert all(self.parents[key] in (None, *lasting) for key in lasting), "a lasting page below another"
            assert sum(pool._lasting) == len(lasting)
            assert {page for page in cached if pool._lasting[page]} == pool._cached_last.keys()
            assert not any(
                entry.broken for (page, _), entry in self.workers[rank].cache.items() if pool.tree.proven[page]
            ), "a proven page is not finite"
            assert all(map(int.__le__, pool.tree.proven, pool.tree.holds)), "a proven page outside the tree"
            running = [request for request in users if request.state in (State.PREFILL, State.DECODE)]
            assert scheduler._ranks.running[rank] == len(running) <= self.limits.max_batch_size
        assert scheduler.num_waiting == sum(
            request.state in (State.WAITING, State.SIBLING) for request in scheduler._requests.values()
        )

    def check_cells(self) -> None:
        """Conservation, counted from the frontends' side and from the steps in flight."""
        flights = self.scheduler._flights
        flying = [cell for flight in flights if flight.cargo for cell in flight.cargo.cells.tolist()]
        free = [cell for mine in self.cells._free for cell in mine]
        everywhere = [*free, *flying, *self.unread]
        assert sorted(everywhere) == list(range(self.limits.world_size * self.limits.cells_per_rank))
        per_rank = self.limits.cells_per_rank
        assert all(cell // per_rank == rank for rank, mine in enumerate(self.cells._free) for cell in mine)

    def check_steps(self, steps: list[Step], before: dict[int, State], known_before: dict[int, int]) -> None:
        """All ranks alike; the budget; nobody who streams is left out; nobody is overtaken."""
        s, scheduler = self.limits, self.scheduler
        assert len(steps) == s.world_size
        head = steps[0]
        for step in steps:
            same = (step.step_id, step.numerics, step.channel, step.num_tokens)
            assert same == (head.step_id, head.numerics, head.channel, head.num_tokens)
        rows = [worker.rows_of(step) for worker, step in zip(self.workers, steps, strict=True)]
        chunks = [sum(row[2] for row in mine if row[3] & ROW_HAS_IDS) for mine in rows]
        assert head.num_tokens == max(sum(row[2] for row in mine) for mine in rows) > 0
        assert (head.channel == CHANNEL_DECODE) == (not any(chunks))
        assert all(len(mine) <= s.max_batch_size for mine in rows)
        streams = [
            request
            for request in scheduler._requests.values()
            if before[request.uid] is State.DECODE and request.state in (State.DECODE, State.LAUNCHED)
            if request.known_len == known_before[request.uid]  # else preempted and admitted elsewhere in the same step
            if not request.stalled
        ]
        lane = scheduler._turns._last
        assert head.numerics == lane.numerics
        protected = lane is not Lane.BULK and any(request.lane is not Lane.BULK for request in streams)
        assert max(chunks) <= s.chunk(decoding=protected)
        left_out = lane is Lane.BULK and any(chunks)
        for request in streams:
            if request.lane is lane and not left_out:
                assert request.slot % s.num_slots in [row[0] for row in rows[request.rank] if row[2] == 1]
        busy = [
            request
            for request in scheduler._requests.values()
            if before[request.uid] in (State.PREFILL, State.DECODE) and not request.stalled
            if request.state in (State.PREFILL, State.DECODE, State.LAUNCHED)
        ]
        self.check_turns(lane, {request.lane for request in busy})
        self.check_order(lane, before)

    def check_turns(self, lane: Lane, busy: set[Lane]) -> None:
        """Every second step is PRODUCTION's while it has work; no other lane with work waits for long."""
        if Lane.PRODUCTION in busy and self.lanes and self.lanes[-1] is not Lane.PRODUCTION:
            assert lane is Lane.PRODUCTION
        self.lanes.append(lane)
        for other in Lane:
            self.missed[other] = self.missed[other] + 1 if other in busy and other is not lane else 0
            assert self.missed[other] <= 2 * (len(Lane) - 1) - 1, f"{other} starves"

    def check_order(self, lane: Lane, before: dict[int, State]) -> None:
        """Whoever was admitted comes before everybody of its lane who still waits.

        But for those pinned to a rank, and those whose logits may have found no cell.
        """
        mine = [request for request in self.scheduler._requests.values() if request.lane is lane]
        admitted = [
            request
            for request in mine
            if before[request.uid] is State.WAITING and request.state not in (State.WAITING, State.SIBLING)
        ]
        waiting = [
            request
            for request in mine
            if before[request.uid] is State.WAITING and request.state is State.WAITING and request.pinned is None
        ]
        for request in admitted:
            rivals = [other for other in waiting if request.returns.logits or not other.returns.logits]
            assert all(request.order < other.order for other in rivals), "overtaken in the queue"
