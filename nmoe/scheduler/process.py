"""The scheduler process: sockets, clock and metrics around the policy.

One thread, one loop: take what has arrived, plan while fewer than `steps_in_flight` steps are out, send steps first and
tokens after them, and sleep in poll when there is nothing to do. That poll is the only place it waits.

    not serving --every worker has said Ready--> serving --a worker is gone--> not serving

While not serving there is no policy, and requests are rejected with 503. A worker's death takes all workers down (the
launcher restarts them as a group), so messages from workers are ignored until their next life. A frontend's death, or
the first message of its next life, ends the requests of its previous life. A worker that is out of reach has nearly
always died. If the launcher does not say so soon, it lives and only its link is lost: then this process ends, because
workers connect anew to the scheduler's next life.
"""

import gc
import logging
import math
import time
from typing import Any

import msgspec
import zmq

from nmoe import ipc
from nmoe.arena import ArenaLayout
from nmoe.config_json import read_architecture
from nmoe.messages import (
    Abort,
    Finish,
    FrontendToScheduler,
    Hello,
    Ready,
    Rejected,
    Release,
    Serving,
    Submit,
    WorkerToScheduler,
)
from nmoe.metrics import row_index
from nmoe.outputs import RoutingLayout
from nmoe.scheduler.cells import Cells, life_of
from nmoe.scheduler.limits import Limits
from nmoe.scheduler.post import UNREAD, Post
from nmoe.scheduler.report import Report
from nmoe.scheduler.scheduler import Scheduler

_log = logging.getLogger("nmoe.scheduler")
_HEARTBEAT_S = 1.0
_OUT_OF_REACH_S = 5.0  # by then the launcher has reported a worker's death
_REPORT_S = 0.05  # between reports of the policy's counters while it has work
_BURST = 64  # requests taken at once, so that a flood of them does not delay results
_NOWAIT = int(zmq.NOBLOCK)  # a plain int, because converting zmq's enum takes longer than the receive itself


def main(boot: ipc.Boot) -> None:
    """Schedule until the launcher hangs up. Raises CheckpointError when the model's config.json cannot be read."""
    with zmq.Context() as context:
        process = Process(boot, context)
        # The hot path creates no reference cycles, but it allocates enough objects to trigger the collector, and one
        # pass takes longer than planning a step. So it runs only when the engine is idle.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            boot.control.send(ipc.Up())
            process.run()
        finally:
            gc.enable()
            process.close()


