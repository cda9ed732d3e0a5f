"""Kernels compiled before their first launch. Triton's part is imitated: a launch compiles what has not been compiled,
or hands it to the active mode."""

import contextvars
import sys
import threading
import types

import pytest
import torch

from nmoe.config import Config
from nmoe.worker.compiling import ZeroedMemory, compile_kernels
from nmoe.worker.process import _compile


@pytest.fixture
def triton(monkeypatch):
    mode = contextvars.ContextVar("mode", default=None)

    class KernelInterface:
        def __getitem__(self, grid):
            return lambda *args, **options: self.run(*args, grid=grid, warmup=False, **options)

    class Kernel(KernelInterface):
        def __init__(self, name):
            self.name, self.compiled, self.launched, self.threads, self.broken = name, {}, [], [], False

        def run(self, *args, grid, warmup, **options):
            key = f"{self.name} {args} {options}"
            if key not in self.compiled:
                compiler = mode.get()
                if compiler is not None:
                    return compiler.submit(
                        key, lambda: self.compile(key), lambda code: self.compiled.update({key: code})
                    )
                self.compiled[key] = self.compile(key)
            if not warmup:
                self.launched.append((grid, args))
            return self.compiled[key]

        def compile(self, key):
            assert mode.get() is None  # a thread has a context of its own
            if self.broken:
                raise ZeroDivisionError(key)
            self.threads.append(threading.current_thread())
            return key.upper()

    modules = {"jit": {"KernelInterface": KernelInterface}, "_async_compile": {"active_mode": mode}}
    for name, attributes in modules.items():
        monkeypatch.setitem(sys.modules, f"triton.runtime.{name}", types.SimpleNamespace(**attributes))
    for name in ("triton", "triton.runtime"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return types.SimpleNamespace(Kernel=Kernel, mode=mode)


def test_a_rehearsal_launches_nothing_and_the_kernels_are_compiled_then(triton):
    one, other = triton.Kernel("one"), triton.Kernel("other")

    def steps():
        for size in (1, 2, 1):
            one[(size,)](size, num_warps=4)
            other[(1,)]("x")

    assert compile_kernels(steps, threads=2) == 3
    assert not one.launched and not other.launched
    assert threading.main_thread() not in one.threads + other.threads
    compiled = len(one.threads) + len(other.threads)
    steps()
    assert one.launched == [((1,), (1,)), ((2,), (2,)), ((1,), (1,))] and len(other.launched) == 3
    assert len(one.threads) + len(other.threads) == compiled == 3


def test_what_is_compiled_already_is_not_asked_for(triton):
    kernel = triton.Kernel("kernel")
    kernel[(1,)](1)
    assert compile_kernels(lambda: kernel[(1,)](1), threads=1) == 0
    assert len(kernel.launched) == 1


def test_ranks_start_in_different_places(triton):
    orders = []
    for rank in range(4):
        kernel = triton.Kernel("kernel")
        compile_kernels(lambda kernel=kernel: [kernel[(1,)](size) for size in range(8)], 1, rank / 4)
        orders.append([int(key.split("(")[1][0]) for key in kernel.compiled])
    assert orders == [[*range(start, 8), *range(start)] for start in (0, 2, 4, 6)]


def test_an_error_in_the_rehearsal_leaves_everything_as_it_was(triton):
    kernel = triton.Kernel("kernel")
    with pytest.raises(ZeroDivisionError):
        compile_kernels(lambda: kernel[(1,)](1 // 0), threads=1)
    assert triton.mode.get() is None
    kernel[(1,)](1)
    assert len(kernel.launched) == 1


def test_an_error_of_the_compiler_is_raised(triton):
    kernel = triton.Kernel("kernel")
    kernel.broken = True
    with pytest.raises(ZeroDivisionError, match="kernel"):
        compile_kernels(lambda: kernel[(1,)](1), threads=2)
    assert triton.mode.get() is None and not kernel.compiled


@pytest.mark.parametrize("inference", [False, True])
def test_new_memory_is_zero(inference):
    like = torch.ones(64, 64)
    with ZeroedMemory(), torch.inference_mode(inference):
        made = [
            torch.empty(64, 64),
            torch.empty(64, 64, dtype=torch.int32),
            torch.empty(64, 64, dtype=torch.float8_e4m3fn),
            torch.empty(0),
            torch.empty_like(like),
            torch.empty_like(like, dtype=torch.bfloat16),
            torch.empty_strided((64, 64), (1, 64)),
            like.new_empty(64, 64),
            like.new_empty((64, 64), dtype=torch.int64),
            like.new_empty_strided((64, 64), (64, 1)),
        ]
        sums = [int(tensor.float().abs().sum()) for tensor in made]
        assert made[1].numpy().sum() == 0 and made[1].tolist()[0][0] == 0
        assert torch.full((3,), 2.0).sum() == 6 and torch.cat((like, like)).sum() == 2 * 64 * 64
    assert sums == [0] * len(made)


def test_memory_is_as_ever_afterwards():
    calls = []

    class Watched(ZeroedMemory):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    with Watched():
        torch.empty(3)
    torch.empty(3)
    assert calls == [torch.empty]


def test_other_threads_launch_during_a_rehearsal(triton):
    kernel = triton.Kernel("one")

    def rehearse():
        other = threading.Thread(target=lambda: kernel[(2,)](2))
        other.start()
        other.join()
        kernel[(1,)](1)

    assert compile_kernels(rehearse, 1) == 1
    assert kernel.launched == [((2,), (2,))]


@pytest.mark.parametrize("missing", ["active_mode", "submit"])
def test_an_unknown_triton_makes_a_start_slower_and_not_impossible(triton, monkeypatch, caplog, missing):
    kernel = triton.Kernel("one")
    if missing == "active_mode":
        monkeypatch.setitem(sys.modules, "triton.runtime._async_compile", types.SimpleNamespace())
    else:
        monkeypatch.delattr("nmoe.worker.compiling._Wanted.submit")
    monkeypatch.setattr("nmoe.worker.process.rehearse", lambda *_: kernel[(1,)](1))
    assert _compile(None, None, Config(), 16, 0) == 0
    assert "compiled one by one" in caplog.text
    kernel[(1,)](1)
    assert kernel.launched == [((1,), (1,))]
