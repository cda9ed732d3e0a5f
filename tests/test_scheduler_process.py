"""A real scheduler process over real sockets; the test plays the launcher, the frontends and the workers."""

import os
import pathlib
import select
import signal
import time
from contextlib import nullcontext

import msgspec
import numpy as np
import psutil
import pytest
import zmq

import nmoe
from nmoe import ipc
from nmoe.config import Config, Engine, Model, Parallel, Server
from nmoe.errors import NmoeError
from nmoe.messages import (
    Abort,
    Finish,
    Hello,
    Ready,
    Rejected,
    Release,
    Sampling,
    SchedulerToFrontend,
    Serving,
    Step,
    StepDone,
    Submit,
    Tokens,
    make_uid,
)
from nmoe.metrics import Board, row_index
from nmoe.outputs import Returns, cells_of
from nmoe.scheduler import process
from nmoe.scheduler.report import Report
from tests.forking import fork_call
from tests.simulated_worker import SimulatedWorker, expected_output

DEADLINE_S = 20
QUIET_MS = 200
DEMO = pathlib.Path(nmoe.__file__).parent / "demo"
LIFE = 4  # the scheduler's generation
PROMPT = [1, 2, 3, 4, 5]
CONFIG = Config(
    model=Model(path=str(DEMO), max_seq_len=500),
    parallel=Parallel(world_size=2, device="cpu"),
    engine=Engine(page_size=4, max_batch_size=4, max_prefill_tokens=64),
    server=Server(processes=2, max_queue=8),
)


def _scheduler(
    config: Config, run_dir: pathlib.Path, control: ipc.Control, numbers: dict[str, float], mark: int
) -> int:
    """The child: what the launcher's child does, and then a look at the board."""
    ipc.HIGH_WATER_MARK = mark
    board = Board(5)
    boot = ipc.Boot("scheduler", 0, LIFE, config, run_dir, control, board)
    ipc.settle_in(boot)
    try:
        process.main(boot)
    except NmoeError as error:
        control.send(ipc.Failed(str(error)))
        return 1
    row = board.rows[row_index("scheduler", 0, config.parallel.world_size)]
    assert time.monotonic() - row.get("nmoe:heartbeat_seconds") < 2
    assert numbers == {name: row.get(name) for name in numbers}
    return 0


class Worker:
    """A worker's end of its link, with a simulated device behind it."""

    def __init__(self, rig, rank: int, num_pages: int, life: int = 1) -> None:
        self.life = life
        self.device = SimulatedWorker(rank, 2 * CONFIG.engine.max_batch_size, CONFIG.engine.page_size, 1, rig.lengths)
        self.link = rig.connect(ipc.worker_address(rig.run_dir), rank)
        self.send(Ready(life, rank, num_pages))

    def send(self, message) -> None:
        self.link.send(msgspec.msgpack.encode(message))

    def receive(self) -> Step:
        assert self.link.poll(DEADLINE_S * 1000), "no step came"
        step = msgspec.msgpack.decode(self.link.recv(), type=Step)
        assert step.generation == LIFE
        return step

    def quiet(self) -> bool:
        return not self.link.poll(QUIET_MS)

    def run(self, step: Step) -> None:
        done = self.device.apply(step)
        self.send(msgspec.structs.replace(done, generation=self.life))


