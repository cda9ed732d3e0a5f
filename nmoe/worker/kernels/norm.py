"""Root-mean-square normalisation (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32 and rounded once to x's dtype. [T, D]."""
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)
