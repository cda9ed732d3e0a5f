"""Properties of the GPU that launches depend on."""

import functools

import torch

FEW_TOKENS = 16  # up to this many, a product is bound by its weights; beyond, by what programs read of the tokens


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors: programs beyond what they hold at once wait for others to finish."""
    return torch.cuda.get_device_properties(device).multi_processor_count
