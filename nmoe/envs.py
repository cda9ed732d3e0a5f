"""The one place where environment variables are read and set. They switch no behaviour of nmoe itself.

The launcher calls `set_for_children` once, before it forks; libraries in the children read what is set there.
"""

import os
import pathlib

from nmoe.config import Config


def get(name: str) -> str | None:
    """The value of an environment variable, None when unset."""
    return os.environ.get(name)


def for_children(config: Config) -> dict[str, str]:
    """What the children's libraries need to find in their environment under this configuration."""
    values = {"TOKENIZERS_PARALLELISM": "false"}  # a frontend has threads of its own for tokenizing
    if config.parallel.device == "cpu":
        values["OMP_WAIT_POLICY"] = "passive"  # torch's threads sleep between operators instead of spinning
    else:
        cache = pathlib.Path(config.engine.cache_dir)
        values |= {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCH_EXTENSIONS_DIR": str(cache / "extensions"),
            "TORCH_BLAS_PREFER_CUBLASLT": "1",  # which exact products need; said here, torch does not warn
            "NCCL_SOCKET_IFNAME": "lo",  # one node: rendezvous never leaves it
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_NVLS_ENABLE": "0",  # NVLink multicast stays off
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        }
    return values


def set_for_children(config: Config) -> None:
    """Put `for_children` into this process's environment, for the processes it will fork."""
    os.environ.update(for_children(config))