class Frontend:
    """A frontend's end of its link."""

    def __init__(self, rig, index: int, life: int = 1) -> None:
        self.rig, self.index, self.life = rig, index, life
        self.link = rig.connect(ipc.frontend_address(rig.run_dir), index)
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.cells: list[int] = []
        self.counter = 0
        self.send(Hello(life))

    def send(self, message) -> None:
        self.link.send(msgspec.msgpack.encode(message))

    def receive(self) -> SchedulerToFrontend:
        assert self.link.poll(DEADLINE_S * 1000), "no message came"
        message = msgspec.msgpack.decode(self.link.recv(), type=SchedulerToFrontend)
        assert message.generation == LIFE
        if isinstance(message, Tokens):
            uids, tokens = np.frombuffer(message.uids, np.int64), np.frombuffer(message.tokens, np.int32)
            if message.counts is not None:  # a row of prompt alone has a block and no token
                counts = np.frombuffer(message.counts, np.int32)
                assert not (counts > 1).any()
                uids = uids[counts > 0]
            for uid, token in zip(uids.tolist(), tokens.tolist(), strict=True):
                self.tokens.setdefault(uid, []).append(token)
            at = 0
            for size in np.frombuffer(message.block_sizes or b"", np.int32).tolist():
                self.cells += cells_of(memoryview(message.blocks)[at : at + size]).tolist()
                at += size
            for ended in message.ended:
                assert ended.uid not in self.ended
                self.ended[ended.uid] = ended.reason
        return message

    def submit(self, max_tokens: int = 4, prompt: list[int] = PROMPT, **fields) -> int:
        uid = make_uid(self.index, self.life, self.counter)
        self.counter += 1
        seed = 100 + uid
        self.rig.lengths[seed] = len(prompt) + max_tokens
        ids = np.array(prompt, np.int32).tobytes()
        self.send(Submit(self.life, uid, ids, max_tokens, Sampling(seed=seed), **fields))
        return uid


class Rig:
    """The scheduler and everybody around it."""

    def __init__(self, run_dir: pathlib.Path, config: Config = CONFIG, numbers: dict[str, float] | None = None) -> None:
        self.run_dir = run_dir
        self.lengths: dict[int, int] = {}
        self.context = zmq.Context()
        self.control, theirs = ipc.Control.pair()
        self.log = run_dir / "scheduler.log"
        mark = ipc.HIGH_WATER_MARK
        self.child = fork_call(_scheduler, config, run_dir, theirs, numbers or {}, mark, output=self.log)
        theirs.close()
        self._links: list[zmq.Socket[bytes]] = []

    def __enter__(self) -> "Rig":
        assert self.said() == ipc.Up()
        return self

    def __exit__(self, kind, *_) -> None:
        self.control.close()
        status = self.child.wait(DEADLINE_S)
        for link in self._links:
            link.close()
        self.context.term()
        if kind is None:
            assert status == 0, self.log.read_text()

    def connect(self, address: str, index: int) -> "zmq.Socket[bytes]":
        self._links.append(ipc.connect_dealer(self.context, address, index))
        return self._links[-1]

    def said(self) -> ipc.ControlMessage:
        assert select.select([self.control], [], [], DEADLINE_S)[0]
        message = self.control.receive()
        assert message is not None
        return message

    def workers(self, life: int = 1) -> list[Worker]:
        return [Worker(self, rank, num_pages, life) for rank, num_pages in enumerate((40, 30))]

    def serving(self, life: int = 1) -> tuple[Frontend, list[Worker]]:
        """One frontend that was told that the engine serves, and the workers."""
        frontend = Frontend(self, 0)
        workers = self.workers(life)
        assert isinstance(frontend.receive(), Serving)
        return frontend, workers


def run_until_ended(frontend: Frontend, workers: list[Worker], uid: int) -> None:
    """Let the workers work until `uid` has its terminal entry."""
    poller = zmq.Poller()
    for end in (frontend, *workers):
        poller.register(end.link, zmq.POLLIN)
    while uid not in frontend.ended:
        ready = dict(poller.poll(DEADLINE_S * 1000))
        assert ready, "nothing happens"
        for worker in workers:
            if worker.link in ready:
                worker.run(worker.receive())
        if frontend.link in ready:
            frontend.receive()


