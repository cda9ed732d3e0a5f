"""Experts' weights for the GPU's kernels."""

from nmoe.worker.kernels.expert_weights import empty_experts, put_expert
from nmoe.worker.kernels.fp8 import BlockFP8


def stored(w_gate_up, w_down):
    """Weights [E, 2F, D] and [E, D, F] as a loaded model has them."""
    return _stored(w_gate_up, halves=True), _stored(w_down, halves=False)


def _stored(weights, halves):
    fp8 = isinstance(weights, BlockFP8)
    values = weights.values if fp8 else weights
    grouped = empty_experts(values, *values.shape, fp8=fp8)
    for expert in range(len(values)):
        weight = BlockFP8(values[expert], weights.scales[expert]) if fp8 else values[expert]
        put_expert(grouped, expert, weight, halves=halves)
    return grouped
