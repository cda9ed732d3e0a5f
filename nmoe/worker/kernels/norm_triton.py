"""Root-mean-square normalisation on the GPU; `norm.py` is the reference.

Shape suffixes: T tokens, D hidden.
"""

import torch
import triton
import triton.language as tl

from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.experts import Returned
from nmoe.worker.kernels.experts_triton import Terms
from nmoe.worker.kernels.fp8 import Activations, Quantised, unquantised
from nmoe.worker.kernels.fp8_triton import room_for, store_quantised
from nmoe.worker.kernels.kept import kept

_REGISTERS = 128  # per thread; with this limit, the compiler loads a row of up to 4096 before it adds anything


@triton.jit(do_not_specialize=["scales_stride"])
def _norm_kernel(
    x_ptr,
    delta_ptr,
    parts_ptr,
    owners_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    values_ptr,
    scales_ptr,
    scales_stride,
    x_stride,
    token_stride,
    part_stride,
    eps,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < D
    weight = tl.load(weight_ptr + lane, mask=inside, other=0.0).to(tl.float32)  # before the wait: no kernel writes it
    tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + lane, mask=inside, other=0.0).to(tl.float32)
    if sum_ptr is not None:
        delta = tl.zeros([BLOCK], tl.float32)
        owners = -1 if owners_ptr is None else tl.load(owners_ptr + row)
        for k in tl.static_range(K):
            part_ptr = parts_ptr + row * token_stride + tl.cast(k, tl.int64) * part_stride
            there = inside & ((owners >> k) & 1 == 1)
            delta += tl.load(part_ptr + lane, mask=there, other=0.0).to(tl.float32)
        if delta_ptr is not None:
            delta += tl.load(delta_ptr + row * D + lane, mask=inside, other=0.0).to(tl.float32)
        x += delta.to(sum_ptr.dtype.element_ty).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + lane, rounded, mask=inside, eviction_policy=KEPT)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    normed = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * D + lane, normed, mask=inside, eviction_policy=KEPT)
    if values_ptr is not None:
        group = tl.arange(0, BLOCK // 128)
        blocks = tl.reshape(normed.to(tl.float32), [BLOCK // 128, 128])
        store_quantised(blocks, group, group < D // 128, values_ptr, scales_ptr, row, scales_stride, D // 128)


def _launch(
    x_TD: torch.Tensor,
    delta: torch.Tensor | Terms | None,
    weight_D: torch.Tensor,
    sum_TD: torch.Tensor | None,
    out: Activations,
    eps: float,
) -> None:
    quantised = out if isinstance(out, Quantised) else None
    tokens, hidden = x_TD.shape
    block = triton.next_power_of_2(hidden)
    delta_TD, parts = (delta.shared_TD, delta.parts_TKD) if isinstance(delta, Terms) else (delta, None)
    parts_TKD, owners_T = (parts.sums_TND, parts.owners_T) if isinstance(parts, Returned) else (parts, None)
    if tokens:
        _norm_kernel[(tokens,)](
            x_TD,
            delta_TD,
            parts_TKD,
            owners_T,
            weight_D,
            sum_TD,
            unquantised(out),
            quantised and quantised.values_PI,
            quantised and quantised.scales_CP,
            quantised.scales_CP.stride(0) if quantised else 0,
            x_TD.stride(0),
            0 if parts_TKD is None else parts_TKD.stride(0),
            0 if parts_TKD is None else parts_TKD.stride(1),
            eps,
            D=hidden,
            K=0 if parts_TKD is None else parts_TKD.shape[1],
            BLOCK=block,
            KEPT=kept(tokens),
            num_warps=8 if block > 4096 else 4,
            maxnreg=_REGISTERS if block <= 4096 else None,
            launch_pdl=early(tokens),
        )


def _result(x_TD: torch.Tensor, *, quantised: bool) -> Activations:
    out_TD = x_TD.new_empty(x_TD.shape)
    return room_for(out_TD) if quantised else out_TD


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, *, quantised: bool = False) -> Activations:
    """See norm.py; rows of `x_TD` need not be contiguous. `quantised`: also return what products in FP8 take."""
    out = _result(x_TD, quantised=quantised)
    _launch(x_TD, None, weight_D, None, out, eps)
    return out


def add_rms_norm(
    x_TD: torch.Tensor,
    delta: torch.Tensor | Terms | None,
    weight_D: torch.Tensor,
    eps: float,
    *,
    quantised: bool = False,
) -> tuple[torch.Tensor, Activations]:
    """See norm.py; an expert layer's delta may be given as terms, which are added first. `quantised` as above."""
    if delta is None:
        return x_TD, rms_norm(x_TD, weight_D, eps, quantised=quantised)
    sum_TD, out = torch.empty_like(x_TD), _result(x_TD, quantised=quantised)
    _launch(x_TD, delta, weight_D, sum_TD, out, eps)
    return sum_TD, out
