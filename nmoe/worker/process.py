"""The worker process: the weights, cache and slots of one rank, executing the scheduler's Steps.

The loop keeps two steps in flight: while one runs, the next is received and launched, then the first one's result is
sent. When the scheduler dies, its steps are dropped and the slots reset, but the weights stay: the worker connects to
the scheduler's next life and reports Ready. If only some ranks got a step before the death, they wait for the others,
which end the exchange's life when they hear of it; the next one begins with the next scheduler's first step.
End-of-file from the launcher ends the process; so do errors, and the launcher handles its death.
"""

import collections
import gc
import logging
import os
import threading
import time

import msgspec
import numpy as np
import torch
import zmq

from nmoe import ipc, metrics
from nmoe.arena import ArenaLayout
from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config
from nmoe.messages import (
    CHANNEL_DECODE,
    CHANNEL_PREFILL,
    ROW_HAS_IDS,
    ROW_RETURNS,
    ROW_SAMPLES,
    Admit,
    Ready,
    Sampling,
    SchedulerToWorker,
    Step,
    StepDone,
    WorkerToScheduler,
)
from nmoe.outputs import Returns
from nmoe.profiles import Numerics
from nmoe.worker.batch import KVCache
from nmoe.worker.blocks import Arena
from nmoe.worker.cache import make_cache
from nmoe.worker.model import Model, load_model
from nmoe.worker.runner import Launched, Runner
from nmoe.worker.weights import ReportProgress

_log = logging.getLogger("nmoe.worker")
_HEARTBEAT_S = 1.0
_PROGRESS_S = 0.1
_COMPILERS = 16  # threads at most; more would only wait for the interpreter's lock
_CAPTURED_CHUNK = 4096  # tokens; longer kernels keep the device busy while the host launches the next


def main(boot: ipc.Boot) -> None:
    """Serve as rank `boot.index` until the launcher hangs up. Raises NmoeError if the model cannot be loaded."""
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(boot, stop), name="heartbeat", daemon=True)
    beat.start()
    try:
        _set_threads(boot.config.parallel.world_size)
        if (loaded := _load(boot)) is None or _hung_up(boot.control):
            return
        gc.collect()
        gc.freeze()  # a full collection that scans everything imported takes as long as several steps
        with zmq.Context() as context:
            worker = Worker(boot, *loaded, context)
            boot.control.send(ipc.Up())
            worker.run()
    finally:
        stop.set()
        beat.join()


