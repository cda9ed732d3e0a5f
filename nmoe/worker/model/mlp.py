"""The two kinds of MLP layer: dense, and routed experts alongside shared ones.

Shape suffixes: T tokens, D hidden, F intermediate, G = 2F, E experts of this rank.
"""

from typing import Any

import torch

from nmoe.architecture import Architecture
from nmoe.worker.kernels import Ops, gate_for
from nmoe.worker.kernels.expert_weights import empty_experts, put_expert
from nmoe.worker.kernels.experts import Arrived
from nmoe.worker.kernels.fp8 import Activations, Weight, empty_weight, rows_of, split_rows, unquantised
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.rdep import Exchange
from nmoe.worker.weights import Source


class DenseMLP:
    """A gated MLP. Also serves as the shared experts, fused into one MLP of their combined width."""

    def __init__(self, source: Source, prefix: str, intermediate: int, like: torch.Tensor, *, fp8: bool) -> None:
        """Load from `source`; `like` [D] gives dtype, device and hidden size, `fp8` keeps the weights quantised."""
        hidden = len(like)
        self._w_gate_up_GD = empty_weight(like, 2 * intermediate, hidden, fp8=fp8)
        self._w_down_DF = empty_weight(like, hidden, intermediate, fp8=fp8)
        _fill_mlp(source, prefix, self._w_gate_up_GD, self._w_down_DF)

    @property
    def weights(self) -> tuple[Weight, Weight]:
        """Of the first product, gate above up, [2F, D], and of the second, [D, F]."""
        return self._w_gate_up_GD, self._w_down_DF

    def forward(self, x: Activations, ops: Ops) -> torch.Tensor:
        """[T, D]."""
        return ops.linear(ops.silu_mul(ops.linear(x, self._w_gate_up_GD)), self._w_down_DF)


class MoE:
    """Router, this rank's experts, and the shared experts, which run while tokens are in transit."""

    def __init__(
        self,
        architecture: Architecture,
        source: Source,
        prefix: str,
        experts: range,
        exchange: Exchange,
        like: torch.Tensor,
        *,
        fp8: bool,
    ) -> None:
        """Load from `source`; `experts` are the ids on this rank; `like` [D] and `fp8` as in DenseMLP."""
        a = self._architecture = architecture
        self._exchange = exchange
        self._all_here = len(experts) == a.num_experts
        # The router computes in exact float32, whatever the model's dtype.
        gate_ED = like.new_empty(a.num_experts, a.hidden_size, dtype=torch.float32)
        self._bias_E = like.new_empty(a.num_experts, dtype=torch.float32)
        source.fill(gate_ED, f"{prefix}.gate.weight")
        source.fill(self._bias_E, f"{prefix}.gate.e_score_correction_bias")
        self._gate = gate_for(gate_ED)
        hidden, inter = a.hidden_size, a.moe_intermediate_size
        self._w_gate_up = empty_experts(like, len(experts), 2 * inter, hidden, fp8=fp8)
        self._w_down = empty_experts(like, len(experts), hidden, inter, fp8=fp8)
        w_gate_up_GD = empty_weight(like, 2 * inter, hidden, fp8=fp8)
        w_down_DF = empty_weight(like, hidden, inter, fp8=fp8)
        for slot, expert in enumerate(experts):
            _fill_mlp(source, f"{prefix}.experts.{expert}", w_gate_up_GD, w_down_DF)
            put_expert(self._w_gate_up, slot, w_gate_up_GD, halves=True)
            put_expert(self._w_down, slot, w_down_DF, halves=False)
        self._shared: DenseMLP | None = None
        if shared := a.num_shared_experts * inter:
            self._shared = DenseMLP(source, f"{prefix}.shared_experts", shared, like, fp8=fp8)

    def forward(self, inputs: Activations, ops: Ops) -> tuple[Any, torch.Tensor]:
        """The output, [T, D], or its terms where `add_rms_norm` takes them, and the experts chosen, [T, K]. Routed and
        shared experts are added in float32."""
        x_TD, a = unquantised(inputs), self._architecture
        if self._shared is not None and self._all_here and ops.takes_shared(len(x_TD), a):  # nothing is sent
            routes = ops.route(x_TD, self._gate, self._bias_E, a, listed=True)
            weights = self._w_gate_up, self._w_down, self._shared.weights
            return ops.mlp_with_shared(inputs, routes, *weights), routes.ids_TK
        self._exchange.announce(len(x_TD))
        routes = ops.route(x_TD, self._gate, self._bias_E, a, listed=self._all_here)

        def experts(x: torch.Tensor | Arrived, routes: Routes) -> torch.Tensor:
            # Tokens that stayed on this rank are already quantised.
            return ops.grouped_mlp(inputs if x is x_TD else x, routes, self._w_gate_up, self._w_down)

        combine = self._exchange.dispatch(experts, x_TD, routes)
        with self._exchange.beside():
            shared_TD = torch.zeros_like(x_TD) if self._shared is None else self._shared.forward(inputs, ops)
        return ops.sum_experts(combine(), shared_TD), routes.ids_TK


def _fill_mlp(source: Source, prefix: str, w_gate_up_GD: Weight, w_down_DF: Weight) -> None:
    inter = rows_of(w_down_DF).shape[1]
    gate_FD, up_FD = split_rows(w_gate_up_GD, [inter, inter])
    source.fill(gate_FD, f"{prefix}.gate_proj.weight")
    source.fill(up_FD, f"{prefix}.up_proj.weight")
    source.fill(w_down_DF, f"{prefix}.down_proj.weight")