def test_requests_of_two_frontends_run_on_two_ranks(tmp_path):
    numbers = {
        "nmoe:generation_tokens": 12.0,
        "nmoe:prompt_tokens": 10.0,
        "nmoe:num_requests_running": 0.0,
        "nmoe:num_requests_waiting": 0.0,
        "nmoe:kv_cache_usage_perc": 0.0,
        "nmoe:step_deadline_seconds": 0.0,
    }
    with Rig(tmp_path, numbers=numbers) as rig:
        early = Frontend(rig, 0)
        workers = rig.workers()
        assert early.receive() == Serving(LIFE, 30 * 4, 1)  # what the smaller cache holds
        late = Frontend(rig, 1)
        assert late.receive() == Serving(LIFE, 30 * 4, 1)
        first = early.submit(max_tokens=4)
        run_until_ended(early, workers, first)
        second = late.submit(max_tokens=8)
        run_until_ended(late, workers, second)
        assert early.tokens[first] == expected_output(PROMPT, 100 + first, 4, ())
        assert late.tokens[second] == expected_output(PROMPT, 100 + second, 8, ())
        assert (early.ended[first], late.ended[second]) == ("length", "length")


def test_the_models_length_is_the_default_limit(tmp_path):
    demo = pathlib.Path(nmoe.__file__).parent / "demo"
    length = msgspec.json.decode((demo / "config.json").read_bytes())["max_position_embeddings"]
    with Rig(tmp_path, msgspec.structs.replace(CONFIG, model=Model(path=str(demo)))) as rig:
        frontend = Frontend(rig, 0)
        for rank in range(2):
            Worker(rig, rank, num_pages=100_000)
        assert frontend.receive() == Serving(LIFE, length, 1)


def test_requests_are_refused_before_the_workers_are_ready_and_when_they_cannot_fit(tmp_path):
    with Rig(tmp_path) as rig:
        frontend = Frontend(rig, 0)
        uid = frontend.submit()
        assert frontend.receive() == Rejected(LIFE, uid, 503, "the engine is starting")
        rig.workers()
        assert isinstance(frontend.receive(), Serving)
        uid = frontend.submit(max_tokens=1000)
        rejected = frontend.receive()
        assert (rejected.uid, rejected.status) == (uid, 400)


def test_two_steps_are_in_flight_and_a_finish_ends_a_request(tmp_path):
    with Rig(tmp_path) as rig:
        frontend, workers = rig.serving()
        uid = frontend.submit(max_tokens=100)
        steps = [[worker.receive() for _ in range(2)] for worker in workers]
        assert all(worker.quiet() for worker in workers)
        for worker, mine in zip(workers, steps, strict=True):
            worker.run(mine[0])
        frontend.receive()
        assert [worker.receive().step_id for worker in workers] == [3, 3]
        frontend.send(Finish(1, uid, 1))
        frontend.receive()
        assert frontend.ended == {uid: "stop"}
        assert frontend.tokens[uid] == expected_output(PROMPT, 100 + uid, 1, ())
        for worker, mine in zip(workers, steps, strict=True):
            worker.run(mine[1])
        assert all(worker.quiet() for worker in workers)


def test_an_abort_frees_everything(tmp_path):
    with Rig(tmp_path, numbers={"nmoe:kv_cache_usage_perc": 0.0}) as rig:
        frontend, workers = rig.serving()
        uid = frontend.submit(max_tokens=100)
        workers[0].receive()
        frontend.send(Abort(1, uid))
        frontend.receive()
        assert frontend.ended == {uid: "abort"}


def steps_stop(workers: list[Worker]) -> bool:
    """Answer what is asked; whether the asking ends soon, though no request has come to its length."""
    for _ in range(20):
        if all(worker.quiet() for worker in workers):
            return True
        for worker in workers:
            worker.run(worker.receive())
    return False


def test_a_new_life_of_a_frontend_ends_the_requests_of_the_old(tmp_path):
    with Rig(tmp_path) as rig:
        frontend, workers = rig.serving()
        frontend.submit(max_tokens=100)
        frontend.life = 2
        frontend.send(Hello(2))
        while not isinstance(frontend.receive(), Serving):
            pass
        assert steps_stop(workers)
        frontend.life = 1
        frontend.submit()  # late news of its first life
        frontend.life = 2
        uid = frontend.submit()
        run_until_ended(frontend, workers, uid)
        assert list(frontend.ended) == [uid]


