"""The models, keyed by config.json's model_type: one small file each."""

import contextlib
import math
import mmap
import pathlib
from typing import Protocol

import torch

from nmoe.architecture import Architecture
from nmoe.checkpoint import Checkpoint
from nmoe.config import Config
from nmoe.errors import LaunchError
from nmoe.gpu_limits import refusals
from nmoe.profiles import Numerics
from nmoe.slab import ControlLayout, SlabLayout
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.model.deepseek_v3 import DeepseekV3
from nmoe.worker.rdep import Exchange, OneRank
from nmoe.worker.rdep.one_gpu import OneGPU
from nmoe.worker.rdep.shared_memory import SharedMemory
from nmoe.worker.weights import CheckpointSource, RandomSource, ReportProgress, rank_experts, rank_tensors

_MODELS = {"deepseek_v3": DeepseekV3}
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Model(Protocol):
    """What the runner needs from a model."""

    architecture: Architecture
    dtype: torch.dtype
    device: torch.device
    exchange: Exchange

    def forward(self, batch: Batch, cache: KVCache, numerics: Numerics) -> torch.Tensor:
        """Compute the step's tokens and write their cache rows. Returns hidden states after the final norm, [T, D].

        In the exact class a token's bits do not depend on the rest of the batch (docs/exact.md), here and below.
        """
        ...

    def abridged(self, cache: KVCache) -> "tuple[Model, KVCache]":
        """The first layer of each kind, and the cache of as many layers. Shares weights and memory. Its steps launch
        the same kernels, fewer times."""
        ...

    def logits(self, hidden_SD: torch.Tensor, numerics: Numerics) -> torch.Tensor:
        """Next-token logits of selected hidden states, float32 [S, V]."""
        ...

    def logits_into(self, hidden_SD: torch.Tensor, out_SV: torch.Tensor, numerics: Numerics) -> None:
        """`logits` written to memory of the model's dtype, which is reused from step to step."""
        ...


def load_model(
    checkpoint: Checkpoint,
    config: Config,
    rank: int,
    device: torch.device,
    report: ReportProgress,
    slabs: mmap.mmap | None = None,
    meeting: pathlib.Path | None = None,
) -> Model:
    """Load this rank's part of the checkpoint's model on `device`. Raises NmoeError.

    `report(what, done, total)` is called about a hundred times, with bytes. With several ranks, `slabs` is the memory
    they share (on the CPU they exchange tokens through it), and `meeting` is the rendezvous path of ranks on GPUs,
    unused by any earlier life of the workers.
    """
    architecture, world_size = checkpoint.architecture, config.parallel.world_size
    tensors = rank_tensors(architecture, rank, world_size)
    dtype = _DTYPES[checkpoint.dtype]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if reasons := refusals(architecture, checkpoint.dtype, config.engine.page_size, capability):
            raise LaunchError(
                "the CUDA engine cannot serve this model here:\n" + "\n".join(f"  - {r}" for r in reasons)
            )
    exchange = _exchange(checkpoint, config, rank, device, slabs, meeting)
    with contextlib.ExitStack() as stack:
        source: CheckpointSource | RandomSource
        if config.model.weights == "random":
            source = RandomSource(sum(map(math.prod, tensors.values())), dtype, device, report)
        else:
            source = stack.enter_context(CheckpointSource(checkpoint, list(tensors), device, report))
        return _MODELS[architecture.model_type](
            architecture,
            source,
            experts=rank_experts(architecture, rank, world_size),
            exchange=exchange,
            max_seq_len=checkpoint.max_seq_len,
            dtype=dtype,
            device=device,
        )


def _exchange(
    checkpoint: Checkpoint,
    config: Config,
    rank: int,
    device: torch.device,
    slabs: mmap.mmap | None,
    meeting: pathlib.Path | None,
) -> Exchange:
    if config.parallel.world_size == 1:
        return OneGPU(device) if device.type == "cuda" else OneRank()
    if slabs is None or (device.type == "cuda" and meeting is None):
        world_size = config.parallel.world_size
        raise LaunchError(f"[parallel] world_size = {world_size}: no memory in common; start workers by `nmoe serve`")
    layout, dtype = SlabLayout.of(checkpoint.architecture, checkpoint.dtype, config), _DTYPES[checkpoint.dtype]
    if device.type == "cpu":
        return SharedMemory(layout, slabs, rank, dtype)
    from nmoe.worker.rdep.between_gpus import BetweenGPUs, announce_compilation
    from nmoe.worker.rdep.control import Control
    from nmoe.worker.rdep.symmetric import PeerSlabs

    assert meeting is not None
    control = Control(ControlLayout(layout.world_size), slabs)
    announce_compilation(control, rank)
    peers = PeerSlabs(layout.slab_bytes, rank, layout.world_size, device, meeting)
    expected = config.engine.moe_expected_m
    return BetweenGPUs(layout, peers.slab, peers.bases, control, rank, dtype, expected_rows=expected)
