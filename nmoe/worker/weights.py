"""Sources of a model's weights: a checkpoint's safetensors or a seeded generator, straight to the device.

A source fills tensors that the model has allocated, one name at a time, so peak memory is the model plus one tensor and
one expert's weights, which the model then stores in the order of its kernels.
Only what this rank needs is read.
"""

import contextlib
import pathlib
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from nmoe.architecture import Architecture, expected_tensors
from nmoe.checkpoint import SCALE_SUFFIX, Checkpoint
from nmoe.errors import CheckpointError
from nmoe.worker.kernels.fp8 import BlockFP8, Weight, dequantise_blocks, rows_of

ReportProgress = Callable[[str, int, int], None]  # description, bytes done, bytes in total

_REPORTS = 100  # per load: enough for a smooth progress bar, without flooding the link
_STD = 0.02
_FP8_STD = 64.0  # of the stored values: 7 standard deviations are FP8's maximum


def rank_experts(architecture: Architecture, rank: int, world_size: int) -> range:
    """The contiguous block of experts that `rank` owns."""
    each = architecture.num_experts // world_size
    return range(rank * each, (rank + 1) * each)


def rank_tensors(architecture: Architecture, rank: int, world_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that one rank loads: everything except other ranks' experts."""
    mine = rank_experts(architecture, rank, world_size)

    def needed(name: str) -> bool:
        _, found, rest = name.partition(".mlp.experts.")
        return not found or int(rest.partition(".")[0]) in mine

    return {name: shape for name, shape in expected_tensors(architecture) if needed(name)}


class Source(Protocol):
    """Fills memory that the model has allocated, one tensor at a time."""

    def fill(self, out: Weight, name: str) -> None:
        """Write the tensor `name` into `out`, which has its shape, in `out`'s dtype or quantised, on `out`'s device."""
        ...


class _Progress:
    """Forwards about `_REPORTS` reports per load, the first at 0 and the last at the total."""

    def __init__(self, what: str, total: int, report: ReportProgress) -> None:
        self._what, self._total, self._report = what, total, report
        self._done = self._reported = 0
        report(what, 0, total)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._done == self._total or self._done - self._reported >= self._total // _REPORTS:
            self._reported = self._done
            self._report(self._what, self._done, self._total)


class CheckpointSource:
    """Tensors from a checkpoint's safetensors files, dequantising FP8 ones if needed. Use as a context manager."""

    def __init__(self, checkpoint: Checkpoint, names: list[str], device: torch.device, report: ReportProgress) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._files: dict[pathlib.Path, Any] = {}
        self._stack = contextlib.ExitStack()
        total = sum(checkpoint.tensors[name].num_bytes for name in names)
        self._progress = _Progress("loading weights", total, report)

    def __enter__(self) -> "CheckpointSource":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def fill(self, out: Weight, name: str) -> None:
        """See Source. A tensor that stays quantised must be quantised in the file."""
        info = self._checkpoint.tensors[name]
        tensor = self._read(name)
        if isinstance(out, BlockFP8):
            assert tensor.dtype == torch.float8_e4m3fn, "open_checkpoint refuses others"
            out.values.copy_(tensor)
            out.scales.copy_(self._read(name + SCALE_SUFFIX))
            self._progress.add(info.num_bytes)
            return
        if tensor.dtype == torch.float8_e4m3fn:
            block = self._checkpoint.architecture.quant_block
            assert block is not None, "open_checkpoint refuses FP8 tensors without block sizes"
            tensor = dequantise_blocks(tensor, self._read(name + SCALE_SUFFIX), block, out.dtype)
        out.copy_(tensor)
        self._progress.add(info.num_bytes)

    def _read(self, name: str) -> torch.Tensor:
        file = self._checkpoint.tensors[name].file
        if file not in self._files:
            try:
                opened = safe_open(file, framework="pt", device=str(self._device))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read: {error}; download it again") from None
            self._files[file] = self._stack.enter_context(opened)
        tensor: torch.Tensor = self._files[file].get_tensor(name)
        return tensor


class RandomSource:
    """Normal(0, 0.02) weights, norms of 1 and a router bias of 0, as transformers initialises the model.

    Each tensor's values depend only on its name (and the device's generator), not on the rank, the world size or the
    order of loading.
    """

    def __init__(self, num_params: int, dtype: torch.dtype, device: torch.device, report: ReportProgress) -> None:
        self._generator = torch.Generator(device)
        self._item_bytes = dtype.itemsize
        self._progress = _Progress("making random weights", num_params * dtype.itemsize, report)

    def fill(self, out: Weight, name: str) -> None:
        """See Source."""
        self._progress.add(rows_of(out).numel() * self._item_bytes)
        self._generator.manual_seed(zlib.crc32(name.encode()))
        if isinstance(out, BlockFP8):
            values = torch.empty(out.values.shape, dtype=torch.bfloat16, device=out.values.device)
            out.values.copy_(values.normal_(0.0, _FP8_STD, generator=self._generator))
            out.scales.fill_(_STD / _FP8_STD)
        elif name.endswith("norm.weight"):
            out.fill_(1.0)
        elif name.endswith("e_score_correction_bias"):
            out.zero_()
        else:
            out.normal_(0.0, _STD, generator=self._generator)