@pytest.mark.parametrize("told", [True, False])
def test_a_frontend_that_dies_leaves_nothing_behind(tmp_path, told):
    with Rig(tmp_path, numbers={"nmoe:kv_cache_usage_perc": 0.0}) as rig:
        frontend, workers = rig.serving()
        frontend.submit(max_tokens=100)
        frontend.submit(max_tokens=100)
        frontend.link.close()
        if told:
            rig.control.send(ipc.Gone("frontend", 0, 1))
        assert steps_stop(workers)


LARGE = Returns(records=True, top_k=128, scored_ids=tuple(range(128)))


def fill_link(frontend: Frontend, workers: list[Worker], log: pathlib.Path) -> list[int]:
    """Requests whose results nobody reads, until the scheduler cannot send them."""
    uids = []
    while "stopped reading" not in log.read_text():
        assert len(uids) < 400, "the link takes everything"
        uids += [frontend.submit(max_tokens=30, returns=LARGE) for _ in range(4)]
        while not all(worker.quiet() for worker in workers):
            for worker in workers:
                worker.run(worker.receive())
    return uids


def check_output(frontend: Frontend, uid: int) -> None:
    """Nothing is missing before the end, unless it is an error's."""
    expected, found = expected_output(PROMPT, 100 + uid, 30, ()), frontend.tokens.get(uid, [])
    assert found == expected[: len(found)], "tokens behind a gap"
    assert (found == expected) == (frontend.ended[uid] == "length") or frontend.ended[uid] == "error"


@pytest.mark.parametrize("served_again", [False, True])
def test_a_frontend_that_stops_to_read_is_told_of_every_end_when_it_reads_again(tmp_path, monkeypatch, served_again):
    monkeypatch.setattr(ipc, "HIGH_WATER_MARK", 40)
    with Rig(tmp_path) as rig:
        frontend, workers = rig.serving()
        other = Frontend(rig, 1)
        assert isinstance(other.receive(), Serving)
        uids = fill_link(frontend, workers, rig.log)
        bystander = other.submit(max_tokens=30)
        run_until_ended(other, workers, bystander)
        assert other.ended == {bystander: "length"}
        uids.append(frontend.submit(max_tokens=30, returns=LARGE))  # nothing of it can be sent
        frontend.submit(max_tokens=10_000)  # nor its refusal
        assert steps_stop(workers)
        if served_again:
            rig.control.send(ipc.Gone("worker", 0, 1))
            while "worker 0 died" not in rig.log.read_text():
                time.sleep(0.01)
            workers = rig.workers(life=2)
        last = []
        while not (set(uids) <= frontend.ended.keys() and any(isinstance(each, Rejected) for each in last)):
            last.append(frontend.receive())
        if served_again:
            assert isinstance(last[-1], Serving) or isinstance(frontend.receive(), Serving)
        for uid in uids:
            check_output(frontend, uid)
        assert "error" in frontend.ended.values() and "length" in frontend.ended.values()
        uid = frontend.submit(max_tokens=30)
        run_until_ended(frontend, workers, uid)
        assert frontend.ended[uid] == "length"
        check_output(frontend, uid)


def test_dead_workers_end_all_requests_and_new_ones_start_clean(tmp_path):
    with Rig(tmp_path, numbers={"nmoe:kv_cache_usage_perc": 0.0, "nmoe:generation_tokens": 4.0}) as rig:
        frontend, old = rig.serving()
        lost = frontend.submit(max_tokens=100)
        for worker in old:
            worker.receive()
        rig.control.send(ipc.Gone("worker", 1, 1))
        message = frontend.receive()
        assert frontend.ended == {lost: "error"}
        assert "worker 1 died" in message.ended[0].detail
        refused = frontend.submit()
        assert frontend.receive() == Rejected(LIFE, refused, 503, "the engine is starting")
        old[0].send(StepDone(1, 0, 1, b""))  # what was still on its way
        old[0].send(Ready(1, 0, 40))
        for worker in old:
            worker.link.close()
        workers = rig.workers(life=2)
        assert isinstance(frontend.receive(), Serving)
        uid = frontend.submit()
        run_until_ended(frontend, workers, uid)
        assert frontend.tokens[uid] == expected_output(PROMPT, 100 + uid, 4, ())


