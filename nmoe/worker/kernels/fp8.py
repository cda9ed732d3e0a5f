"""Block-quantised FP8 weights, as DeepSeek-V3 is published (arXiv 2412.19437, section 3.3)."""

import torch


def dequantise_blocks(
    weight_OI: torch.Tensor, scale_BC: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The real weight, [O, I] of `dtype`: every `block[0]` x `block[1]` tile times its scale, computed in float32.

    `weight_OI` float8_e4m3fn; `scale_BC` float32 [ceil(O / block[0]), ceil(I / block[1])]; edge tiles may be partial.
    """
    rows, columns = weight_OI.shape
    scale_OC = scale_BC.float().repeat_interleave(block[0], dim=0)[:rows]
    scale_OI = scale_OC.repeat_interleave(block[1], dim=1)[:, :columns]
    return (weight_OI.float() * scale_OI).to(dtype)
