"""The two kinds of MLP of a layer: dense, and routed experts beside shared ones.

Shape suffixes: T tokens, D hidden, F intermediate, G = 2F, E experts of this rank.
"""

import functools

import torch

from nmoe.architecture import Architecture
from nmoe.worker.kernels import ops_for
from nmoe.worker.rdep import Exchange
from nmoe.worker.weights import Source


class DenseMLP:
    """A gated MLP; also the shared experts, which are one such MLP as wide as all of them."""

    def __init__(self, source: Source, prefix: str, intermediate: int, like: torch.Tensor) -> None:
        """Load from `source`; `like` [D] gives dtype, device and the hidden size."""
        hidden = len(like)
        self._ops = ops_for(like.device)
        self._w_gate_up_GD = like.new_empty(2 * intermediate, hidden)
        self._w_down_DF = like.new_empty(hidden, intermediate)
        _fill_mlp(source, prefix, self._w_gate_up_GD, self._w_down_DF)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D]."""
        return self._ops.gated_mlp(x_TD, self._w_gate_up_GD, self._w_down_DF)


class MoE:
    """Router, this rank's experts, and the shared experts, which run while tokens are under way."""

    def __init__(
        self,
        architecture: Architecture,
        source: Source,
        prefix: str,
        experts: range,
        exchange: Exchange,
        like: torch.Tensor,
    ) -> None:
        """Load from `source`; `experts` are the ids that live here; `like` [D] gives dtype and device."""
        a = self._architecture = architecture
        self._exchange = exchange
        self._ops = ops_for(like.device)
        # The router is exact in float32 whatever the model computes in.
        self._gate_ED = like.new_empty(a.num_experts, a.hidden_size, dtype=torch.float32)
        self._bias_E = like.new_empty(a.num_experts, dtype=torch.float32)
        source.fill(self._gate_ED, f"{prefix}.gate.weight")
        source.fill(self._bias_E, f"{prefix}.gate.e_score_correction_bias")
        w_gate_up_EGD = like.new_empty(len(experts), 2 * a.moe_intermediate_size, a.hidden_size)
        w_down_EDF = like.new_empty(len(experts), a.hidden_size, a.moe_intermediate_size)
        for slot, expert in enumerate(experts):
            _fill_mlp(source, f"{prefix}.experts.{expert}", w_gate_up_EGD[slot], w_down_EDF[slot])
        self._experts = functools.partial(self._ops.grouped_mlp, w_gate_up_EGD=w_gate_up_EGD, w_down_EDF=w_down_EDF)
        shared = a.num_shared_experts * a.moe_intermediate_size
        self._shared = DenseMLP(source, f"{prefix}.shared_experts", shared, like)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D]; the routed and the shared experts are added in float32."""
        ids_TK, weights_TK = self._ops.route(x_TD, self._gate_ED, self._bias_E, self._architecture)
        combine = self._exchange.dispatch(self._experts, x_TD, ids_TK, weights_TK)
        shared_TD = self._shared.forward(x_TD)
        return self._ops.sum_experts(combine(), shared_TD)


def _fill_mlp(source: Source, prefix: str, w_gate_up_GD: torch.Tensor, w_down_DF: torch.Tensor) -> None:
    gate_FD, up_FD = w_gate_up_GD.chunk(2)
    source.fill(gate_FD, f"{prefix}.gate_proj.weight")
    source.fill(up_FD, f"{prefix}.up_proj.weight")
    source.fill(w_down_DF, f"{prefix}.down_proj.weight")