class Process:
    """The loop, and its peers: launcher, workers and frontends."""

    def __init__(self, boot: ipc.Boot, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        config = boot.config
        self._boot = boot
        architecture = read_architecture(config.model.path)
        self._max_seq_len = config.model.max_seq_len or architecture.max_position_embeddings
        self._arena = ArenaLayout.of(architecture, config.parallel.world_size)
        self._routing = RoutingLayout.of(architecture)
        self._cells = Cells(config.parallel.world_size, self._arena.cells_per_rank)
        self._policy: Scheduler | None = None  # only while serving
        self._report = Report(boot.board.rows[row_index("scheduler", 0, config.parallel.world_size)])
        self._beat_at = 0.0
        self._report_at = 0.0
        self._frontends: dict[int, int] = {}  # index -> newest generation seen
        self._greeted: set[int] = set()  # frontends to tell when the engine serves
        self._ready: dict[int, int] = {}  # rank -> its num_pages
        self._workers = 0  # newest generation seen
        self._dead_workers = 0  # newest generation known to have died
        self._death_due = math.inf  # when the launcher must have reported the death of a worker that is out of reach
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode_frontend = msgspec.msgpack.Decoder(FrontendToScheduler).decode
        self._decode_worker = msgspec.msgpack.Decoder(WorkerToScheduler).decode
        self._frontend_link = ipc.bind_router(context, ipc.frontend_address(boot.run_dir))
        self._worker_link = ipc.bind_router(context, ipc.worker_address(boot.run_dir))
        self._post = Post(self._frontend_link, self._cells, self._miss_frontend)
        self._poller = zmq.Poller()
        self._launcher = boot.control.fileno()
        for source in (self._frontend_link, self._worker_link, self._launcher):
            self._poller.register(source, zmq.POLLIN)

    def run(self) -> None:
        """Run until the launcher hangs up."""
        while (ready := self._rest()) is not None:
            if self._worker_link in ready:
                self._take_results()
            if self._frontend_link in ready:
                self._take_requests()
            self._plan()
            self._deliver()
            self._beat()

    def close(self) -> None:
        """Write the final numbers to the board; drop the links and whatever is still queued on them."""
        if self._policy:
            self._report.update(self._policy)
        self._frontend_link.close()
        self._worker_link.close()

    def _heed_launcher(self) -> bool:
        """Handle one message from the launcher. Returns False if it has hung up."""
        try:
            message = self._boot.control.receive()
        except EOFError:
            return False
        if isinstance(message, ipc.Gone):
            if message.role == "worker" and message.generation >= self._workers:
                self._workers = message.generation
                self._lose_workers(f"worker {message.index} died")
            elif message.role == "frontend" and message.generation >= self._frontends.get(message.index, 0):
                self._lose_frontend(message.index)
                self._cells.forget(message.index, None)
        return True

    def _beat(self) -> None:
        """Publish the heartbeat, if it is due. Raises RuntimeError if the link to a live worker is lost."""
        now = time.monotonic()
        if now >= self._beat_at:
            if now > self._death_due:
                raise RuntimeError("the link to a worker is lost, and the worker has not died")
            self._report.beat(now)
            self._beat_at = now + _HEARTBEAT_S
            if self._policy:
                self._report.update(self._policy)
            if self._policy is None or self._policy.idle:
                gc.collect()
            if self._policy and self._policy.idle:
                self._policy.check_idle()

    def _rest(self) -> list[Any] | None:
        """Sleep until something arrives or the heartbeat is due. Returns the links with messages, or None if the
        launcher has hung up.

        Returns at once if messages are still pending.
        """
        now = time.monotonic()
        if self._policy and (self._policy.idle or now >= self._report_at):
            self._report_at = now + _REPORT_S
            self._report.update(self._policy)
        ready = [source for source, _ in self._poller.poll(max(1, int((self._beat_at - now) * 1000)))]
        return None if self._launcher in ready and not self._heed_launcher() else ready

    # ------------------------------------------------------------------------------------------------------ workers

    def _take_results(self) -> None:
        while (data := _receive(self._worker_link)) is not None:
            message = self._decode_worker(data[1])
            if message.generation <= self._dead_workers or message.generation < self._workers:
                _log.info("dropped what life %d of worker %d sent", message.generation, message.rank)
            elif isinstance(message, Ready):
                self._welcome(message)
            elif self._policy:
                self._policy.complete(message, time.monotonic())

    def _welcome(self, ready: Ready) -> None:
        """A worker has loaded. Start serving when the last one has."""
        if ready.generation > self._workers:
            self._lose_workers("the workers were restarted")
            self._workers = ready.generation
        self._ready[ready.rank] = ready.num_pages
        if self._policy is None and len(self._ready) == self._boot.config.parallel.world_size:
            num_pages = min(self._ready.values())
            limits = Limits.of(self._boot.config, num_pages, self._max_seq_len, self._arena, self._routing)
            self._policy = Scheduler(limits, self._cells, self._boot.generation)
            _log.info("serving with %d pages of %d tokens per rank", limits.num_pages, limits.page_size)
            for frontend in sorted(self._greeted):
                self._post.send(frontend, Serving(self._boot.generation, limits.max_seq_len, self._workers))

    def _lose_workers(self, why: str) -> None:
        """All workers are gone, along with the cache and every step in flight: stop serving until their next life."""
        self._dead_workers = self._workers
        self._death_due = math.inf
        self._ready.clear()
        if policy := self._policy:
            _log.error("%s: %d open requests end with an error", why, policy.num_open)
            policy.reset(f"{why} while the request ran")
            self._deliver()
            self._report.update(policy)
            self._policy = None

    def _plan(self) -> None:
        while self._policy and (steps := self._policy.plan(time.monotonic())):
            for rank, step in enumerate(steps):
                if ipc.route(self._worker_link, rank, self._encode(step)) != "sent":
                    self._lose_workers(f"worker {rank} is out of reach")
                    self._death_due = time.monotonic() + _OUT_OF_REACH_S
                    break
        self._report.set_deadline(self._policy)

    # ---------------------------------------------------------------------------------------------------- frontends

    def _take_requests(self) -> None:
        for _ in range(_BURST):
            data = _receive(self._frontend_link)
            if data is None:
                return
            frontend, message = int(data[0]), self._decode_frontend(data[1])
            newest = self._frontends.get(frontend, 0)
            if message.generation < newest:
                _log.info("dropped what life %d of frontend %d sent", message.generation, frontend)
                continue
            if message.generation > newest:
                self._frontends[frontend] = message.generation
                self._post.forget(frontend)
                if self._policy:
                    self._policy.forget(frontend, message.generation)
                self._cells.forget(frontend, message.generation)
            self._handle(frontend, message)

    def _handle(self, frontend: int, message: FrontendToScheduler) -> None:
        policy = self._policy
        match message:
            case Hello():
                self._greeted.add(frontend)
                self._post.forget(frontend)
                if policy:
                    policy.forget(frontend, None)  # it has given up on its earlier requests
                    serving = Serving(self._boot.generation, policy.limits.max_seq_len, self._workers)
                    self._post.send(frontend, serving)
            case Submit():
                rejected = self._submit(message)
                if rejected and rejected.status == 429:
                    self._plan()  # planning may admit queued requests and so make room
                    rejected = self._submit(message)
                if rejected:
                    self._post.send(frontend, rejected)
            case Finish():
                if policy:
                    policy.finish(message)
            case Abort():
                if policy:
                    policy.abort(message)
            case Release():
                if unknown := self._cells.release(message.cells, life_of(frontend, message.generation)):
                    _log.warning("frontend %d released %d cells of the arena that it did not have", frontend, unknown)

    def _submit(self, submit: Submit) -> Rejected | None:
        if self._policy is None:
            return Rejected(self._boot.generation, submit.uid, 503, "the engine is starting")
        return self._policy.submit(submit, time.monotonic())

    def _lose_frontend(self, frontend: int) -> None:
        """Nobody is left to read the output of its requests."""
        self._greeted.discard(frontend)
        self._post.forget(frontend)
        if self._policy:
            self._policy.forget(frontend, None)

    def _miss_frontend(self, frontend: int) -> None:
        _log.info("frontend %d is out of reach: its requests end", frontend)
        self._lose_frontend(frontend)

    def _deliver(self) -> None:
        if self._policy:
            for frontend, message in self._policy.drain():
                self._post.send(frontend, message)
            if self._post.cut:
                self._end_unread(self._policy)
        self._post.pay()
        if unread := self._post.take_unread():
            self._report.add_unread(unread)

    def _end_unread(self, policy: Scheduler) -> None:
        """Live frontends have stopped reading and output was lost: end all their requests."""
        for frontend in sorted(self._post.cut):
            count = policy.fail(frontend, UNREAD)
            _log.error("frontend %d stopped reading a while ago: its %d requests end with an error", frontend, count)
        for frontend, message in policy.drain():
            self._post.send(frontend, message)
        self._post.settle()


def _receive(link: "zmq.Socket[bytes]") -> tuple[bytes, bytes] | None:
    """The sender's identity and the next message, or None if there is none."""
    try:
        return link.recv(_NOWAIT), link.recv(_NOWAIT)
    except zmq.Again:  # by the first recv: the parts of a message arrive together
        return None
