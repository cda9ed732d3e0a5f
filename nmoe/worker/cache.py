"""How many KV pages a rank gets, and their memory.

Shape suffixes as in `nmoe/worker/batch.py`.
"""

import pathlib

import torch

from nmoe.checkpoint import Checkpoint
from nmoe.config import Config
from nmoe.errors import NmoeError
from nmoe.worker.batch import KVCache

_CPU_SHARE = 0.25  # of the available memory, for all ranks together: the machine has other things to do
_GB = 1e9


def make_cache(config: Config, checkpoint: Checkpoint, device: torch.device) -> KVCache:
    """The cache of one rank, zeroed. Raises NmoeError, with what to set, when the memory does not hold it.

    Zeros matter: attention weighs what it must not see with zero, and zero times an uninitialised NaN is NaN.
    """
    architecture, dtype = checkpoint.architecture, getattr(torch, checkpoint.dtype)
    page_bytes = architecture.kv_bytes_per_token(checkpoint.dtype) * config.engine.page_size
    num_pages = config.engine.num_pages or _fill_memory(config, checkpoint.max_seq_len, page_bytes, device)
    if num_pages * config.engine.page_size < 2:
        raise NmoeError(_remedy(config, device, "no memory is left for the KV cache", page_bytes))
    shape = (architecture.num_layers, num_pages + 1, config.engine.page_size, architecture.cache_dim)
    try:
        return KVCache(torch.zeros(shape, dtype=dtype, device=device))
    except RuntimeError as error:  # torch.OutOfMemoryError on the GPU, a plain RuntimeError on the CPU
        if "allocate" not in str(error):
            raise
        need = (num_pages + 1) * page_bytes
        problem = f"the KV cache of {num_pages} pages needs {need / _GB:.2f} GB, which cannot be allocated"
        raise NmoeError(_remedy(config, device, problem, page_bytes)) from None


def _remedy(config: Config, device: torch.device, problem: str, page_bytes: int) -> str:
    utilization = config.engine.gpu_memory_utilization
    raise_it = f" or raise [engine] gpu_memory_utilization = {utilization:g}" if device.type == "cuda" else ""
    return (
        f"{problem}; {_available(config, device) / _GB:.2f} GB are available to it on each rank. A page of"
        f" {config.engine.page_size} tokens takes {page_bytes / _GB:.4f} GB: set [engine] num_pages to what fits,"
        f" free memory{raise_it}"
    )


def _fill_memory(config: Config, max_seq_len: int, page_bytes: int, device: torch.device) -> int:
    """As many pages as the memory holds, but no more than a full batch of the longest requests can use."""
    useful = config.engine.max_batch_size * -(-max_seq_len // config.engine.page_size)
    return max(0, min(useful, _available(config, device) // page_bytes - 1))


def _available(config: Config, device: torch.device) -> int:
    """Bytes that one rank's cache may take."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int(total * (1 - config.engine.gpu_memory_utilization)))
    return int(_cpu_memory() * _CPU_SHARE) // config.parallel.world_size


def _cpu_memory() -> int:
    """Bytes of memory that new work can have: MemAvailable of /proc/meminfo."""
    for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise NmoeError("/proc/meminfo has no MemAvailable; set [engine] num_pages")
