"""`make test-gpu` runs these; a machine without an NVIDIA driver does not even collect them."""

import os
import pathlib

collect_ignore_glob = [] if pathlib.Path("/dev/nvidiactl").exists() else ["*"]

# Ranks that share a GPU in a test wait for each other there: each of their streams needs a queue of its own.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# As in the workers (nmoe/envs.py).
os.environ.setdefault("TORCH_BLAS_PREFER_CUBLASLT", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
