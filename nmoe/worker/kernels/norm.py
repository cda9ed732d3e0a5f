"""Root-mean-square normalisation (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32 and rounded once to x's dtype. [T, D]."""
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x + delta`, rounded to x's dtype (or x itself without a delta), and its `rms_norm`. Both [T, D]."""
    sum_TD = x_TD if delta_TD is None else x_TD + delta_TD
    return sum_TD, rms_norm(sum_TD, weight_D, eps)
