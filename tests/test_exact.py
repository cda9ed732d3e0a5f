"""The exact class on the CPU: a request's bits do not depend on its company, its chunks, its prefix or its rank."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Engine, Model, Parallel
from nmoe.config_json import read_architecture
from nmoe.messages import CHANNEL_PREFILL, Sampling
from nmoe.profiles import Numerics
from nmoe.slab import SlabLayout, make_slabs
from nmoe.worker.batch import KVCache
from nmoe.worker.kernels import exact, experts, ops_for, rope, router
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.model import load_model
from nmoe.worker.runner import Runner
from tests.checkpoints import make_checkpoint
from tests.forking import fork_call
from tests.gpu.stepper import Requests
from tests.stepping import PAGE, Sequence, Stepper
from tests.test_rdep_model import fork_ranks

CPU = torch.device("cpu")
EXACT = Numerics.EXACT
VARIANTS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "fp8, expanded": {"dtype": torch.bfloat16, "fp8": True, "num_attention_heads": 3, "v_head_dim": 17},
}
LENGTHS = (37, 1, 64, 5, 90, 18, 33)
PROMPTS = [torch.from_numpy(np.random.default_rng(length).integers(6, 500, length)) for length in LENGTHS]


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request, tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("exact"), **VARIANTS[request.param])
    config = Config(model=Model(path=str(folder)), parallel=Parallel(world_size=1, device="cpu"))
    return load_model(open_checkpoint(config), config, 0, CPU, lambda *_: None)


def compute(model, stepper, rows, decodes=0, numerics=EXACT):
    """Hidden states and logits of each row's tokens."""
    hidden_TD = model.forward(stepper.batch(rows, decodes=decodes), stepper.cache, numerics)
    both = torch.cat((hidden_TD.float(), model.logits(hidden_TD, numerics)), -1)
    return both.split([count for _, count in rows])


def alone(model, tokens, numerics=EXACT):
    """A prompt in one step, on pages of its own."""
    stepper = Stepper(model.architecture, dtype=model.dtype)
    return compute(model, stepper, [(stepper.add(tokens), len(tokens))], numerics=numerics)[0]


@pytest.fixture(scope="module")
def expected(model):
    return [alone(model, prompt) for prompt in PROMPTS]


