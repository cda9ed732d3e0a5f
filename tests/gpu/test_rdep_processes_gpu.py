"""RDEP between processes, each with a GPU of its own where there are enough, else on one that they share in turns."""

import functools
import os
import pathlib
import random
import signal
import sys
import time
import traceback
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from nmoe.errors import PeerSilent
from nmoe.messages import CHANNEL_DECODE, ROW_SAMPLES
from nmoe.slab import ControlLayout
from tests.forking import fork_call

BOUND_S = 2.0
DECODES, ROUNDS = 24, 30


def run_node(world_size, folder, rank_main):
    """In a child of the zygote, which has no CUDA: one process per rank. What each ended with, as waitpid says."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    page = ControlLayout(world_size).make()
    pids = []
    for rank in range(world_size):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                rank_main(rank, world_size, page, folder)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        pids.append(pid)
    ends = {}
    while len(ends) < world_size:
        pid, status = os.wait()
        ends[pid] = os.waitstatus_to_exitcode(status)
        if ends[pid] > 0:  # the others would wait for it
            for other in set(pids) - set(ends):
                os.kill(other, signal.SIGKILL)
    (folder / "ends").write_text(repr([ends[pid] for pid in pids]))


def ends_of(tmp_path, world_size, rank_main):
    child = fork_call(run_node, world_size, tmp_path, rank_main, output=tmp_path / "output")
    try:
        assert child.wait(90) == 0
    except TimeoutError:
        raise AssertionError((tmp_path / "output").read_text()) from None
    finally:
        child.end()
    return eval((tmp_path / "ends").read_text()), (tmp_path / "output").read_text()


def exchange_rounds(rank, world_size, page, folder):
    """Sums of random tokens, eager and then replayed; after that the last rank dies within a step."""
    from nmoe.worker.kernels.lists import Routes
    from nmoe.worker.rdep.between_gpus import BetweenGPUs
    from nmoe.worker.rdep.control import Control
    from nmoe.worker.rdep.symmetric import PeerSlabs
    from tests.gpu.ranks import BF16, added, expected_sums, experts_of, make_layout, make_tokens

    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    layout = make_layout(world_size, decodes=DECODES)
    peers = PeerSlabs(layout.slab_bytes, rank, world_size, device, folder / "meeting")
    control = Control(ControlLayout(world_size), page)
    link = BetweenGPUs(layout, peers.slab, peers.bases, control, rank, BF16, expected_rows=64, bound_s=BOUND_S)
    tokens = [make_tokens(DECODES, "uniform", 10 + peer, layout, world_size) for peer in range(world_size)]
    expected = expected_sums(layout, tokens)[rank].to(device)
    (x_TD, routes) = tokens[rank]
    mine = x_TD.to(device), Routes(routes.ids_TK.to(device), routes.weights_TK.to(device))
    assert link.meet(1, lambda: False, bounded=False)
    link.begin(CHANNEL_DECODE, DECODES)

    def step():
        return added(link.dispatch(experts_of(rank), *mine)())

    assert torch.equal(step(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = step()
    # Whoever is first here ends the life before for all.
    assert link.meet(2, lambda: False, bounded=False) and link.meet(3, lambda: False, bounded=True)
    for _ in range(ROUNDS):
        sums.zero_()
        graph.replay()
        assert torch.equal(sums, expected) and link.check()
    if rank == world_size - 1:
        link._push(*mine, link._empty_lists())
        torch.cuda.synchronize()
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    with pytest.raises(PeerSilent) as caught:
        link.check()
    assert caught.value.silent == [world_size - 1]
    assert BOUND_S <= seconds < 2 * BOUND_S, seconds
    sys.stderr.write(f"rank {rank}: left its wait after {seconds:.2f} s\n")
    sys.stderr.flush()
    os._exit(0)  # what is mapped of the dead rank's memory need not be taken apart


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_exchange_and_survive_a_death_within_the_bound(tmp_path, world_size):
    ends, output = ends_of(tmp_path, world_size, exchange_rounds)
    assert ends == [0] * (world_size - 1) + [-signal.SIGKILL], output


def replays(rank, world_size, page, folder, *, quantised):
    """Many steps from a graph, each with other tokens and delays, their rows as long as a model's: what one rank has
    written must be there for the others when its flag is."""
    from nmoe.worker.rdep.between_gpus import BetweenGPUs
    from nmoe.worker.rdep.control import Control
    from nmoe.worker.rdep.symmetric import PeerSlabs
    from tests.gpu import test_rdep_gpu
    from tests.gpu.ranks import BF16, make_layout

    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    steps = 3000 if torch.cuda.device_count() >= world_size else 20  # processes on one GPU take turns of milliseconds
    chance = random.Random(11)
    layout = make_layout(world_size, hidden=7168, top_k=8, decodes=test_rdep_gpu.DECODES, quantised=quantised)
    peers = PeerSlabs(layout.slab_bytes, rank, world_size, device, folder / "meeting")
    control = Control(ControlLayout(world_size), page)
    link = BetweenGPUs(layout, peers.slab, peers.bases, control, rank, BF16, expected_rows=64, bound_s=10 * BOUND_S)
    entries = test_rdep_gpu.stress_entries(layout, world_size, chance)
    plan = [[chance.randrange(len(entries)) for _ in range(test_rdep_gpu.LAYERS)] for _ in range(steps + 8)]
    ends = SimpleNamespace(links={rank: link}, streams={rank: torch.cuda.Stream(device)})
    captured = test_rdep_gpu.CapturedRank(ends, rank, entries, torch.tensor(plan))
    torch.cuda.synchronize()
    assert link.meet(1, lambda: False, bounded=False)
    with torch.cuda.stream(captured.stream):
        captured.run()
    captured.capture()
    assert link.meet(2, lambda: False, bounded=False)
    captured.step.zero_()
    captured.wrong.zero_()
    torch.cuda.synchronize()
    for step in range(steps):
        with torch.cuda.stream(captured.stream):
            captured.graph.replay()
        if step % 100 == 99:
            torch.cuda.synchronize()
            assert link.check(), f"step {step}"
    torch.cuda.synchronize()
    assert link.check() and int(captured.step) == steps and int(captured.wrong) == 0, int(captured.wrong)
    sys.stderr.flush()
    (folder / f"done-{rank}").touch()
    while len(list(folder.glob("done-*"))) < world_size:  # nobody's memory goes before all have read the last rows
        time.sleep(0.01)
    os._exit(0)


@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_what_a_flag_announces_is_there_in_every_replay(tmp_path, world_size, quantised):
    ends, output = ends_of(tmp_path, world_size, functools.partial(replays, quantised=quantised))
    assert ends == [0] * world_size, output


# ----------------------------------------------------------------------------------------------------------- the model


class IdleRunner:
    """Takes the Steps of a rank with work as one without does."""

    def __init__(self, runner):
        self.runner = runner

    def launch(self, step):
        rows = np.frombuffer(step.rows, np.int32).reshape(-1, 4)
        idle = msgspec.structs.replace(step, rows=b"", ids=b"", pages=b"", admits=())
        assert self.runner.launch(idle).tokens() == b""
        return SimpleNamespace(tokens=lambda: bytes(4 * int((rows[:, 3] & ROW_SAMPLES != 0).sum())))


def generate(rank, world_size, page, folder):
    """Greedy tokens of the same prompts on both ranks, kernel by kernel, then from graphs, then with rank 1 idle."""
    from nmoe.checkpoint import open_checkpoint
    from nmoe.config import Config, Engine, Model, Parallel
    from nmoe.worker.cache import make_cache
    from nmoe.worker.model import load_model
    from nmoe.worker.runner import Runner
    from tests.gpu.stepper import Requests
    from tests.gpu.test_engine_gpu import OUTPUT, PAGE, prompts

    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    config = Config(
        Model(path=str(folder / "tiny"), dtype="bfloat16"),
        Parallel(world_size, "cuda"),
        Engine(num_pages=200, page_size=PAGE, max_batch_size=16, max_prefill_tokens=512),
    )
    checkpoint = open_checkpoint(config)
    model = load_model(checkpoint, config, rank, device, lambda *_: None, page, folder / "meeting")
    cache = make_cache(config, checkpoint, device)
    runner = Runner(model, cache, num_slots=16, max_seq_len=checkpoint.max_seq_len)
    outputs = []
    for life, how in enumerate(("eager", "eager, idle", "captured", "captured, idle"), 1):
        assert runner.exchange.meet(life, lambda: False, bounded=False)
        if how == "captured":
            runner.capture(16, 128)
        runner.reset()
        taker = IdleRunner(runner) if rank and "idle" in how else runner
        requests = Requests(taker, prompts(), OUTPUT, page_size=PAGE, num_pages=200)
        outputs.append(requests.generate(OUTPUT, 48))
        torch.cuda.synchronize()
    assert runner.exchange.check()
    (folder / f"tokens-{rank}").write_text(repr(outputs))
    os._exit(0)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_two_ranks_generate_the_tokens_of_one(tmp_path, fp8):
    from tests.checkpoints import make_checkpoint
    from tests.gpu.test_engine_gpu import PAGE, SHAPE, agreement, make_runner
    from tests.gpu.test_engine_gpu import generate as generate_alone

    options = {"q_lora_rank": 128, "qk_rope_head_dim": 64} if fp8 else {"q_lora_rank": 96}
    folder = make_checkpoint(tmp_path / "tiny", fp8=fp8, **{**SHAPE, **options})
    alone = generate_alone(make_runner(folder, PAGE), 48)
    ends, output = ends_of(tmp_path, 2, generate)
    assert ends == [0, 0], output
    first, second = (eval(pathlib.Path(tmp_path / f"tokens-{rank}").read_text()) for rank in (0, 1))
    eager, beside_idle, captured, captured_beside_idle = first
    assert [eager, captured] == [second[0], second[2]], "two ranks with the same prompts"
    assert [eager, captured] == [beside_idle, captured_beside_idle], "whether rank 1 has work"
    for outputs in (eager, captured):
        assert agreement(outputs, alone) > (0.7 if fp8 else 0.85)
