"""DeepSeek-V3 (arXiv 2412.19437), inference only. The oracle is transformers' modeling_deepseek_v3.py.

Shape suffixes as in nmoe/worker/batch.py; D hidden, V vocabulary, M positions, K rows of the cache.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F

from nmoe.architecture import Architecture
from nmoe.profiles import Numerics
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.kernels import ops_for
from nmoe.worker.kernels.fp8 import unquantised
from nmoe.worker.kernels.rope import rope_table
from nmoe.worker.kernels.routing import keep_routing
from nmoe.worker.model.mla import Attention, plan_attention
from nmoe.worker.model.mlp import DenseMLP, MoE
from nmoe.worker.rdep import Exchange
from nmoe.worker.weights import Source


@dataclasses.dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm_D: torch.Tensor
    attention: Attention
    mlp_norm_D: torch.Tensor
    mlp: DenseMLP | MoE


class DeepseekV3:
    """One rank's model: everything except the experts on other ranks."""

    def __init__(
        self,
        architecture: Architecture,
        source: Source,
        *,
        experts: range,
        exchange: Exchange,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Load from `source`, layer by layer; `experts` are the ids of the experts on this rank."""
        a = self.architecture = architecture
        self.dtype, self.device, self.exchange = dtype, device, exchange
        # The CPU has no FP8 matmul, so a quantised checkpoint is expanded there.
        self._fp8 = a.quant_block is not None and device.type == "cuda"
        self._ops = {numerics: ops_for(device, numerics, fp8=self._fp8) for numerics in Numerics}
        like_D = torch.empty(a.hidden_size, dtype=dtype, device=device)
        self._embed_VD = like_D.new_empty(a.vocab_size, a.hidden_size)
        source.fill(self._embed_VD, "model.embed_tokens.weight")
        self._layers = [self._load_layer(layer, source, experts, exchange, like_D) for layer in range(a.num_layers)]
        self._norm_D = torch.empty_like(like_D)
        source.fill(self._norm_D, "model.norm.weight")
        self._head_VD = self._embed_VD
        if not a.tie_word_embeddings:
            self._head_VD = torch.empty_like(self._embed_VD)
            source.fill(self._head_VD, "lm_head.weight")
        self._rope_M2P = rope_table(a, max_seq_len, dtype, device)
        self._routings = 1  # kept for each layer with experts

    def _load_layer(
        self, layer: int, source: Source, experts: range, exchange: Exchange, like_D: torch.Tensor
    ) -> _Layer:
        a, prefix = self.architecture, f"model.layers.{layer}"
        attention_norm_D, mlp_norm_D = torch.empty_like(like_D), torch.empty_like(like_D)
        source.fill(attention_norm_D, f"{prefix}.input_layernorm.weight")
        attention = Attention(a, source, f"{prefix}.self_attn", like_D, fp8=self._fp8)
        source.fill(mlp_norm_D, f"{prefix}.post_attention_layernorm.weight")
        mlp = (
            DenseMLP(source, f"{prefix}.mlp", a.intermediate_size, like_D, fp8=self._fp8)
            if a.is_dense(layer)
            else MoE(a, source, f"{prefix}.mlp", experts, exchange, like_D, fp8=self._fp8)
        )
        return _Layer(attention_norm_D, attention, mlp_norm_D, mlp)

    def abridged(self, cache: KVCache) -> "tuple[DeepseekV3, KVCache]":
        """See Model."""
        model = copy.copy(self)
        kinds = {type(layer.mlp): layer for layer in reversed(self._layers)}
        model._layers = list(kinds.values())[::-1]
        model._routings = self.architecture.num_expert_layers
        return model, dataclasses.replace(cache, rows_LNSC=cache.rows_LNSC[: len(model._layers)])

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, numerics: Numerics) -> torch.Tensor:
        """Hidden states after the final norm, [T, D]; writes the step's cache rows. T may be 0."""
        ops, eps = self._ops[numerics], self.architecture.rms_norm_eps
        plan = plan_attention(batch, cache, self._rope_M2P, self.architecture, self.dtype, numerics)
        x_TD, delta_TD = F.embedding(batch.ids_T, self._embed_VD), None
        ids_LTK: list[torch.Tensor] = []
        for layer, rows_KC in zip(self._layers, cache.rows_LNSC.flatten(1, 2).unbind(), strict=True):
            x_TD, inputs = ops.add_rms_norm(x_TD, delta_TD, layer.attention_norm_D, eps)
            delta_TD = layer.attention.forward(inputs, plan, rows_KC, ops)
            x_TD, inputs = ops.add_rms_norm(x_TD, delta_TD, layer.mlp_norm_D, eps)
            if isinstance(layer.mlp, MoE):
                delta_TD, ids_TK = layer.mlp.forward(inputs, ops)
                ids_LTK.append(ids_TK)
            else:
                delta_TD = layer.mlp.forward(inputs, ops)
        if cache.routing_NSLK is not None:
            keep_routing(ids_LTK * self._routings, batch.write_T, cache.routing_NSLK)
        return unquantised(ops.add_rms_norm(x_TD, delta_TD, self._norm_D, eps)[1])

    @torch.inference_mode()
    def logits(self, hidden_SD: torch.Tensor, numerics: Numerics) -> torch.Tensor:
        """Unnormalised log-probabilities of the next token for selected hidden states, float32 [S, V]."""
        out_SV = hidden_SD.new_empty(len(hidden_SD), len(self._head_VD))
        self.logits_into(hidden_SD, out_SV, numerics)
        return out_SV.float()

    @torch.inference_mode()
    def logits_into(self, hidden_SD: torch.Tensor, out_SV: torch.Tensor, numerics: Numerics) -> None:
        """`logits` as the matmul produces them, written to memory of the model's dtype."""
        self._ops[numerics].linear_into(hidden_SD, self._head_VD, out_SV)