@settings(derandomize=True, deadline=None, max_examples=6)
@given(st.integers(0, 2**32))
def test_any_company_any_chunks_any_prefix(model, expected, seed):
    """Random steps over prompts that come and go; some begin on the cached pages of one like them."""
    dice = random.Random(seed)
    stepper = Stepper(model.architecture, num_pages=400, dtype=model.dtype)
    waiting = [number for number in range(len(PROMPTS)) for _ in range(2)]
    dice.shuffle(waiting)
    running, cached = [], {}
    while waiting or running:
        while waiting and dice.random() < 0.6:
            number = waiting.pop()
            sequence = stepper.add(PROMPTS[number])
            if number in cached and (full := (len(PROMPTS[number]) - 1) // PAGE):
                shared = dice.randint(1, full)
                sequence = Sequence(sequence.tokens, cached[number][:shared] + sequence.pages[shared:], shared * PAGE)
            running.append((number, sequence))
        going = [item for item in running if dice.random() < 0.8]
        single = [item for item in going if dice.random() < 0.3]
        rows = [(sequence, 1) for _, sequence in single]
        for item in going:
            if item not in single:
                left = len(item[1].tokens) - item[1].computed
                rows.append((item[1], dice.randint(1, min(left, 2 ** dice.randint(0, 7)))))
        firsts = [sequence.computed for sequence, _ in rows]
        parts = compute(model, stepper, rows, decodes=len(single)) if rows else []
        numbers = [number for number, _ in single] + [item[0] for item in going if item not in single]
        for number, first, part in zip(numbers, firsts, parts, strict=True):
            assert torch.equal(part, expected[number][first : first + len(part)]), f"prompt {number} from {first}"
        for number, sequence in [item for item in running if item[1].computed == len(item[1].tokens)]:
            cached[number] = sequence.pages
        running = [item for item in running if item[1].computed < len(item[1].tokens)]


def test_the_fast_class_is_close_and_would_fail(model, expected):
    """The same function; but its bits depend on the chunks, or these tests would prove nothing."""
    bound, alike = 0.2 if model.dtype == torch.bfloat16 else 1e-5, []
    for exactly, prompt in zip(expected, PROMPTS, strict=True):
        fast = alone(model, prompt, Numerics.FAST)
        assert (fast - exactly).norm() < bound * exactly.norm()
        stepper = Stepper(model.architecture, dtype=model.dtype)
        sequence, chunks = stepper.add(prompt), []
        while left := len(prompt) - sequence.computed:
            chunks += compute(model, stepper, [(sequence, min(5, left))], numerics=Numerics.FAST)
        alike.append(torch.equal(fast, torch.cat(chunks)))
    assert not all(alike)


def test_sampled_tokens_through_the_runner(model):
    """Beside others, after a reset, and preempted: the outputs so far come back as a part of the prompt."""
    a = model.architecture
    cache = KVCache(torch.zeros(a.num_layers, 81, 8, a.cache_dim, dtype=model.dtype))
    runner = Runner(model, cache, num_slots=8, max_seq_len=256)
    prompts, output = [PROMPTS[number].numpy() for number in (0, 1, 3, 5)], 10
    sampling = [Sampling(temperature=1.0, seed=number) for number in range(len(prompts))]

    def generate(numbers, chunk, past=0, outputs=None):
        runner.reset()
        whole = [np.concatenate((prompts[n], (outputs[n] if outputs else [])[:past])) for n in numbers]
        chosen = [sampling[n] for n in numbers]
        requests = Requests(runner, whole, output - past, page_size=8, num_pages=80, sampling=chosen, numerics=EXACT)
        return requests.generate(output - past, chunk)

    by_itself = [generate([number], 1000)[0] for number in range(len(prompts))]
    assert generate(range(len(prompts)), 7) == by_itself
    assert generate([3, 1, 0, 2], 1000) == [by_itself[number] for number in (3, 1, 0, 2)]
    for past in (1, 6):
        assert generate(range(len(prompts)), 9, past, by_itself) == [tokens[past:] for tokens in by_itself]


# -------------------------------------------------------------------------------------------------------- several ranks

CHUNKS = {"together": (5, 20, 64), "alone": (64,)}


def scenes(world_size):
    """Which prompts each rank computes, how they are chunked: all of them at once, then each alone on some rank."""
    placed = {number: (5 * number + 1) % world_size for number in range(len(PROMPTS))}
    yield placed, "together"
    for number in range(len(PROMPTS)):
        yield {number: (placed[number] + 1) % world_size}, "alone"


def compute_scenes(config, folder):
    checkpoint, world_size = open_checkpoint(config), config.parallel.world_size
    slabs = make_slabs(SlabLayout.of(checkpoint.architecture, checkpoint.dtype, config))

    @torch.inference_mode()
    def rank_main(rank):
        torch.set_num_threads(1)
        model = load_model(checkpoint, config, rank, CPU, lambda *_: None, slabs)
        assert model.exchange.meet(1, lambda: False, bounded=False)
        outputs = []
        for placed, how in scenes(world_size):
            stepper = Stepper(model.architecture, num_pages=200, dtype=model.dtype)
            mine = {number: stepper.add(PROMPTS[number]) for number, owner in placed.items() if owner == rank}
            parts = {number: [] for number in mine}
            for upto in (*CHUNKS[how], 1000):
                rows = [(s, min(upto, len(s.tokens)) - s.computed) for s in mine.values() if s.computed < len(s.tokens)]
                rows = [(s, count) for s, count in rows if count > 0]
                model.exchange.begin(CHANNEL_PREFILL, 256)
                numbers = [number for number, s in mine.items() if any(s is row for row, _ in rows)]
                for number, part in zip(numbers, compute(model, stepper, rows), strict=True):
                    parts[number].append(part)
            outputs.append({number: torch.cat(tensors) for number, tensors in parts.items()})
        assert model.exchange.check()
        torch.save(outputs, folder / f"{rank}.pt")

    return fork_ranks(world_size, rank_main)


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_company_on_any_rank(world_size, tmp_path):
    folder = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    config = Config(
        model=Model(path=str(folder)),
        parallel=Parallel(world_size=world_size, device="cpu"),
        engine=Engine(page_size=8, num_pages=100, max_batch_size=8, max_prefill_tokens=256 * world_size),
    )
    child = fork_call(compute_scenes, config, tmp_path, output=tmp_path / "output")
    assert child.wait(100) == 0, (tmp_path / "output").read_text()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    merged = [dict(itertools.chain(*(one.items() for one in scene))) for scene in zip(*ranks, strict=True)]
    together, *singles = merged
    for number, single in enumerate(singles):
        assert list(single) == [number]
        assert torch.equal(single[number], together[number]), f"prompt {number}"


# ------------------------------------------------------------------------------------------------------- the operations


def test_every_operation_is_its_reference():
    torch.manual_seed(1)
    x, weight, gain = torch.randn(9, 44), torch.randn(30, 44), torch.rand(44)
    close = torch.testing.assert_close
    close(exact.linear(x, weight), F.linear(x, weight))
    close(exact.rms_norm(x, gain, 1e-6), F.rms_norm(x, (44,), gain, 1e-6))
    close(exact.silu_mul(x), experts.silu_mul(x))
    close(exact.apply_rope(x, x.cos(), x.sin()), rope.apply_rope(x, x.cos(), x.sin()))
    ids, weights = torch.randint(0, 4, (9, 3)), torch.rand(9, 3)  # 3 stands for an expert elsewhere
    gate_up, down = torch.randn(3, 20, 44) * 0.2, torch.randn(3, 44, 10) * 0.2
    routes = Routes(ids, weights)
    close(exact.grouped_mlp(x, routes, gate_up, down), experts.grouped_mlp(x, routes, gate_up, down))


def test_the_router_is_its_reference(tmp_path):
    architecture = read_architecture(make_checkpoint(tmp_path))
    x, weight, bias = torch.randn(50, 64), torch.randn(8, 64), torch.randn(8) * 0.1
    torch.testing.assert_close(exact.route(x, weight, bias, architecture), router.route(x, weight, bias, architecture))


@pytest.mark.parametrize("width", [1, 7, 16, 31, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_all_begin_alike(width, dtype):
    for x in (torch.randn(5, width + 3, dtype=dtype)[:, 2 : 2 + width], torch.randn(1, width, dtype=dtype)):
        rows = exact.aligned_rows(x)
        assert torch.equal(torch.cat(rows), x)
        assert {row.data_ptr() % 64 for row in rows} == {0}
        assert len({row.stride() for row in rows + exact.aligned_rows(torch.randn(3, width, dtype=dtype))}) == 1


def test_no_rows_at_all():
    """An idle rank goes through the layers too."""
    ops, nothing = ops_for(CPU, EXACT), torch.empty(0, 64)
    assert ops.linear(nothing, torch.randn(5, 64)).shape == (0, 5)
    assert ops.silu_mul(nothing).shape == (0, 32)
    assert ops.add_rms_norm(nothing, nothing, torch.ones(64), 1e-6)[1].shape == (0, 64)
    routes = Routes(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert ops.grouped_mlp(nothing, routes, torch.randn(2, 8, 64), torch.randn(2, 64, 4)).shape == (0, 64)
