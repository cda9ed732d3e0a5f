"""Staging memory between host and device: a step's inputs are uploaded in one copy, its tokens downloaded in another.

On the GPU the host ends are pinned, so neither copy blocks, and are reused once the step's result has been read; a step
whose result is never read keeps its own. All steps are launched on one stream. Stages are used outside inference mode,
because tensors created inside it cannot be written outside.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


def put(array: Array, device: torch.device) -> torch.Tensor:
    """Copy an array to the device without blocking the host. On the CPU both may share memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    from nmoe.worker.kernels.copies_triton import copy_words

    copy_words(source, target)


class _Room:
    """Host memory, int32, and views of its first words, which are kept until their number changes."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._all = torch.empty(0, dtype=torch.int32)
        self._size = -1

    def take(self, size: int) -> None:
        """Make `tensor` and `words` [size], uninitialised. Unpinned memory is allocated anew each time, because a copy
        may share it."""
        if size == self._size and self._pinned:
            return
        if self._all.numel() < size or not self._pinned:
            self._all = torch.empty(max(size, 1), dtype=torch.int32, pin_memory=self._pinned)
        self._size, self.tensor = size, self._all[:size]
        self.words: Array = self.tensor.numpy()


class Stage:
    """The staging memory of one step in flight."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        pinned = device.type == "cuda"
        self._up, self._down = _Room(pinned), _Room(pinned)
        self._into = self._there = torch.empty(0, dtype=torch.int32)
        self._event = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.current_stream(device) if pinned else None

    def upload(self, words: Array, into: torch.Tensor | None = None, *, by_kernel: bool = False) -> torch.Tensor:
        """Upload the step's int32 words, to the start of `into` or to new memory. Returns them on the device.
        `by_kernel`: on the GPU, without its copy engine (copies_triton.py)."""
        size = len(words)
        self._up.take(size)
        self._up.words[:] = words
        if into is None:
            return self._up.tensor.to(self._device, non_blocking=True)
        if into is not self._into or self._there.numel() != size:
            self._into, self._there = into, into[:size]
        if by_kernel and self._event is not None:
            _copy(self._up.tensor, self._there)
        else:
            self._there.copy_(self._up.tensor, non_blocking=True)
        return self._there

    def download(self, tokens_S: torch.Tensor) -> None:
        """Download the tokens, after all work on the device so far. This must be the step's last call."""
        self._down.take(tokens_S.numel())
        if self._event is None:
            self._down.tensor.copy_(tokens_S)
        else:
            _copy(tokens_S, self._down.tensor)
            self._event.record(self._stream)

    def ready(self) -> bool:
        """Whether `tokens` would return without waiting."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def tokens(self) -> bytes:
        """The downloaded tokens, int32; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        return self._down.words.tobytes()


class Stages:
    """The stages not in use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Stage] = []

    def take(self) -> Stage:
        """A stage for the next step."""
        return self._free.pop() if self._free else Stage(self._device)

    def put_back(self, stage: Stage) -> None:
        """Return a stage whose step's result has been read."""
        self._free.append(stage)
