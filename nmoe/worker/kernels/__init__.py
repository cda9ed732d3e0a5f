"""The model's operations. Each has a plain-torch reference with documented shapes, which is what the CPU runs; on the
GPU it is a kernel in a sibling file, `*_triton.py` or `*_gluon.py`, tested against the reference.

`ops_for` is the only place where a device and a numerics class get their operations; `gate_for` is where a router's
weight takes the form that they read.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from nmoe.architecture import Architecture
from nmoe.profiles import Numerics
from nmoe.worker.kernels.experts import Arrived
from nmoe.worker.kernels.fp8 import Activations, BlockFP8, Weight, unquantised
from nmoe.worker.kernels.lists import Routes

_Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Ops:
    """The building blocks of a layer, as specified by the reference functions. `sum_experts` and `mlp_with_shared`
    return what `add_rms_norm` adds. On the GPU, `route` makes lists if told to (`listed=True`), and norms and
    `silu_mul` return `Quantised` if weights are FP8."""

    rms_norm: Callable[..., Activations]
    add_rms_norm: Callable[..., tuple[_Tensor, Activations]]
    route: Callable[..., Routes]
    linear: Callable[[Any, Any], _Tensor]
    linear_to_add: Callable[[Any, Any], Any]  # `linear`, in the form `add_rms_norm` takes
    linear_into: Callable[[_Tensor, _Tensor, _Tensor], None]  # for the output head: x, weight, output
    silu_mul: Callable[..., Activations]
    grouped_mlp: Callable[..., _Tensor]
    sum_experts: Callable[[Any, _Tensor], Any]
    # For so many tokens, whether the routed experts and the shared ones, all on this rank, are better computed at once.
    takes_shared: Callable[[int, Architecture], bool]
    mlp_with_shared: Callable[..., Any]


def ops_for(device: torch.device, numerics: Numerics, *, fp8: bool = False) -> Ops:
    """The operations for a device and a numerics class, with weights quantised or not."""
    if device.type == "cuda":
        ops = _exact_triton() if numerics is Numerics.EXACT else _triton()
        return _quantising(ops) if fp8 else ops
    return _exact_reference() if numerics is Numerics.EXACT else _reference()


def gate_for(weight_ED: _Tensor) -> _Tensor:
    """A router's float32 weight in the form its device's `route` takes, in either class: built once, at load."""
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
        linear_to_add=torch.nn.functional.linear,
        linear_into=_library_product,
        silu_mul=experts.silu_mul,
        grouped_mlp=experts.grouped_mlp,
        sum_experts=experts.sum_experts,
        takes_shared=_never,
        mlp_with_shared=_no_kernel,
    )


def _exact_reference() -> Ops:
    from nmoe.worker.kernels import exact, experts

    return Ops(
        rms_norm=exact.rms_norm,
        add_rms_norm=exact.add_rms_norm,
        route=exact.route,
        linear=exact.linear,
        linear_to_add=exact.linear,
        linear_into=exact.linear_into,
        silu_mul=exact.silu_mul,
        grouped_mlp=exact.grouped_mlp,
        sum_experts=experts.sum_experts,
        takes_shared=_never,
        mlp_with_shared=_no_kernel,
    )


def _triton() -> Ops:
    from nmoe.worker.kernels import (
        experts_fp8_gluon,
        experts_gluon,
        experts_launch,
        experts_triton,
        fp8_triton,
        linear_parts_gluon,
        linear_triton,
        norm_triton,
        router_triton,
    )

    def linear(x: Activations, weight: Weight) -> _Tensor:
        if isinstance(weight, BlockFP8):
            return fp8_triton.linear(x, weight)
        return linear_triton.linear(unquantised(x), weight)

    def linear_to_add(x: Activations, weight: Weight) -> _Tensor | experts_triton.Terms:
        if not isinstance(weight, BlockFP8):
            parts_TPO = linear_parts_gluon.parts_of(unquantised(x), weight)
            if parts_TPO is not None:
                return experts_triton.Terms(parts_TPO)
        return linear(x, weight)

    def grouped_mlp(x: Activations | Arrived, routes: Routes, w_gate_up: Weight, w_down: Weight) -> _Tensor:
        if isinstance(w_gate_up, BlockFP8) and isinstance(w_down, BlockFP8):
            return experts_fp8_gluon.grouped_mlp(x, routes, w_gate_up, w_down)
        assert isinstance(x, _Tensor | Arrived) and isinstance(w_gate_up, _Tensor) and isinstance(w_down, _Tensor)
        return experts_gluon.grouped_mlp(x, routes, w_gate_up, w_down)

    def mlp_with_shared(
        x: Activations, routes: Routes, w_gate_up: Weight, w_down: Weight, shared: tuple[Weight, Weight]
    ) -> experts_triton.Terms:
        module: Any = experts_fp8_gluon if isinstance(w_gate_up, BlockFP8) else experts_gluon
        terms: experts_triton.Terms = module.mlp_with_shared(x, routes, w_gate_up, w_down, shared)
        return terms

    return Ops(
        rms_norm=norm_triton.rms_norm,
        add_rms_norm=norm_triton.add_rms_norm,
        route=router_triton.route,
        linear=linear,
        linear_to_add=linear_to_add,
        linear_into=_library_product,
        silu_mul=experts_triton.silu_mul,
        grouped_mlp=grouped_mlp,
        sum_experts=experts_triton.Terms,
        takes_shared=experts_launch.takes_shared,
        mlp_with_shared=mlp_with_shared,
    )


def _exact_triton() -> Ops:
    """The fast class's kernels wherever they give a row the same bits in any batch, and products that do too."""
    from nmoe.worker.kernels import fp8_triton, linear_exact_triton

    def linear(x: Activations, weight: Weight) -> _Tensor:
        if isinstance(weight, BlockFP8):
            return fp8_triton.linear_exact(x, weight)
        return linear_exact_triton.linear(unquantised(x), weight)

    return dataclasses.replace(
        _triton(), linear=linear, linear_to_add=linear, linear_into=linear_exact_triton.linear_into
    )


def _quantising(ops: Ops) -> Ops:
    """The same operations, but inputs of products are quantised by the operation that produces them."""
    return dataclasses.replace(
        ops,
        rms_norm=functools.partial(ops.rms_norm, quantised=True),
        add_rms_norm=functools.partial(ops.add_rms_norm, quantised=True),
        silu_mul=functools.partial(ops.silu_mul, quantised=True),
    )


def _never(*_: object) -> bool:
    return False


def _no_kernel(*_: object) -> Any:
    raise NotImplementedError("takes_shared says that there is none")


def _library_product(x_TI: _Tensor, weight_OI: _Tensor, out_TO: _Tensor) -> None:
    torch.mm(x_TI, weight_OI.t(), out=out_TO)
