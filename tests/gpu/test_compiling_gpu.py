"""Compiling ahead of the warm-up: which kernels it finds, and that it leaves everything as it was."""

import gc
import multiprocessing
import os

import pytest
import torch
import triton
import triton.language as tl

from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Engine, Model, Parallel
from nmoe.messages import Sampling
from nmoe.slab import ControlLayout, SlabLayout
from nmoe.worker.cache import make_cache
from nmoe.worker.compiling import compile_kernels
from nmoe.worker.model import load_model
from nmoe.worker.process import _compile, rehearse, warm_up_all
from nmoe.worker.rdep.between_gpus import BetweenGPUs
from nmoe.worker.rdep.control import Control
from nmoe.worker.runner import Runner
from tests.checkpoints import make_checkpoint
from tests.gpu.stepper import Requests
from tests.gpu.test_engine_gpu import GPU, OUTPUT, SHAPE, prompts

MODELS = {
    "bf16": {"q_lora_rank": 96},
    "fp8": {"q_lora_rank": 128, "qk_rope_head_dim": 64, "fp8": True},
    "many heads": {"q_lora_rank": 128, "qk_rope_head_dim": 64, "num_attention_heads": 64, "v_head_dim": 128},
    "only dense layers": {"q_lora_rank": None, "first_k_dense_replace": 4, "num_hidden_layers": 4},
    "only expert layers": {"q_lora_rank": None, "first_k_dense_replace": 0},
}


_pages = []  # the GPU knows them, so none may take the place of another


def open_model(folder, world_size=1):
    config = Config(
        Model(path=str(folder), dtype="bfloat16"),
        Parallel(world_size, "cuda"),
        # With 200 rows, many heads have kernels of their own.
        Engine(num_pages=220, page_size=64, max_batch_size=200, max_prefill_tokens=1024 * world_size),
    )
    return config, open_checkpoint(config)


def listen():
    """The names of the kernels that are compiled from now on, not only loaded."""
    names = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: None if cache_hit else names.append(src.name)
    return names


@pytest.fixture(autouse=True)
def no_listener_is_left():
    yield
    triton.knobs.compilation.listener = None


def forget_kernels():
    """Let this process compile or load every kernel anew."""
    for kernel in [each for each in gc.get_objects() if issubclass(type(each), triton.JITFunction)]:
        kernel.device_caches.clear()


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A cache of compiled kernels that is empty at first."""
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("name", MODELS)
def test_the_warm_up_finds_every_kernel_compiled(tmp_path, monkeypatch, disk, name):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(disk))
    forget_kernels()
    folder = make_checkpoint(tmp_path / "tiny", **{**SHAPE, **MODELS[name]})
    config, checkpoint = open_model(folder)
    model, cache = load_model(checkpoint, config, 0, GPU, lambda *_: None), make_cache(config, checkpoint, GPU)
    runner = Runner(model, cache, num_slots=config.num_slots, max_seq_len=checkpoint.max_seq_len)
    names = listen()
    count = _compile(model, cache, config, checkpoint.max_seq_len, 0)
    compiled = len(names)
    assert compiled <= count > 20
    assert not cache.rows_LNSC.any() and not cache.routing_NSLK.any()
    warm_up_all(runner, cache, config, checkpoint.max_seq_len)
    assert names[compiled:] == []
    assert _compile(model, cache, config, checkpoint.max_seq_len, 0) == 0
    forget_kernels()  # as in the next process, which finds them on disk
    assert _compile(model, cache, config, checkpoint.max_seq_len, 0) == count
    assert names[compiled:] == []


def test_tokens_are_those_of_a_worker_that_did_not_compile_ahead(tmp_path):
    folder, outputs = make_checkpoint(tmp_path / "tiny", **SHAPE, q_lora_rank=96), []
    for ahead in (False, True):
        forget_kernels()
        config, checkpoint = open_model(folder)
        model, cache = load_model(checkpoint, config, 0, GPU, lambda *_: None), make_cache(config, checkpoint, GPU)
        runner = Runner(model, cache, num_slots=config.num_slots, max_seq_len=checkpoint.max_seq_len)
        assert not ahead or _compile(model, cache, config, checkpoint.max_seq_len, 0) > 0
        warm_up_all(runner, cache, config, checkpoint.max_seq_len)
        sampling = [Sampling(temperature=float(slot % 2), seed=slot) for slot in range(len(prompts()))]
        requests = Requests(runner, prompts(), OUTPUT, page_size=64, num_pages=200, sampling=sampling)
        outputs.append(requests.generate(OUTPUT, 48))
    assert outputs[0] == outputs[1]


def test_a_rank_compiles_without_the_others_and_leaves_the_exchange_as_it_was(tmp_path, monkeypatch):
    """Nothing is sent and nobody is waited for: the only other rank does not exist."""
    folder = make_checkpoint(tmp_path / "tiny", **SHAPE, q_lora_rank=96)
    config, checkpoint = open_model(folder, world_size=2)
    layout = SlabLayout.of(checkpoint.architecture, "bfloat16", config)
    slabs = [torch.zeros(layout.slab_bytes, dtype=torch.uint8, device=GPU) for _ in range(2)]
    page = ControlLayout(2).make()
    _pages.append(page)
    control = Control(ControlLayout(2), page)
    bases = [slab.data_ptr() for slab in slabs]
    link = BetweenGPUs(layout, slabs[0], bases, control, 0, torch.bfloat16, expected_rows=32, bound_s=4.0)
    monkeypatch.setattr("nmoe.worker.model._exchange", lambda *_: link)
    model, cache = load_model(checkpoint, config, 0, GPU, lambda *_: None), make_cache(config, checkpoint, GPU)
    before = link._state.clone(), bytes(page)
    assert _compile(model, cache, config, checkpoint.max_seq_len, 0) > 0
    torch.cuda.synchronize()
    assert torch.equal(link._state, before[0]) and bytes(page) == before[1]
    assert not any(slab.any() for slab in slabs)


@triton.jit
def _broken_kernel(x_ptr):
    tl.static_assert(False, "broken on purpose")


@triton.jit
def _one_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def test_an_error_of_the_compiler_is_raised_and_launches_launch_again():
    x = torch.zeros(1, device=GPU)
    with pytest.raises(triton.compiler.CompilationError, match="broken on purpose"):
        compile_kernels(lambda: _broken_kernel[(1,)](x), threads=2)
    _one_kernel[(1,)](x)
    assert x.item() == 1


def _share(rank, folder, barrier, counts):
    os.environ["TRITON_CACHE_DIR"] = str(folder / "kernels")
    config, checkpoint = open_model(folder / "tiny")
    model, cache = load_model(checkpoint, config, 0, GPU, lambda *_: None), make_cache(config, checkpoint, GPU)
    names = listen()

    def rehearse_and_meet():
        rehearse(model, cache, config, checkpoint.max_seq_len)
        barrier.wait(300)

    counts[rank] = compile_kernels(rehearse_and_meet, 2, rank / 2), len(names)


def test_ranks_share_the_work(tmp_path):
    make_checkpoint(tmp_path / "tiny", **SHAPE, q_lora_rank=96)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager:
        counts, barrier = manager.dict(), spawn.Barrier(2)
        ranks = [spawn.Process(target=_share, args=(rank, tmp_path, barrier, counts)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        (kernels, first), (same, second) = counts[0], counts[1]
    assert kernels == same <= first + second < 1.5 * kernels
