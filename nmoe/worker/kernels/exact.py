"""The operations of the exact class on the CPU: a row's bits depend on the row alone, whatever the batch.

torch's products, reductions and transcendental functions select code by the number of rows, by a row's alignment in
memory and by where a vector's tail falls. So every operation that IEEE 754 does not define to the last bit (it defines
sum, product, quotient, square root and rounding) is called on one row at a time, on rows that all start at the same
offset from a cache line: the same call on the same operands, in any batch. Operations that IEEE 754 defines take all
rows at once, but never two in one call, because they may or may not be fused. docs/exact.md has the whole list.

Shape suffixes: T tokens, K experts per token, D hidden, F intermediate, G = 2F, E experts, I inputs, O outputs.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nmoe.architecture import Architecture
from nmoe.worker.kernels import router
from nmoe.worker.kernels.lists import Routes

_CACHE_LINE = 64  # bytes; torch's allocations start at a multiple of it


def aligned_rows(x_TI: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows, [1, I] each, all starting at a cache line and with the same strides."""
    inputs = x_TI.shape[1]
    width = -(-inputs * x_TI.itemsize // _CACHE_LINE) * _CACHE_LINE // x_TI.itemsize
    if x_TI.stride() != (width, 1) or x_TI.data_ptr() % _CACHE_LINE:
        buffer_TI = x_TI.new_empty(len(x_TI), width)[:, :inputs]
        x_TI = buffer_TI.copy_(x_TI)
    return torch.split(x_TI, 1)


def row_by_row(operation: Callable[[torch.Tensor], torch.Tensor], x_TI: torch.Tensor, width: int) -> torch.Tensor:
    """`operation` on each row separately, in float32: [T, width]."""
    if not len(x_TI):
        return x_TI.new_empty(0, width, dtype=torch.float32)
    return torch.cat([operation(row) for row in aligned_rows(x_TI.float())])


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x @ weight^T, [T, O]; in float32, where a one-row product is several times faster than in bfloat16."""
    weight_IO = weight_OI.float().t()
    return row_by_row(lambda row: torch.mm(row, weight_IO), x_TI, len(weight_OI)).to(x_TI.dtype)


def linear_into(x_TI: torch.Tensor, weight_OI: torch.Tensor, out_TO: torch.Tensor) -> None:
    """`linear` into `out_TO`."""
    out_TO.copy_(linear(x_TI, weight_OI))


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See norm.py. The squares are added in a tree, by adding halves of the row."""
    real_TD = x_TD.float()
    sums = real_TD * real_TD
    if odd := (1 << (sums.shape[1] - 1).bit_length()) - sums.shape[1]:
        sums = F.pad(sums, (0, odd))
    while (width := sums.shape[1]) > 1:
        sums = sums[:, : width // 2] + sums[:, width // 2 :]
    root_T1 = (sums / x_TD.shape[1]).add_(eps).sqrt_()
    return (real_TD / root_T1).mul_(weight_D.float()).to(x_TD.dtype)


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See norm.py."""
    sum_TD = x_TD if delta_TD is None else x_TD + delta_TD
    return sum_TD, rms_norm(sum_TD, weight_D, eps)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See rope.py; computed in float32 and rounded once."""
    real = x.float()
    turned = real.roll(x.shape[-1] // 2, -1).mul_(sin.float())
    return (real * cos.float()).add_(turned).to(x.dtype)


def silu_mul(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """See experts.py."""
    gate_TF, up_TF = gate_up_TG.chunk(2, dim=-1)
    return (row_by_row(F.silu, gate_TF, gate_TF.shape[1]) * up_TF).to(gate_up_TG.dtype)


def route(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor,
    architecture: Architecture,
    *,
    listed: bool = False,
) -> Routes:
    """See router.py."""
    a, weight_DE = architecture, weight_ED.t()
    scores_TE = row_by_row(lambda row: torch.mm(row, weight_DE).sigmoid_(), x_TD, a.num_experts)
    ids_TK = router.choose(scores_TE, bias_E, a)
    weights_TK = scores_TE.gather(1, ids_TK)
    if a.norm_topk_prob:
        total_T = functools.reduce(torch.add, weights_TK.unbind(1))
        weights_TK = weights_TK / (total_T + 1e-20)[:, None]
    return Routes(ids_TK, weights_TK * a.routed_scaling_factor)


def grouped_mlp(
    x_TD: torch.Tensor, routes: Routes, w_gate_up_EGD: torch.Tensor, w_down_EDF: torch.Tensor
) -> torch.Tensor:
    """See experts.py; each pair of a token and an expert separately, in float32."""
    ids_TK, weights_TK, _ = routes
    here = range(len(w_down_EDF))
    weights = {
        e: (w_gate_up_EGD[e].float().t(), w_down_EDF[e].float().t()) for e in set(ids_TK.flatten().tolist()) & set(here)
    }
    parts_TKD = x_TD.new_zeros(*ids_TK.shape, x_TD.shape[1], dtype=torch.float32)
    if len(x_TD):
        for row, ids, parts_KD in zip(aligned_rows(x_TD.float()), ids_TK.tolist(), parts_TKD.unbind(), strict=True):
            for slot, expert in enumerate(ids):
                if expert in here:
                    w_gate_up_DG, w_down_FD = weights[expert]
                    gate_1F, up_1F = torch.mm(row, w_gate_up_DG).chunk(2, dim=-1)
                    parts_KD[slot] = torch.mm(F.silu(gate_1F).mul_(up_1F), w_down_FD)[0]
    return functools.reduce(torch.add, parts_TKD.mul_(weights_TK[..., None]).unbind(1))
