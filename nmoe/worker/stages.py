"""Memory between the host and the device: a step's inputs go up in one copy, its tokens come down in another.

On the GPU both ends on the host are pinned, so that neither copy is waited for, and are used again when the step's
result has been read; a step whose result nobody reads keeps its own.
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


class Stage:
    """What one step in flight needs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._up = self._down = torch.empty(0, dtype=torch.int32)
        self._words = self._up.numpy()
        self._event = torch.cuda.Event() if self._pinned else None  # type: ignore[no-untyped-call]

    def words(self, size: int) -> Array:
        """Room for the step's inputs, int32 [size], uninitialised."""
        if len(self._up) < size or not self._pinned:
            self._up = self._room(size)
            self._words = self._up.numpy()
        self._size = size
        return self._words[:size]

    def upload(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """The words on the device: where `into` begins, or in memory of their own."""
        words = self._up[: self._size]
        if into is None:
            return words.to(self._device, non_blocking=True)
        return into[: self._size].copy_(words, non_blocking=True)

    def download(self, tokens_S: torch.Tensor) -> None:
        """Bring the tokens down, behind all work on the device so far; the last call of a step."""
        if len(self._down) < len(tokens_S) or not self._pinned:
            self._down = self._room(len(tokens_S))
        self._tokens_S = self._down[: len(tokens_S)].copy_(tokens_S, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def ready(self) -> bool:
        """Whether `tokens` would not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def tokens(self) -> bytes:
        """What was downloaded, int32; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens_S.numpy().tobytes()

    def _room(self, size: int) -> torch.Tensor:
        return torch.empty(max(size, 1), dtype=torch.int32, pin_memory=self._pinned)


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
