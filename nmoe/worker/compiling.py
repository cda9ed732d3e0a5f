"""Compiling kernels before their first launch, several at a time.

Triton compiles a kernel when it is launched for the first time, so a warm-up compiles its kernels one after another: 80
of them, 46 s, for Moonlight on an H100. Here the warm-up is rehearsed first, to find out which kernels it needs; these
are compiled by threads, and the warm-up itself then finds them all. Triton's compiler runs mostly outside the
interpreter's lock: with two cores, two threads take 0.54 times as long as one. Only making a kernel's first form from
its Python source, a fifth of the time, never overlaps.

In a rehearsal
- no Triton kernel is launched. Triton is asked for it with the arguments of its launch, hence for the same variant, as
  by `JITFunction.warmup`. What it would compile then, it hands to `_Wanted`, which stands where it expects its own
  `triton.AsyncCompileMode` (triton/runtime/_async_compile.py). That one compiles at once, in the order of the launches;
  but ranks that share a cache on disk can share the work, for which each needs the whole list.
- everything else runs as ever: torch's operators, copies, streams, events. What kernels would have written is zero, as
  all new memory is. Zeros are valid ids, positions, pages, slots and tokens, so what indexes by them stays in bounds.
  What comes out means nothing.
- ranks send nothing and wait for nothing, as kernels do both. The exchange is left as it was: its epochs are on the
  device, advanced by kernels. So each rank rehearses by itself, whatever the others do.

So a rehearsal needs a runner that is thrown away afterwards, and must not capture graphs. Weights and cache can be the
real ones: on the GPU, only kernels write the cache. A kernel that a rehearsal misses is compiled at its launch.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_UNINITIALISED = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
}


class ZeroedMemory(TorchFunctionMode):
    """In this context new memory is zero, however Python allocates it."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, then fill what it left uninitialised."""
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in _UNINITIALISED else made


class _Wanted:
    """The kernels that a rehearsal asked for: for each how to compile it, and how to tell Triton of the result."""

    def __init__(self) -> None:
        self.kernels: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {}

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None], *_: object) -> None:
        """Called by Triton for every kernel that this process has not compiled; repeatedly, if it is asked again. Later
        versions also give what takes back a result that this would return; it returns none."""
        self.kernels.setdefault(key, (compile_fn, finalize_fn))


@contextlib.contextmanager
def _asking(wanted: _Wanted) -> Iterator[None]:
    """In this context launches launch nothing; what Triton would compile goes to `wanted`."""
    from triton.runtime._async_compile import active_mode
    from triton.runtime.jit import KernelInterface

    def ask(kernel: Any, grid: Any) -> Any:
        if active_mode.get() is not wanted:  # another thread's launch
            return launch(kernel, grid)
        return lambda *args, **kwargs: kernel.run(*args, grid=grid, warmup=True, **kwargs)

    launch, mode = KernelInterface.__getitem__, active_mode.set(wanted)
    KernelInterface.__getitem__ = ask
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launch
        active_mode.reset(mode)


def compile_kernels(rehearse: Callable[[], None], threads: int, first: float = 0.0) -> int:
    """Rehearse, then compile the kernels that are missing, or load them from the cache on disk; return their number.

    Starts `first` (in [0, 1)) of the way through the list. Ranks that start in different places each compile a part,
    and load the rest, which the others have compiled by then. Raises what the rehearsal or the compiler raises.
    """
    wanted = _Wanted()
    with _asking(wanted), ZeroedMemory():
        rehearse()
    kernels = list(wanted.kernels.values())
    start = int(first * len(kernels))
    kernels = kernels[start:] + kernels[:start]
    with ThreadPoolExecutor(threads, "compiler") as pool:
        compiled = list(pool.map(lambda kernel: kernel[0](), kernels))
    for (_, finalize), kernel in zip(kernels, compiled, strict=True):
        finalize(kernel)
    return len(kernels)
