"""Block-quantised FP8, as in DeepSeek-V3's checkpoints and computation (arXiv 2412.19437, section 3.3).

Weights have a scale per tile of 128 x 128 (or other blocks, on the CPU only), activations one per token and 128
columns, and a product is summed over up to 128 columns at a time before the scales are applied in float32.

Shape suffixes: O outputs, I inputs of a product, T tokens, B and C blocks of O and of I.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch

from nmoe.gpu_limits import FP8_BLOCK

BLOCK = FP8_BLOCK
LARGEST = 448.0  # of float8_e4m3fn
ALIGNED_ROWS = 4  # whose scales take 16 bytes


@dataclasses.dataclass(frozen=True, slots=True)
class BlockFP8:
    """A quantised weight, or one per expert, stacked."""

    values: torch.Tensor  # float8_e4m3fn [..., O, I]
    scales: torch.Tensor  # float32 [..., B, C]


@dataclasses.dataclass(frozen=True, slots=True)
class Quantised:
    """Activations, and their quantised form for products in FP8, for P tokens: T rounded up to a multiple of
    `ALIGNED_ROWS`. Rows beyond T are undefined."""

    x_TI: torch.Tensor
    values_PI: torch.Tensor  # float8_e4m3fn
    scales_CP: torch.Tensor  # float32; the scales of a tile of tokens are contiguous


Weight = torch.Tensor | BlockFP8
Activations = torch.Tensor | Quantised


def unquantised(x: Activations) -> torch.Tensor:
    """The original activations, [T, I]."""
    return x.x_TI if isinstance(x, Quantised) else x


def empty_weight(like: torch.Tensor, *shape: int, fp8: bool) -> Weight:
    """Allocate a weight [..., O, I] on `like`'s device: in `like`'s dtype, or quantised."""
    if not fp8:
        return like.new_empty(shape)
    *front, rows, columns = shape
    scales = like.new_empty(*front, math.ceil(rows / BLOCK), math.ceil(columns / BLOCK), dtype=torch.float32)
    return BlockFP8(like.new_empty(shape, dtype=torch.float8_e4m3fn), scales)


def split_rows(weight: Weight, sizes: Sequence[int]) -> list[Weight]:
    """Views of `sizes` outputs each; for a quantised weight, all but the last must be whole blocks."""
    if isinstance(weight, torch.Tensor):
        return list(torch.split(weight, list(sizes)))
    values = torch.split(weight.values, list(sizes))
    scales = torch.split(weight.scales, [math.ceil(size / BLOCK) for size in sizes])
    return [BlockFP8(*part) for part in zip(values, scales, strict=True)]


def rows_of(weight: Weight) -> torch.Tensor:
    """The weight's rows, for permuting within blocks: quantised ones as bytes, since FP8 tensors lack operations."""
    return weight if isinstance(weight, torch.Tensor) else weight.values.view(torch.uint8)


def dequantise_blocks(
    weight_OI: torch.Tensor, scale_BC: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The dequantised weight, [O, I] of `dtype`: each `block[0]` x `block[1]` tile times its scale, in float32.

    `weight_OI` float8_e4m3fn; `scale_BC` float32 [ceil(O / block[0]), ceil(I / block[1])]; edge tiles may be partial.
    """
    rows, columns = weight_OI.shape
    scale_OC = scale_BC.float().repeat_interleave(block[0], dim=0)[:rows]
    scale_OI = scale_OC.repeat_interleave(block[1], dim=1)[:, :columns]
    return (weight_OI.float() * scale_OI).to(dtype)


def quantise_rows(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations. Returns FP8 values and scales: float8_e4m3fn [T, I], float32 [T, C]. I % 128 == 0."""
    x_TCI = x_TI.float().view(len(x_TI), x_TI.shape[1] // BLOCK, BLOCK)
    scales_TC = x_TCI.abs().amax(-1).clamp_min(1e-12) / LARGEST
    return (x_TCI / scales_TC[..., None]).flatten(1).to(torch.float8_e4m3fn), scales_TC
