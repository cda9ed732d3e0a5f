"""A real worker process over real sockets, driven by the test as its scheduler and its launcher."""

import pathlib
import select
import time
from types import SimpleNamespace

import msgspec
import numpy as np
import psutil
import pytest
import zmq

from nmoe import ipc
from nmoe.config import Config, Engine, Model, Parallel
from nmoe.errors import NmoeError
from nmoe.messages import (
    CHANNEL_DECODE,
    CHANNEL_PREFILL,
    ROW_HAS_IDS,
    ROW_SAMPLES,
    Admit,
    Ready,
    Sampling,
    Step,
    StepDone,
    WorkerToScheduler,
)
from nmoe.metrics import Board, row_index
from nmoe.profiles import Numerics
from nmoe.worker import process
from nmoe.worker.process import Worker
from tests.checkpoints import make_checkpoint
from tests.forking import fork_call

PAGES = 40
LIFE = 3  # the worker's generation
DEADLINE_S = 30


def _worker(config: Config, run_dir: pathlib.Path, control: ipc.Control) -> int:
    """The child: what the launcher's child does, and a check of its heartbeat at the end."""
    boot = ipc.Boot("worker", 0, LIFE, config, run_dir, control, Board(2))
    ipc.settle_in(boot)
    started = time.monotonic()
    try:
        process.main(boot)
    except NmoeError as error:
        control.send(ipc.Failed(str(error)))
        return 1
    beat = boot.board.rows[row_index("worker", 0, 1)].get("nmoe:heartbeat_seconds")
    assert started <= beat <= time.monotonic()
    assert time.monotonic() - beat < 2
    return 0


class Harness:
    """One worker process with the two links it has."""

    def __init__(self, config: Config, run_dir: pathlib.Path, router: "zmq.Socket[bytes]") -> None:
        self.control, theirs = ipc.Control.pair()
        self.log = run_dir / "worker.log"
        self.child = fork_call(_worker, config, run_dir, theirs, output=self.log)
        theirs.close()
        self._router = router
        self._decoder = msgspec.msgpack.Decoder(WorkerToScheduler)

    def said(self) -> ipc.ControlMessage:
        assert select.select([self.control], [], [], DEADLINE_S)[0]
        message = self.control.receive()
        assert message is not None
        return message

    def receive(self) -> WorkerToScheduler:
        assert self._router.poll(DEADLINE_S * 1000)
        peer, data = self._router.recv_multipart()
        assert peer == ipc.identity(0)
        return self._decoder.decode(data)

    def send(self, *steps: Step) -> None:
        for step in steps:
            self._router.send_multipart([ipc.identity(0), msgspec.msgpack.encode(step)])

    def hang_up(self) -> int:
        self.control.close()
        return self.child.wait()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("model"))
    return Config(
        model=Model(path=str(path)),
        parallel=Parallel(world_size=1, device="cpu"),
        engine=Engine(page_size=8, num_pages=PAGES, max_batch_size=4),
    )


@pytest.fixture
def start(tmp_path):
    """Starts workers; each test has one socket, as the one scheduler has."""
    harnesses = []
    with zmq.Context() as context, ipc.bind_router(context, ipc.worker_address(tmp_path)) as router:

        def start(config):
            harnesses.append(Harness(config, tmp_path, router))
            return harnesses[-1]

        yield start
        for harness in harnesses:
            harness.control.close()
            harness.child.end()


@pytest.fixture
def worker(start, config):
    """A worker that is ready."""
    worker = start(config)
    assert worker.receive() == Ready(LIFE, 0, PAGES)
    while not isinstance(worker.said(), ipc.Up):
        pass
    return worker


def _prefill(step_id, prompt, generation=1, slot=0, sampling=None):
    rows = np.array([slot, 0, len(prompt), ROW_SAMPLES | ROW_HAS_IDS], np.int32).tobytes()
    pages = np.array([(slot, page) for page in range(slot * 4, slot * 4 + 4)], np.int32).tobytes()
    ids = np.array(prompt, np.int32).tobytes()
    admits = (Admit(slot, 0, sampling or Sampling(temperature=0.0)),)
    return Step(generation, step_id, Numerics.FAST, CHANNEL_PREFILL, len(prompt), rows, ids, pages, admits)


