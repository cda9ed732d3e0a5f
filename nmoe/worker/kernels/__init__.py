"""The operations of the model. Each has a plain-torch reference with documented shapes, which is what the CPU runs; on
the GPU it is a kernel in a file beside it, `*_triton.py` or `*_gluon.py`, which is tested against the reference.

`ops_for` is the one place where a device and a numerics class get their operations, `gate_for` where a router's weight
takes the form that they read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from nmoe.architecture import Architecture
from nmoe.errors import LaunchError
from nmoe.profiles import Numerics
from nmoe.worker.kernels.experts import Arrived
from nmoe.worker.kernels.fp8 import BLOCK, BlockFP8, Weight

_Tensor = torch.Tensor
_HOPPER = (9, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Ops:
    """What a layer is made of, as the reference functions say. `sum_experts` gives what `add_rms_norm` adds."""

    rms_norm: Callable[[_Tensor, _Tensor, float], _Tensor]
    add_rms_norm: Callable[[_Tensor, Any, _Tensor, float], tuple[_Tensor, _Tensor]]
    route: Callable[[_Tensor, _Tensor, _Tensor, Architecture], tuple[_Tensor, _Tensor]]
    linear: Callable[[_Tensor, Any], _Tensor]
    linear_into: Callable[[_Tensor, _Tensor, _Tensor], None]  # the last head: x, weight, where the product goes
    silu_mul: Callable[[_Tensor], _Tensor]
    grouped_mlp: Callable[..., _Tensor]
    sum_experts: Callable[[_Tensor, _Tensor], Any]


def ops_for(device: torch.device, numerics: Numerics) -> Ops:
    """The operations of a device and a numerics class."""
    if device.type == "cuda":
        return _exact_triton() if numerics is Numerics.EXACT else _triton()
    return _exact_reference() if numerics is Numerics.EXACT else _reference()


def gate_for(weight_ED: _Tensor) -> _Tensor:
    """A router's float32 weight as its device's `route` takes it, in either class: made once, at load."""
    if weight_ED.device.type == "cuda":
        from nmoe.worker.kernels import router_triton

        return router_triton.split_gate(weight_ED)
    return weight_ED


def _reference() -> Ops:
    from nmoe.worker.kernels import experts, norm, router

    return Ops(
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        route=router.route,
        linear=torch.nn.functional.linear,
        linear_into=_library_product,
        silu_mul=experts.silu_mul,
        grouped_mlp=experts.grouped_mlp,
        sum_experts=experts.sum_experts,
    )


def _exact_reference() -> Ops:
    from nmoe.worker.kernels import exact, experts

    return Ops(
        rms_norm=exact.rms_norm,
        add_rms_norm=exact.add_rms_norm,
        route=exact.route,
        linear=exact.linear,
        linear_into=exact.linear_into,
        silu_mul=exact.silu_mul,
        grouped_mlp=exact.grouped_mlp,
        sum_experts=experts.sum_experts,
    )


def _triton() -> Ops:
    from nmoe.worker.kernels import (
        experts_fp8_triton,
        experts_triton,
        fp8_triton,
        linear_triton,
        norm_triton,
        router_triton,
    )

    def linear(x_TI: _Tensor, weight: Weight) -> _Tensor:
        if isinstance(weight, BlockFP8):
            return fp8_triton.linear(x_TI, weight)
        return linear_triton.linear(x_TI, weight)

    def grouped_mlp(
        x: _Tensor | Arrived, ids_TK: _Tensor, weights_TK: _Tensor, w_gate_up: Weight, w_down: Weight
    ) -> _Tensor:
        if isinstance(w_gate_up, BlockFP8) and isinstance(w_down, BlockFP8):
            return experts_fp8_triton.grouped_mlp(x, ids_TK, weights_TK, w_gate_up, w_down)
        assert isinstance(w_gate_up, _Tensor) and isinstance(w_down, _Tensor)
        return experts_triton.grouped_mlp(x, ids_TK, weights_TK, w_gate_up, w_down)

    return Ops(
        rms_norm=norm_triton.rms_norm,
        add_rms_norm=norm_triton.add_rms_norm,
        route=router_triton.route,
        linear=linear,
        linear_into=_library_product,
        silu_mul=experts_triton.silu_mul,
        grouped_mlp=grouped_mlp,
        sum_experts=experts_triton.Terms,
    )


def _exact_triton() -> Ops:
    """The fast class's kernels, where they give a row the same bits in any company, and products that do."""
    from nmoe.worker.kernels import fp8_triton, linear_exact_triton

    def linear(x_TI: _Tensor, weight: Weight) -> _Tensor:
        if isinstance(weight, BlockFP8):
            return fp8_triton.linear_exact(x_TI, weight)
        return linear_exact_triton.linear(x_TI, weight)

    return dataclasses.replace(_triton(), linear=linear, linear_into=linear_exact_triton.linear_into)


