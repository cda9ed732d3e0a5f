"""Rotary position embedding (arXiv 2104.09864) with YaRN scaling (arXiv 2309.00071).

The frequencies follow transformers' modeling_rope_utils.py. Weights are reordered at load, so that here dimensions that
rotate together are always i and i + P/2, whatever the checkpoint's layout.

Shape suffixes: T tokens, M positions of the table, H heads, P rope dimensions of a head.
"""

import math

import torch

from nmoe.architecture import Architecture, Rope


def inverse_frequencies(rope: Rope, dim: int) -> torch.Tensor:
    """Angle per position of each rotating pair, float32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.yarn is None:
        return frequencies
    yarn = rope.yarn

    def correction_dim(rotations: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = correction_dim(yarn.beta_fast), correction_dim(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001  # avoids the singularity, as in the reference
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    interpolated = 1.0 / (yarn.factor * rope.theta**exponents)
    return interpolated * ramp + frequencies * (1 - ramp)


def rope_table(
    architecture: Architecture, num_positions: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[M, 2, P]: for each position the cosines, twice, and the sines, with the first half negated.

    Computed in float32 and rounded to `dtype`, YaRN's scale included.
    """
    rope = architecture.rope
    frequencies = inverse_frequencies(rope, architecture.qk_rope_head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    scale = rope.yarn.cos_sin_scale() if rope.yarn else 1.0
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).to(device=device, dtype=dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension of `x` ([..., P]); `cos` and `sin` are rows of the table, broadcast against it."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def halves_from_pairs(weight_XPI: torch.Tensor) -> torch.Tensor:
    """Reorder P from adjacent pairs (0, 1), (2, 3), ... to halves: all first members, then all second ones."""
    return torch.cat((weight_XPI[..., 0::2, :], weight_XPI[..., 1::2, :]), dim=-2)
