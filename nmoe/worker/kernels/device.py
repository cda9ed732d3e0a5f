"""What launches ask of the GPU they run on."""

import functools

import torch

FEW_TOKENS = 16  # up to which weights alone bound a product: beyond, what programs read of the tokens outweighs them


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many there are: programs beyond what they hold at once wait for others to end."""
    return torch.cuda.get_device_properties(device).multi_processor_count
