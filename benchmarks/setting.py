"""What a result was measured on, and how routed tokens spread over the experts of its model."""

import dataclasses
import platform
import subprocess
from typing import Any

import msgspec
import torch

from nmoe import __version__
from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config
from nmoe.profiles import Numerics
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.kernels import Ops, ops_for
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.model import deepseek_v3, load_model


def setting() -> dict[str, Any]:
    """Device and versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "nmoe": f"{__version__} {commit.stdout.strip()}".strip(),
        "torch": torch.__version__,
    }


def expert_spread(config: Config, tokens: int) -> dict[str, float]:
    """How `tokens` random tokens spread, averaged over the layers with experts: the share of the experts that got any,
    and the busiest expert's load over the mean load.

    The whole model is loaded here once more: random weights are derived from the tensors' names, so they are the same
    as in the model that was measured.
    """
    config = msgspec.structs.replace(config, parallel=msgspec.structs.replace(config.parallel, world_size=1))
    device = torch.device(config.parallel.device)
    loads: list[torch.Tensor] = []

    def counting_ops(*device_and_class: Any, fp8: bool) -> Ops:
        ops = ops_for(*device_and_class, fp8=fp8)

        def route(*arguments: Any, **options: Any) -> Routes:
            routes = ops.route(*arguments, **options)
            loads.append(torch.bincount(routes.ids_TK.flatten().long(), minlength=arguments[-1].num_experts).double())
            return routes

        return dataclasses.replace(ops, route=route)

    deepseek_v3.ops_for = counting_ops
    checkpoint = open_checkpoint(config)
    model = load_model(checkpoint, config, 0, device, lambda *_: None)
    a, size = checkpoint.architecture, config.engine.page_size
    pages = -(-tokens // size)
    shape = (a.num_layers, pages + 1, size, a.cache_dim)
    places = torch.arange(tokens, device=device)
    generator = torch.Generator(device).manual_seed(config.benchmark.seed)
    batch = Batch(
        ids_T=torch.randint(0, a.vocab_size, (tokens,), generator=generator, device=device),
        positions_T=places,
        write_T=places,
        starts=[0, tokens],
        contexts=[tokens],
        pages_RP=torch.arange(pages, device=device)[None],
        num_decodes=0,
    )
    model.forward(batch, KVCache(torch.zeros(shape, dtype=model.dtype, device=device)), Numerics.FAST)
    spread = torch.stack(loads)
    used, busiest = (spread > 0).double().mean(), (spread.amax(1) / spread.mean(1)).mean()
    return {"experts_used": round(float(used), 3), "busiest_over_mean": round(float(busiest), 2)}