def test_news_of_an_old_death_does_not_touch_the_life_after_it(tmp_path):
    with Rig(tmp_path) as rig:
        frontend, old = rig.serving()
        for worker in old:
            worker.link.close()
        frontend.link.close()
        workers = rig.workers(life=2)
        frontend = Frontend(rig, 0, life=2)
        while frontend.receive().workers != 2:
            pass  # the scheduler heard of the new frontend before it heard of the new workers
        uid = frontend.submit(max_tokens=4)
        for role, index in (("worker", 0), ("frontend", 0)):
            rig.control.send(ipc.Gone(role, index, 1))
        run_until_ended(frontend, workers, uid)
        assert frontend.ended == {uid: "length"}


LOGITS = Returns(records=True, prompt=True, logits=True)
NUM_CELLS = 16  # of each rank: as few as there can be, since rows of so large a vocabulary are large


def config_of_few_cells(folder: pathlib.Path) -> Config:
    demo = msgspec.json.decode((DEMO / "config.json").read_bytes())
    (folder / "config.json").write_bytes(msgspec.json.encode({**demo, "vocab_size": 1 << 23}))
    return msgspec.structs.replace(CONFIG, model=Model(path=str(folder), max_seq_len=500))


def take_turns(frontend: Frontend, workers: list[Worker]) -> None:
    """Whoever has a message reads it."""
    for worker in workers:
        if worker.link.poll(1):
            worker.run(worker.receive())
    if frontend.link.poll(1):
        frontend.receive()


def out_of_cells(rig: Rig) -> tuple[Frontend, list[Worker], set[int]]:
    """A frontend that has all cells, and its requests that wait for more."""
    frontend, workers = rig.serving()
    uids = {frontend.submit(max_tokens=5, prompt=list(range(30)), returns=LOGITS) for _ in workers}
    while len(frontend.cells) < 2 * NUM_CELLS:
        take_turns(frontend, workers)
    assert sorted(frontend.cells) == list(range(2 * NUM_CELLS))
    assert all(worker.quiet() for worker in workers)
    return frontend, workers, uids


def test_rows_whose_logits_find_no_cell_wait_for_a_release(tmp_path):
    with Rig(tmp_path, config_of_few_cells(tmp_path)) as rig:
        frontend, workers, uids = out_of_cells(rig)
        while uids - frontend.ended.keys():
            frontend.send(Release(1, np.array(frontend.cells, np.int32).tobytes()))
            frontend.cells.clear()
            while not frontend.cells:
                take_turns(frontend, workers)
        assert {len(frontend.tokens[uid]) for uid in uids} == {5}


@pytest.mark.parametrize("told", [True, False])
def test_a_frontends_next_life_finds_the_arena_free(tmp_path, told):
    with Rig(tmp_path, config_of_few_cells(tmp_path)) as rig:
        old, workers, _ = out_of_cells(rig)
        old.link.close()
        if told:
            rig.control.send(ipc.Gone("frontend", 0, 1))
        new = Frontend(rig, 0, life=2)
        assert isinstance(new.receive(), Serving)
        uid = new.submit(max_tokens=2, prompt=list(range(NUM_CELLS - 1)), returns=LOGITS)
        run_until_ended(new, workers, uid)
        assert len(new.cells) == NUM_CELLS


def test_who_says_hello_again_has_given_up_what_it_asked_for(tmp_path):
    with Rig(tmp_path, numbers={"nmoe:kv_cache_usage_perc": 0.0}) as rig:
        frontend, workers = rig.serving()
        frontend.submit(max_tokens=100)
        frontend.send(Hello(1))
        assert steps_stop(workers)


