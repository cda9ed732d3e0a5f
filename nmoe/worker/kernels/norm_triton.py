"""Root-mean-square normalisation on the GPU; `norm.py` is the reference.

Shape suffixes: T tokens, D hidden.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _norm_kernel(x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, x_stride, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < D
    x = tl.load(x_ptr + row * x_stride + lane, mask=inside, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        x += tl.load(delta_ptr + row * D + lane, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + lane, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + lane, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def _launch(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    sum_TD: torch.Tensor | None,
    out_TD: torch.Tensor,
    eps: float,
) -> None:
    tokens, hidden = x_TD.shape
    block = triton.next_power_of_2(hidden)
    if tokens:
        _norm_kernel[(tokens,)](
            x_TD,
            delta_TD,
            weight_D,
            sum_TD,
            out_TD,
            x_TD.stride(0),
            eps,
            D=hidden,
            BLOCK=block,
            num_warps=8 if block > 4096 else 4,
        )


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See norm.py; rows of `x_TD` may lie apart."""
    out_TD = x_TD.new_empty(x_TD.shape)
    _launch(x_TD, None, weight_D, None, out_TD, eps)
    return out_TD


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See norm.py."""
    if delta_TD is None:
        return x_TD, rms_norm(x_TD, weight_D, eps)
    sum_TD, out_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    _launch(x_TD, delta_TD, weight_D, sum_TD, out_TD, eps)
    return sum_TD, out_TD