def _library_product(x_TI: _Tensor, weight_OI: _Tensor, out_TO: _Tensor) -> None:
    torch.mm(x_TI, weight_OI.t(), out=out_TO)


def check_gpu(architecture: Architecture, dtype: torch.dtype, page_size: int, device: torch.device) -> None:
    """Raises LaunchError, naming every reason, when the kernels cannot run this model on this GPU.

    Blackwell (sm_100) lacks the matrix instructions that `mla_warps_gluon.py` is written in; it needs a form of that
    module in its own (tcgen05, accumulators in tensor memory), to be chosen by capability in `absorbed_decode` and
    `exact_prefill`, and tiles for its matrix unit in experts_triton.py's `_shape`. The other sources compile for it.
    """
    a, capability = architecture, torch.cuda.get_device_capability(device)
    problems = []
    if capability != _HOPPER:
        problems.append(f"compute capability {capability[0]}.{capability[1]}: needs 9.0 (H100, H200)")
    if dtype != torch.bfloat16:
        problems.append(f"{dtype}: computes in bfloat16; set [model] dtype = 'bfloat16'")
    if page_size % 32 or page_size & (page_size - 1):
        problems.append(f"pages of {page_size} tokens: set [engine] page_size to 32, 64, 128 or 256")
    for name, power, least, most in (
        ("kv_lora_rank", a.kv_lora_rank, 128, 512),
        ("qk_rope_head_dim", a.qk_rope_head_dim, 32, 64),
        ("qk_nope_head_dim", a.qk_nope_head_dim, 32, 1024),
        ("v_head_dim", a.v_head_dim, 32, 1024),
    ):
        if not least <= power <= most or power & (power - 1):
            problems.append(f"{name} = {power}: must be a power of two from {least} to {most}")
    for name, value, multiple in (
        ("hidden_size", a.hidden_size, 128),
        ("moe_intermediate_size", a.moe_intermediate_size, 64),
        ("intermediate_size", a.intermediate_size, 8),  # rows of whole 16 bytes, which exact products load by
        ("q_lora_rank", a.q_lora_rank or 0, 8),
    ):
        if value % multiple:
            problems.append(f"{name} = {value}: must be a multiple of {multiple}")
    if a.num_heads != 16 and a.num_heads % 64:
        problems.append(f"num_attention_heads = {a.num_heads}: must be 16 or a multiple of 64")
    if a.quant_block:
        fp8_sizes = {
            "hidden_size": a.hidden_size,
            "moe_intermediate_size": a.moe_intermediate_size,
            "intermediate_size": a.intermediate_size,
            "q_lora_rank": a.q_lora_rank or a.num_heads * a.qk_head_dim,
            "num_attention_heads x v_head_dim": a.num_heads * a.v_head_dim,
        }
        if a.quant_block != (BLOCK, BLOCK):
            problems.append(f"weight_block_size = {list(a.quant_block)}: FP8 weights need {[BLOCK, BLOCK]}")
        problems += [
            f"{name} = {size}: FP8 needs a multiple of {BLOCK}" for name, size in fp8_sizes.items() if size % BLOCK
        ]
        if a.rope.interleave and (a.qk_rope_head_dim != 64 or a.qk_nope_head_dim % 64):
            problems.append(
                "FP8 with interleaved rope needs qk_rope_head_dim = 64 and qk_nope_head_dim a multiple of it"
            )
    if a.n_group > 1 and (a.num_experts & (a.num_experts - 1) or a.n_group & (a.n_group - 1)):
        problems.append(f"{a.num_experts} experts in {a.n_group} groups: both must be powers of two")
    if problems:
        raise LaunchError("the CUDA engine cannot serve this model here:\n" + "\n".join(f"  - {p}" for p in problems))