def test_a_worker_out_of_reach_is_noticed_without_being_told(tmp_path):
    with Rig(tmp_path) as rig:
        frontend, workers = rig.serving()
        workers[1].link.close()
        time.sleep(0.1)  # until ZeroMQ has seen the end of the connection
        uid = frontend.submit()
        frontend.receive()
        assert frontend.ended == {uid: "error"}


@pytest.mark.parametrize("news", [None, "death", "next life"])
def test_a_worker_that_lives_but_is_out_of_reach_takes_a_new_life_of_the_scheduler(tmp_path, monkeypatch, news):
    """Workers connect anew only then; with one rank, no other would miss it."""
    monkeypatch.setattr(process, "_OUT_OF_REACH_S", 0.0)
    config = msgspec.structs.replace(CONFIG, parallel=Parallel(world_size=1, device="cpu"))
    launcher, control = ipc.Control.pair()
    with zmq.Context() as context:
        scheduler = process.Process(ipc.Boot("scheduler", 0, LIFE, config, tmp_path, control, Board(3)), context)
        scheduler._welcome(Ready(1, 0, 40))  # by a worker that never connected
        ids = np.array(PROMPT, np.int32).tobytes()
        assert scheduler._submit(Submit(1, make_uid(0, 1, 0), ids, 4, Sampling())) is None
        scheduler._plan()
        assert scheduler._policy is None
        if news == "death":
            launcher.send(ipc.Gone("worker", 0, 1))
            assert scheduler._heed_launcher()
        elif news == "next life":
            scheduler._welcome(Ready(2, 0, 40))
        with pytest.raises(RuntimeError, match="link to a worker is lost") if news is None else nullcontext():
            scheduler._beat()
        scheduler.close()
    launcher.close()
    control.close()


def test_a_new_life_takes_back_what_the_earlier_one_said_of_its_steps():
    row = Board(1).rows[0]
    for name in ("nmoe:step_deadline_seconds", "nmoe:num_requests_running", "nmoe:kv_cache_usage_perc", "nmoe:steps"):
        row.set(name, 0.5)
    Report(row).set_deadline(None)
    assert row.get("nmoe:step_deadline_seconds") == 0.0
    assert row.get("nmoe:num_requests_running") == row.get("nmoe:kv_cache_usage_perc") == 0.0
    assert row.get("nmoe:steps") == 0.5


def test_requests_of_one_moment_do_not_fill_the_queue_that_they_leave_at_once(tmp_path):
    """The batch has room for all of them, the queue only for some."""
    with Rig(tmp_path, msgspec.structs.replace(CONFIG, server=Server(max_queue=2))) as rig:
        frontend, workers = rig.serving()
        os.kill(rig.child.pid, signal.SIGSTOP)
        uids = [frontend.submit() for _ in range(4)]
        time.sleep(0.1)
        os.kill(rig.child.pid, signal.SIGCONT)
        while len(frontend.ended) < len(uids):
            for worker in workers:
                while worker.link.poll(0):
                    worker.run(worker.receive())
            if frontend.link.poll(1):
                assert isinstance(frontend.receive(), Tokens)
        assert frontend.ended == dict.fromkeys(uids, "length")


def test_an_idle_scheduler_sleeps(tmp_path):
    with Rig(tmp_path) as rig:
        frontend, workers = rig.serving()
        run_until_ended(frontend, workers, frontend.submit())
        before = sum(psutil.Process(rig.child.pid).cpu_times()[:2])
        time.sleep(1.5)
        assert sum(psutil.Process(rig.child.pid).cpu_times()[:2]) - before < 0.1


def test_an_unreadable_model_is_reported(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = msgspec.structs.replace(CONFIG, model=Model(path=str(tmp_path / "nothing")))
    rig = Rig(run_dir, config)
    assert isinstance(rig.said(), ipc.Failed)
    assert rig.child.wait(DEADLINE_S) == 1
    rig.control.close()
    rig.context.term()
