"""The most that the GPU can do, measured along with every result, and the fewest bytes that a decode step must read."""

import math
import statistics
from collections.abc import Callable

import torch

from nmoe.architecture import DTYPE_BYTES, Architecture, expected_tensors, is_quantised


def measure() -> dict[str, float]:
    """Read bandwidth in GB/s (summing 4 GB) and the rate of an 8192^3 bfloat16 matmul in TFLOP/s, on random data."""
    data = torch.randn(8192, 1 << 17, device="cuda")
    read = data.nbytes / median_ms(lambda: torch.sum(data, 1)) / 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_ms = median_ms(lambda: a @ b)
    return {"read_gb_s": read, "product_tflop_s": 2 * 8192**3 / product_ms / 1e9}


def median_ms(function: Callable[[], object], repeats: int = 20) -> float:
    """Median device time of one call, in milliseconds."""
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def step_bytes(architecture: Architecture, dtype: str, batch: int, context: int, world_size: int) -> float:
    """Bytes each rank must read for a decode step of `batch` rows per rank: every weight except the embedding (of its
    routed experts only those that the random tokens of all ranks are expected to choose), and the KV of its rows."""
    a = architecture
    weights = 0.0  # a quantised weight is one byte; the scales, 1/4096 of that, are left out
    for name, shape in expected_tensors(a):
        fp8 = a.quant_block is not None and is_quantised(name)
        size = math.prod(shape) * (1.0 if fp8 else DTYPE_BYTES[dtype])
        if name == "model.embed_tokens.weight":
            size *= a.tie_word_embeddings
        elif ".experts." in name:
            size *= (1 - (1 - a.num_experts_per_tok / a.num_experts) ** (batch * world_size)) / world_size
        weights += size
    return weights + batch * context * a.kv_bytes_per_token(dtype)
