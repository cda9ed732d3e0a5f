"""Memory between the host and the device: a step's inputs go up in one copy, its tokens come down in another.

On the GPU both ends on the host are pinned, so that neither copy is waited for, and are used again when the step's
result has been read; a step whose result nobody reads keeps its own. All steps are launched on one stream, and stages
are used outside inference mode, where nothing can write to what was made within.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


def put(array: Array, device: torch.device) -> torch.Tensor:
    """The array on the device; the host does not wait for it. On the CPU both may share their memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class _Room:
    """Memory on the host, int32, and views of its first words, which are kept until their number changes."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._all = torch.empty(0, dtype=torch.int32)
        self._size = -1

    def take(self, size: int) -> None:
        """From here on, `tensor` and `words` are [size], uninitialised. Memory that is not pinned is new each time: a
        copy from it may share it."""
        if size == self._size and self._pinned:
            return
        if self._all.numel() < size or not self._pinned:
            self._all = torch.empty(max(size, 1), dtype=torch.int32, pin_memory=self._pinned)
        self._size, self.tensor = size, self._all[:size]
        self.words: Array = self.tensor.numpy()


class Stage:
    """What one step in flight needs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        pinned = device.type == "cuda"
        self._up, self._down = _Room(pinned), _Room(pinned)
        self._into = self._there = torch.empty(0, dtype=torch.int32)
        self._event = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.current_stream(device) if pinned else None

    def upload(self, words: Array, into: torch.Tensor | None = None) -> torch.Tensor:
        """The step's words, int32, on the device: where `into` begins, or in memory of their own."""
        size = len(words)
        self._up.take(size)
        self._up.words[:] = words
        if into is None:
            return self._up.tensor.to(self._device, non_blocking=True)
        if into is not self._into or self._there.numel() != size:
            self._into, self._there = into, into[:size]
        return self._there.copy_(self._up.tensor, non_blocking=True)

    def download(self, tokens_S: torch.Tensor) -> None:
        """Bring the tokens down, behind all work on the device so far; the last call of a step."""
        self._down.take(tokens_S.numel())
        self._down.tensor.copy_(tokens_S, non_blocking=True)
        if self._event is not None:
            self._event.record(self._stream)

    def ready(self) -> bool:
        """Whether `tokens` would not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def tokens(self) -> bytes:
        """What was downloaded, int32; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        return self._down.words.tobytes()


class Stages:
    """Those not in use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Stage] = []

    def take(self) -> Stage:
        """One for the next step."""
        return self._free.pop() if self._free else Stage(self._device)

    def put_back(self, stage: Stage) -> None:
        """Its step's result has been read."""
        self._free.append(stage)
