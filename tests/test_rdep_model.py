"""Several ranks compute what one computes: the model's logits, and real worker processes driven by Steps."""

import functools
import os
import select
import sys
import time
import traceback

import msgspec
import numpy as np
import pytest
import torch
import zmq

from nmoe import ipc
from nmoe.checkpoint import open_checkpoint
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
    WorkerToScheduler,
)
from nmoe.metrics import Board
from nmoe.profiles import Numerics
from nmoe.slab import SlabLayout, make_slabs
from nmoe.worker import process
from nmoe.worker.model import load_model
from nmoe.worker.rdep.shared_memory import SharedMemory
from tests.forking import fork_call
from tests.stepping import Stepper

PAGES, PAGE, BATCH = 24, 8, 4
CPU = torch.device("cpu")


def config_of(checkpoint, world_size):
    return Config(
        model=Model(path=str(checkpoint)),
        parallel=Parallel(world_size=world_size, device="cpu"),
        engine=Engine(page_size=PAGE, num_pages=PAGES, max_batch_size=BATCH, max_prefill_tokens=32 * world_size),
    )


def slabs_for(config):
    checkpoint = open_checkpoint(config)
    return make_slabs(SlabLayout.of(checkpoint.architecture, checkpoint.dtype, config))


def fork_ranks(world_size, rank_main):
    """In a child of the zygote: one process per rank; gives how many failed."""
    pids = []
    for rank in range(world_size):
        if (pid := os.fork()) == 0:
            try:
                rank_main(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        pids.append(pid)
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


# ----------------------------------------------------------------------------------------------------------- the model

PROMPTS = [[(11 * i + 5 * j) % 300 for j in range(3 + 6 * i)] for i in range(5)]
RANKS = {1: [0, 0, 0, 0, 0], 2: [0, 1, 1, 0, 1], 4: [0, 3, 3, 0, 1], 8: [7, 0, 1, 3, 3]}  # which rank has which prompt


def compute_logits(config, folder):
    """Each rank's prompts in two chunks and a decode step; logits of the last tokens by prompt, in `folder`."""
    world_size, slabs = config.parallel.world_size, slabs_for(config)

    @torch.inference_mode()
    def rank_main(rank):
        torch.set_num_threads(1)
        model = load_model(open_checkpoint(config), config, rank, CPU, lambda *_: None, slabs)
        assert model.exchange.meet(1, lambda: False, bounded=False)
        stepper = Stepper(model.architecture)
        sequences = {i: stepper.add(ids) for i, ids in enumerate(PROMPTS) if RANKS[world_size][i] == rank}
        logits = {i: [] for i in sequences}
        for part in ("half", "most", "last"):
            channel = CHANNEL_DECODE if part == "last" else CHANNEL_PREFILL
            rows = []
            for i, sequence in sequences.items():
                until = {"half": len(PROMPTS[i]) // 2, "most": len(PROMPTS[i]) - 1, "last": len(PROMPTS[i])}[part]
                rows.append((sequence, until - sequence.computed))
            batch = stepper.batch(rows, decodes=len(rows) if part == "last" else 0)
            model.exchange.begin(channel, BATCH if part == "last" else 32)
            hidden_TD = model.forward(batch, stepper.cache, Numerics.FAST)
            for i, stop in zip(sequences, batch.starts[1:], strict=True):
                logits[i].append(model.logits(hidden_TD[stop - 1 : stop], Numerics.FAST))
        assert model.exchange.check()
        torch.save({i: torch.cat(rows) for i, rows in logits.items()}, folder / f"{rank}.pt")

    return fork_ranks(world_size, rank_main)


def logits_of(checkpoint, world_size, folder):
    """Logits of every prompt, [3, V] each."""
    folder.mkdir()
    child = fork_call(compute_logits, config_of(checkpoint, world_size), folder, output=folder / "output")
    assert child.wait(60) == 0, (folder / "output").read_text()
    by_prompt = {}
    for rank in range(world_size):
        by_prompt |= torch.load(folder / f"{rank}.pt")
    return [by_prompt[i] for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def one_rank(checkpoint, tmp_path_factory):
    return logits_of(checkpoint, 1, tmp_path_factory.mktemp("logits") / "one")


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_logits_are_those_of_one_rank_and_the_same_bits_every_time(checkpoint, one_rank, tmp_path, world_size):
    first, second = (logits_of(checkpoint, world_size, tmp_path / name) for name in ("first", "second"))
    for ours, again, alone in zip(first, second, one_rank, strict=True):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- workers

LIFE = 3  # the workers' generation


def run_workers(config, run_dir, controls, bound_s):
    """In a child of the zygote: what the launcher's children do, with `bound_s` for waits."""
    SharedMemory.__init__.__kwdefaults__["bound_s"] = bound_s
    slabs = slabs_for(config)

    def rank_main(rank):
        board = Board(2 + config.parallel.world_size)
        boot = ipc.Boot("worker", rank, LIFE, config, run_dir, controls[rank], board, slabs=slabs)
        ipc.settle_in(boot)
        try:
            process.main(boot)
        except NmoeError as error:
            controls[rank].send(ipc.Failed(str(error)))
            raise

    return fork_ranks(config.parallel.world_size, rank_main)


class Workers:
    """All ranks' processes, with the test as their launcher and scheduler."""

    def __init__(self, config, run_dir, router, bound_s=20.0):
        self.world_size = config.parallel.world_size
        pairs = [ipc.Control.pair() for _ in range(self.world_size)]
        self.controls = [ours for ours, _ in pairs]
        self.log = run_dir / "workers.log"
        args = (config, run_dir, [theirs for _, theirs in pairs], bound_s)
        self.child = fork_call(run_workers, *args, output=self.log)
        for _, theirs in pairs:
            theirs.close()
        self._router = router
        self._decoder = msgspec.msgpack.Decoder(WorkerToScheduler)
        self._step_id = 0
        self.generation = 1

    def receive(self):
        """One message from each rank, in the order of ranks."""
        messages = {}
        while len(messages) < self.world_size:
            assert self._router.poll(30_000), self.log.read_text()
            peer, data = self._router.recv_multipart()
            assert peer not in messages
            messages[peer] = self._decoder.decode(data)
        return [messages[ipc.identity(rank)] for rank in range(self.world_size)]

    def ready(self):
        assert self.receive() == [Ready(LIFE, rank, PAGES) for rank in range(self.world_size)]

    def step(self, channel, num_tokens, rows, only=None):
        """Send one Step to every rank, or to those in `only`; `rows` maps a rank to its Step's further fields."""
        self._step_id += 1
        for rank in range(self.world_size) if only is None else only:
            fields = rows.get(rank, {"rows": b""})
            step = Step(self.generation, self._step_id, Numerics.FAST, channel, num_tokens, **fields)
            self._router.send_multipart([ipc.identity(rank), msgspec.msgpack.encode(step)])

    def prefill(self, prompts, only=None):
        """Slot 0 of each rank in `prompts` begins that prompt."""
        rows = {
            rank: {
                "rows": np.array([0, 0, len(prompt), ROW_SAMPLES | ROW_HAS_IDS], np.int32).tobytes(),
                "ids": np.array(prompt, np.int32).tobytes(),
                "pages": np.array([(0, page) for page in range(6)], np.int32).tobytes(),
                "admits": (Admit(0, 0, Sampling(temperature=0.0)),),
            }
            for rank, prompt in prompts.items()
        }
        self.step(CHANNEL_PREFILL, max(map(len, prompts.values())), rows, only)

    def generate(self, prompts, count):
        """Greedy tokens of one prompt per rank; the ranks without one are idle."""
        self.prefill(prompts)
        outputs = {rank: [] for rank in prompts}
        for number in range(count):
            for rank, done in enumerate(self.receive()):
                tokens = np.frombuffer(done.tokens, np.int32).tolist()
                assert len(tokens) == (rank in prompts)
                if rank in prompts:
                    outputs[rank] += tokens
            if number < count - 1:
                rows = {
                    rank: {"rows": np.array([0, len(prompt) + number, 1, ROW_SAMPLES], np.int32).tobytes()}
                    for rank, prompt in prompts.items()
                }
                self.step(CHANNEL_DECODE, 1, rows)
        return outputs

    def hang_up(self):
        for control in self.controls:
            control.close()
        return self.child.wait()


@pytest.fixture
def start(tmp_path, checkpoint):
    """Starts the workers of a world; they are gone after the test."""
    running = []
    with zmq.Context() as context, ipc.bind_router(context, ipc.worker_address(tmp_path)) as router:

        def start(world_size, **options):
            running.append(Workers(config_of(checkpoint, world_size), tmp_path, router, **options))
            return running[-1]

        yield start
        for workers in running:
            for control in workers.controls:
                control.close()
            workers.child.end()


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """Greedy tokens of a prompt at world size 1."""
    folder = tmp_path_factory.mktemp("alone")
    with zmq.Context() as context, ipc.bind_router(context, ipc.worker_address(folder)) as router:
        worker = Workers(config_of(checkpoint, 1), folder, router)
        worker.ready()
        yield functools.cache(lambda number: worker.generate({0: PROMPTS[number]}, 8)[0])
        assert worker.hang_up() == 0


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_give_the_tokens_of_one_worker(start, alone, world_size):
    workers = start(world_size)
    workers.ready()
    for placed in ({0: 3, world_size - 1: 1}, {1: 2}):  # rank -> prompt
        outputs = workers.generate({rank: PROMPTS[number] for rank, number in placed.items()}, 8)
        assert outputs == {rank: alone(number) for rank, number in placed.items()}
    assert workers.hang_up() == 0


def test_a_step_that_only_some_ranks_got_when_the_scheduler_died_is_void(start, alone):
    workers = start(4)
    workers.ready()
    prompts = {0: PROMPTS[3], 2: PROMPTS[4]}
    workers.generate(prompts, 3)
    workers.prefill(prompts, only=(0, 2, 3))
    time.sleep(0.3)  # they wait for rank 1 now
    died = time.monotonic()
    for control in workers.controls:
        control.send(ipc.Gone("scheduler", 0, 1))
    workers.ready()  # and nothing else came
    assert time.monotonic() - died < 10.0, "nobody waits for the bound of 20 s"
    workers.generation = 2
    assert workers.generate(prompts, 8) == {0: alone(3), 2: alone(4)}
    assert workers.hang_up() == 0


@pytest.mark.parametrize("steps", [0, 2])
def test_a_worker_that_waits_in_vain_ends_and_names_the_silent_one(start, steps):
    workers = start(2, bound_s=0.5)
    workers.ready()
    if steps:
        workers.generate({0: PROMPTS[1]}, steps)
    workers.prefill({0: PROMPTS[1]}, only=(0,))
    said = None
    while not isinstance(said, ipc.Failed):
        assert select.select([workers.controls[0]], [], [], 30)[0]
        said = workers.controls[0].receive()
    assert said.message.startswith("worker 0: nothing came from worker 1 within")
    workers.controls[1].close()
    assert workers.child.wait() == 1
