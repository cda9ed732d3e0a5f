"""How many KV pages a rank gets, and allocating them.

Shape suffixes as in `nmoe/worker/batch.py`.
"""

import torch

from nmoe.architecture import Architecture
from nmoe.checkpoint import Checkpoint
from nmoe.config import Config
from nmoe.errors import NmoeError
from nmoe.memory import CPU_CACHE_SHARE, free_ram, pages_that_fill
from nmoe.worker.batch import KVCache

_GB = 1e9
_IDS = {1: torch.uint8, 2: torch.int16}  # by the size of an expert id in bytes; ids are below 2**15


def make_cache(config: Config, checkpoint: Checkpoint, device: torch.device) -> KVCache:
    """The cache of one rank, zeroed. Raises NmoeError, saying what to set, if it does not fit in memory.

    Zeros matter: attention gives masked positions zero weight, and zero times an uninitialised NaN is NaN.
    """
    architecture, dtype = checkpoint.architecture, getattr(torch, checkpoint.dtype)
    page_bytes = architecture.cache_bytes_per_token(checkpoint.dtype) * config.engine.page_size
    num_pages = config.engine.num_pages or pages_that_fill(
        config.engine, architecture, checkpoint.max_seq_len, page_bytes, _available(config, device)
    )
    if num_pages * config.engine.page_size < 2:
        raise NmoeError(_remedy(config, device, "no memory is left for the KV cache", page_bytes))
    shape = (architecture.num_layers, num_pages + 1, config.engine.page_size, architecture.cache_dim)
    try:
        return KVCache(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(_routing_shape(architecture, shape), dtype=_IDS[architecture.expert_id_bytes], device=device),
        )
    except RuntimeError as error:  # torch.OutOfMemoryError on the GPU, a plain RuntimeError on the CPU
        if "allocate" not in str(error):
            raise
        need = (num_pages + 1) * page_bytes
        problem = f"the KV cache of {num_pages} pages needs {need / _GB:.2f} GB, which cannot be allocated"
        raise NmoeError(_remedy(config, device, problem, page_bytes)) from None


def _routing_shape(architecture: Architecture, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the routing stored with a cache of this shape."""
    return *shape[1:3], architecture.num_expert_layers, architecture.num_experts_per_tok


def _remedy(config: Config, device: torch.device, problem: str, page_bytes: int) -> str:
    utilization = config.engine.gpu_memory_utilization
    raise_it = f" or raise [engine] gpu_memory_utilization = {utilization:g}" if device.type == "cuda" else ""
    return (
        f"{problem}; {_available(config, device) / _GB:.2f} GB are available to it on each rank. A page of"
        f" {config.engine.page_size} tokens takes {page_bytes / _GB:.4f} GB: set [engine] num_pages to what fits,"
        f" free memory{raise_it}"
    )


def _available(config: Config, device: torch.device) -> int:
    """Bytes available to one rank's cache."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int(total * (1 - config.engine.gpu_memory_utilization)))
    return int(free_ram() * CPU_CACHE_SHARE) // config.parallel.world_size