class Worker:
    """The loop between the scheduler's link and the runner."""

    def __init__(
        self, boot: ipc.Boot, runner: Runner, num_pages: int, context: "zmq.Context[zmq.Socket[bytes]]"
    ) -> None:
        self._boot = boot
        self._runner = runner
        self._num_pages = num_pages
        self._context = context
        self._max_in_flight = boot.config.steps_in_flight
        self._in_flight: collections.deque[Launched] = collections.deque()
        self._row = boot.board.rows[metrics.row_index(boot.role, boot.index, boot.config.parallel.world_size)]
        self._scheduler = 0  # the newest generation of the scheduler seen
        self._scheduler_gone = False
        self._launcher_gone = False
        self._has_failed = False  # whether a request has failed because its logits were not finite
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(SchedulerToWorker)
        self._connect()

    def run(self) -> None:
        """Launch incoming steps and report completed ones until the launcher hangs up."""
        try:
            while self._heed_launcher():
                if self._in_flight and self._in_flight[0].ready():
                    self._report(self._in_flight.popleft())
                elif len(self._in_flight) < self._max_in_flight and (step := self._receive()):
                    self._in_flight.append(self._runner.launch(step))
                    self._row.observe("nmoe:rank_iteration_tokens", self._runner.num_tokens)
                else:
                    self._wait()
        finally:
            self._link.close()

    def _connect(self) -> None:
        self._link = ipc.connect_dealer(self._context, ipc.worker_address(self._boot.run_dir), self._boot.index)
        self._poller = zmq.Poller()
        self._poller.register(self._link, zmq.POLLIN)
        self._poller.register(self._boot.control.fileno(), zmq.POLLIN)
        self._send(Ready(self._boot.generation, self._boot.index, self._num_pages))

    def _send(self, message: WorkerToScheduler) -> None:
        self._link.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _heed_launcher(self) -> bool:
        """Handle the launcher's messages. Returns False if it has hung up."""
        if self._left_alone():
            self._runner.exchange.leave()  # others may be waiting for a step that this rank will not run
        if self._scheduler_gone:
            self._scheduler_gone = False
            self._in_flight.clear()
            self._runner.reset()
            self._link.close()  # along with anything the dead scheduler sent
            self._connect()
        return not self._launcher_gone

    def _left_alone(self) -> bool:
        """Whether the launcher or the scheduler is gone, so that there is no need to wait for other ranks."""
        try:
            while (message := self._boot.control.receive()) is not None:
                self._scheduler_gone |= isinstance(message, ipc.Gone) and message.role == "scheduler"
        except EOFError:
            self._launcher_gone = True
        return self._launcher_gone or self._scheduler_gone

    def _report(self, launched: Launched) -> None:
        tokens = launched.tokens()
        if self._runner.exchange.check():
            blocks, sizes = launched.blocks()
            failed = launched.failed()
            if failed and not self._has_failed:
                self._has_failed = True  # log once: a broken model fails in every step
                _log.error("worker %d: the model's logits are not finite: its requests fail", self._boot.index)
            self._send(
                StepDone(
                    self._boot.generation,
                    self._boot.index,
                    launched.step_id,
                    tokens,
                    blocks=blocks,
                    block_sizes=sizes,
                    failed=failed,
                )
            )

    def _receive(self) -> Step | None:
        """The next step, or None if there is none or it is from an earlier life of the scheduler."""
        try:
            step = self._decoder.decode(self._link.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None
        if step.generation < self._scheduler:
            _log.info("dropped step %d of scheduler life %d", step.step_id, step.generation)
            return None
        if step.generation > self._scheduler:
            self._scheduler = step.generation
            life = _life(self._boot.generation, step.generation)
            if not self._runner.exchange.meet(life, self._left_alone, bounded=True):
                return None
        return step

    def _wait(self) -> None:
        """Wait until there is something to do. The device's completion has no descriptor to poll, and an arriving step
        must be launched at once, so this only sleeps when nothing is in flight."""
        self._poller.poll(0 if self._in_flight else None)


def _beat(boot: ipc.Boot, stop: threading.Event) -> None:
    """Publish a heartbeat every second, however long a step takes."""
    row = boot.board.rows[metrics.row_index(boot.role, boot.index, boot.config.parallel.world_size)]
    while True:
        row.set("nmoe:heartbeat_seconds", time.monotonic())
        if stop.wait(_HEARTBEAT_S):
            return


def _set_threads(world_size: int) -> None:
    """Share the cores among workers, leaving one to the scheduler and the frontends: an operator waits for its slowest
    thread, so one thread too many costs more than all the others gain. No operators run concurrently."""
    torch.set_num_threads(max(1, (len(os.sched_getaffinity(0)) - 1) // world_size))
    torch.set_num_interop_threads(1)


def _device(kind: str, rank: int) -> torch.device:
    """This rank's device; on the GPU it also becomes the default for this process's streams and events."""
    if kind == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _life(worker: int, scheduler: int) -> int:
    """The exchange's life, from the generations of the workers, which restart together, and of the scheduler (0: not
    connected yet). It only ever increases, for the first 4096 schedulers."""
    return (worker << 12) + scheduler


def _load(boot: ipc.Boot) -> tuple[Runner, int] | None:
    """The warmed-up runner, with weights and cache, and its number of pages; None if the launcher has hung up."""
    config, started = boot.config, time.monotonic()
    device = _device(config.parallel.device, boot.index)
    checkpoint = open_checkpoint(config)
    meeting = boot.run_dir / f"meeting-{boot.generation}"
    model = load_model(checkpoint, config, boot.index, device, _progress(boot.control), boot.slabs, meeting)
    loaded = time.monotonic()
    cache = make_cache(config, checkpoint, device)
    arena = None
    if boot.arena is not None:
        arena = Arena(ArenaLayout.of(checkpoint.architecture, config.parallel.world_size), boot.arena, boot.index)
    runner = Runner(model, cache, num_slots=config.num_slots, max_seq_len=checkpoint.max_seq_len, arena=arena)
    kernels, allocated = 0, time.monotonic()
    if device.type == "cuda":
        kernels = _compile(model, cache, config, checkpoint.max_seq_len, boot.index)
    compiled = time.monotonic()
    if _hung_up(boot.control):
        return None
    # The warm-up needs all ranks, and their loading times differ.
    if not runner.exchange.meet(_life(boot.generation, 0), lambda: _hung_up(boot.control), bounded=False):
        return None
    warm_up_all(runner, cache, config, checkpoint.max_seq_len)
    _log.info(
        "worker %d: weights in %.1f s, %d pages of %d tokens, %d kernels in %.1f s, warm-up in %.1f s",
        boot.index,
        loaded - started,
        cache.num_pages,
        cache.page_size,
        kernels,
        compiled - allocated,
        time.monotonic() - compiled,
    )
    return runner, cache.num_pages


def rehearse(model: Model, cache: KVCache, config: Config, max_seq_len: int) -> None:
    """Go through `warm_up_all` without launching its kernels; see compiling.py."""
    short, rows = model.abridged(cache)
    runner = Runner(short, rows, num_slots=config.num_slots, max_seq_len=max_seq_len)
    warm_up_all(runner, rows, config, max_seq_len, rehearsal=True)


def _compile(model: Model, cache: KVCache, config: Config, max_seq_len: int, rank: int) -> int:
    """Compile the kernels of `warm_up_all`, sharing the cores among the ranks; returns how many there are."""
    from nmoe.worker.compiling import compile_kernels

    ranks = config.parallel.world_size
    threads = min(max(1, len(os.sched_getaffinity(0)) // ranks), _COMPILERS)
    try:
        kernels = compile_kernels(lambda: rehearse(model, cache, config, max_seq_len), threads, rank / ranks)
    except (ImportError, AttributeError, TypeError):
        # What this relies on is private to Triton. Without it a start takes longer, but no other harm is done.
        _log.warning("worker %d: kernels are compiled one by one, as this Triton is unknown", rank, exc_info=True)
        kernels = 0
    torch.cuda.empty_cache()  # the rehearsal's memory
    return kernels


def _hung_up(control: ipc.Control) -> bool:
    """Whether the launcher has hung up. Its other messages are dropped: they do not concern a worker that is not yet
    connected, and handled later, an earlier scheduler's death would drop the link to the current one."""
    try:
        while control.receive() is not None:
            pass
    except EOFError:
        return True
    return False


def _progress(control: ipc.Control) -> ReportProgress:
    """Reports loading progress to the launcher: periodically, and always at the end."""
    last = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_S or done == total:
            last = now
            control.send(ipc.Progress(what, done, total))

    return report


def warm_up_all(runner: Runner, cache: KVCache, config: Config, max_seq_len: int, *, rehearsal: bool = False) -> None:
    """Warm up everything that requests may need, and on the GPU capture the graphs, or do as if (compiling.py)."""
    warm_up(runner, cache.page_size)
    runner.exchange.check()
    if config.parallel.device == "cpu":
        return
    # Loading the kernels of an exact step takes a while, during which every stream would stall.
    warm_up(runner, cache.page_size, Numerics.EXACT)
    most = config.engine.max_prefill_tokens // config.parallel.world_size
    longest = min(max_seq_len, most)
    warm_up_prefills(runner, cache, longest, min(most, longest * config.engine.max_batch_size))
    if config.engine.enable_cuda_graph:
        runner.capture(config.engine.max_batch_size, min(most, _CAPTURED_CHUNK), rehearsal=rehearsal)
        warm_up(runner, cache.page_size)  # warms up what follows a captured step


def warm_up(runner: Runner, page_size: int, numerics: Numerics = Numerics.FAST) -> None:
    """Prefill one token and decode another, so that the first request does not pay for first-use initialisation."""
    rows = np.array([0, 0, 1, ROW_SAMPLES | ROW_HAS_IDS | ROW_RETURNS], np.int32)
    pages = np.array([(0, page) for page in range(-(-2 // page_size))], np.int32)
    admit = Admit(slot=0, cached=0, sampling=Sampling(top_k=2, top_p=0.9), returns=Returns(records=True))
    prefill = Step(0, 0, numerics, CHANNEL_PREFILL, 1, rows.tobytes(), bytes(4), pages.tobytes(), (admit,))
    rows = np.array([0, 1, 1, ROW_SAMPLES | ROW_RETURNS], np.int32)
    decode = Step(0, 1, numerics, CHANNEL_DECODE, 1, rows.tobytes())
    for step in (prefill, decode):
        runner.launch(step).tokens()
    runner.reset()


def warm_up_prefills(runner: Runner, cache: KVCache, longest: int, most: int) -> None:
    """Run steps of 16, 32, ... `most` tokens in rows of up to `longest`, as far as the cache holds them, then idle
    steps, because other ranks' caches may hold more. Together they need every kernel of a prefill in every shape and as
    much memory as any step, so no request waits for the compiler or runs out of memory."""
    per_row = -(-longest // cache.page_size)
    sizes = [16 << doubling for doubling in range(most.bit_length()) if 16 << doubling < most]
    for tokens in [*sizes, most]:
        lengths = [min(longest, tokens - start) for start in range(0, tokens, longest)]
        if len(lengths) * per_row > cache.num_pages:
            lengths = []
        pages = [(slot, slot * per_row + page) for slot in range(len(lengths)) for page in range(per_row)]
        step = Step(
            generation=0,
            step_id=0,
            numerics=Numerics.FAST,
            channel=CHANNEL_PREFILL,
            num_tokens=tokens,
            rows=np.array([(s, 0, n, ROW_SAMPLES | ROW_HAS_IDS) for s, n in enumerate(lengths)], np.int32).tobytes(),
            ids=bytes(4 * sum(lengths)),
            pages=np.array(pages, np.int32).tobytes(),
            admits=tuple(Admit(slot, 0, Sampling(temperature=0.0)) for slot in range(len(lengths))),
        )
        runner.launch(step).tokens()
        runner.reset()