def _decode(step_id, position, generation=1, slot=0):
    rows = None if position is None else np.array([slot, position, 1, ROW_SAMPLES], np.int32).tobytes()
    return Step(generation, step_id, Numerics.FAST, CHANNEL_DECODE, 1, rows)


def _tokens(done):
    return np.frombuffer(done.tokens, np.int32).tolist()


def test_it_loads_says_how_far_and_is_ready(start, config):
    worker = start(config)
    said = [worker.said()]
    while said[-1] != ipc.Up():
        said.append(worker.said())
    assert all(isinstance(message, ipc.Progress) for message in said[:-1])
    assert said[-2].done == said[-2].total > 0
    assert worker.receive() == Ready(LIFE, 0, PAGES)
    assert worker.hang_up() == 0


def test_steps_sent_back_to_back_are_answered_in_order(worker):
    worker.send(_prefill(7, [5, 6, 7]), _decode(8, 3), _decode(9, None), _decode(10, None))
    done = [worker.receive() for _ in range(4)]
    assert [(each.generation, each.rank, each.step_id, each.counts) for each in done] == [
        (LIFE, 0, step_id, None) for step_id in range(7, 11)
    ]
    tokens = [_tokens(each) for each in done]
    assert all(len(each) == 1 for each in tokens)
    # The same request in one prefill: what the decodes were given was the token sampled before.
    ids = [5, 6, 7, *(each[0] for each in tokens[:3])]
    worker.send(_prefill(11, ids, slot=1))
    assert _tokens(worker.receive()) == tokens[3]


def test_an_idle_step_is_answered(worker):
    worker.send(Step(1, 0, Numerics.FAST, CHANNEL_DECODE, 1, b""))
    assert worker.receive() == StepDone(LIFE, 0, 0, b"")


def test_a_new_scheduler_is_told_ready_again_and_finds_empty_slots(worker):
    worker.send(_prefill(0, [5, 6, 7], generation=1))
    first = _tokens(worker.receive())
    worker.control.send(ipc.Gone("scheduler", 0, 1))
    assert worker.receive() == Ready(LIFE, 0, PAGES)
    worker.send(_prefill(0, [5, 6, 7], generation=2), _decode(1, 3, generation=1), _decode(2, 3, generation=2))
    done = [worker.receive(), worker.receive()]
    assert [each.step_id for each in done] == [0, 2]
    assert _tokens(done[0]) == first


def test_what_died_before_it_connects_is_no_news_to_it():
    launcher, control = ipc.Control.pair()
    for life in (1, 2):
        launcher.send(ipc.Gone("scheduler", 0, life))
    assert not process._hung_up(control)
    assert control.receive() is None
    launcher.close()
    assert process._hung_up(control)
    control.close()


def test_a_malformed_step_ends_the_process(worker):
    worker.send(_decode(4, 0))
    assert worker.child.wait() == 1
    assert "MalformedStep: step 4: row 0 (slot 0)" in worker.log.read_text()


def test_it_sleeps_when_idle_and_wakes_at_once(worker):
    process = psutil.Process(worker.child.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(0.5)
    assert sum(process.cpu_times()[:2]) - before <= 0.02
    worker.send(_prefill(0, [1]))
    assert worker.receive().step_id == 0


def test_the_launchers_end_ends_it(worker):
    assert worker.hang_up() == 0


def test_a_rank_that_leaves_lets_the_others_leave(config):
    """A last step may have reached some ranks only: these would wait for the rest, and be killed for it."""
    launcher, control = ipc.Control.pair()
    worker = Worker.__new__(Worker)
    worker._boot, left = ipc.Boot("worker", 0, LIFE, config, pathlib.Path(), control, Board(2)), []
    worker._runner = SimpleNamespace(exchange=SimpleNamespace(leave=lambda: left.append("the exchange")))
    worker._launcher_gone = worker._scheduler_gone = False
    assert worker._heed_launcher() and not left
    launcher.close()
    assert not worker._heed_launcher() and left == ["the exchange"]
    control.close()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("engine", {"num_pages": 10**12}, "set [engine] num_pages"),
        ("model", {"path": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_said(start, config, section, change, message):
    replace = msgspec.structs.replace
    worker = start(replace(config, **{section: replace(getattr(config, section), **change)}))
    said = worker.said()
    while isinstance(said, ipc.Progress):
        said = worker.said()
    assert isinstance(said, ipc.Failed)
    assert message in said.message
    assert worker.child.wait() == 1
