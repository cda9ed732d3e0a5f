"""The only place where environment variables are read and set. None of them changes the behaviour of nmoe itself.

The launcher calls `set_for_children` once, before it forks; libraries in the children read the variables.
"""

import os
import pathlib

from nmoe.config import Config


def get(name: str) -> str | None:
    """The value of an environment variable, or None if unset."""
    return os.environ.get(name)


def for_children(config: Config) -> dict[str, str]:
    """The environment variables that the children's libraries need under this configuration."""
    values = {"TOKENIZERS_PARALLELISM": "false"}  # frontends tokenize in threads of their own
    if config.parallel.device == "cpu":
        values["OMP_WAIT_POLICY"] = "passive"  # torch's threads sleep between operators instead of spinning
    else:
        cache = pathlib.Path(config.engine.cache_dir)
        values |= {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TRITON_DEFAULT_FP_FUSION": "1",  # what Triton did before 3.10, whose default differs; 3.9 warns of it
            "TORCH_EXTENSIONS_DIR": str(cache / "extensions"),
            "TORCH_BLAS_PREFER_CUBLASLT": "1",  # needed by exact products; setting it here avoids a warning from torch
            "NCCL_SOCKET_IFNAME": "lo",  # single node: rendezvous stays local
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_NVLS_ENABLE": "0",  # no NVLink multicast
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        }
    return values


def set_for_children(config: Config) -> None:
    """Put `for_children` into this process's environment, to be inherited by the processes it forks."""
    os.environ.update(for_children(config))
