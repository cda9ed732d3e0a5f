"""The attention layer of DeepSeek-V3: projections, rope, the cache row, and the form of attention each row takes.

Shape suffixes as in nmoe/worker/batch.py and nmoe/worker/kernels/mla.py; D hidden, A query rank, I = (A or H * Q) + C.
"""

import dataclasses
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from nmoe.architecture import Architecture
from nmoe.profiles import Numerics
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.kernels import Ops
from nmoe.worker.kernels.fp8 import Activations, Weight, empty_weight, rows_of, split_rows
from nmoe.worker.kernels.mla import (
    LATENT_EPS,
    Up,
    absorb_queries,
    absorbed_chunk,
    absorbed_decode,
    absorbed_is_cheaper,
    expanded_chunk,
    values_of_latents,
)
from nmoe.worker.kernels.norm import rms_norm
from nmoe.worker.kernels.rope import apply_rope, halves_from_pairs
from nmoe.worker.model.mla_exact import ExactPlan
from nmoe.worker.weights import Source


class Plan(Protocol):
    """The state that all layers of a step share about its rows, and how its device attends."""

    def attend(
        self, q_THQ: torch.Tensor, kv_TC: torch.Tensor, norm_L: torch.Tensor, rows_KC: torch.Tensor, up: Up
    ) -> torch.Tensor:
        """Normalise and rope the latents and keys `kv_TC` and write them to the cache, rope the queries, and attend
        each row in its form over its cache rows. Returns attended values [T, H, V].

        May overwrite the given queries.
        """
        ...


def plan_attention(
    batch: Batch,
    cache: KVCache,
    rope_M2P: torch.Tensor,
    architecture: Architecture,
    dtype: torch.dtype,
    numerics: Numerics,
) -> Plan:
    """The plan for the numerics class and the device that holds the cache."""
    if cache.rows_LNSC.is_cuda:
        if numerics is Numerics.EXACT:
            from nmoe.worker.model.mla_exact_gpu import ExactGPUPlan

            return ExactGPUPlan.of(batch, cache, rope_M2P)
        from nmoe.worker.model.mla_gpu import GPUPlan

        return GPUPlan.of(batch, cache, rope_M2P, architecture)
    if numerics is Numerics.EXACT:
        return ExactPlan.of(batch, cache, rope_M2P)
    return AttentionPlan.of(batch, cache, rope_M2P, architecture, dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """A prefill row: tokens [start, stop) of the step; `context_J` indexes its cache rows."""

    start: int
    stop: int
    context_J: torch.Tensor
    absorbed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The reference: rope rows, where cache rows are written, and which of them each query reads. See Plan."""

    cos_TP: torch.Tensor
    sin_TP: torch.Tensor
    write_T: torch.Tensor
    num_decodes: int
    decode_RJ: torch.Tensor  # cache rows of each decode row's context
    hidden_R1J: torch.Tensor  # 0, and -inf past the context
    chunks: list[Chunk]

    @classmethod
    def of(
        cls, batch: Batch, cache: KVCache, rope_M2P: torch.Tensor, architecture: Architecture, dtype: torch.dtype
    ) -> "AttentionPlan":
        """Build from the step's rows."""
        decodes, size = batch.num_decodes, cache.page_size
        offsets_S = torch.arange(size, device=batch.pages_RP.device)
        slots_RJ = (batch.pages_RP[:, :, None] * size + offsets_S).flatten(1)
        longest = max(batch.contexts[:decodes], default=0)
        positions_J = torch.arange(longest, device=slots_RJ.device)
        outside_RJ = positions_J > batch.positions_T[:decodes, None]
        # Past its context a row rereads its own first token, so that other requests' data, maybe not finite, stays out.
        decode_RJ = torch.where(outside_RJ, slots_RJ[:decodes, :1], slots_RJ[:decodes, :longest])
        hidden_RJ = torch.zeros(outside_RJ.shape, dtype=dtype, device=slots_RJ.device).masked_fill_(
            outside_RJ, -torch.inf
        )
        chunks = [
            Chunk(start, stop, slots_RJ[row, :context], absorbed_is_cheaper(stop - start, context, architecture))
            for row, (start, stop, context) in enumerate(
                zip(batch.starts[:-1], batch.starts[1:], batch.contexts, strict=True)
            )
            if row >= decodes
        ]
        cos_TP, sin_TP = rope_M2P[batch.positions_T].unbind(1)
        return cls(cos_TP, sin_TP, batch.write_T.long(), decodes, decode_RJ, hidden_RJ[:, None], chunks)

    def attend(
        self, q_THQ: torch.Tensor, kv_TC: torch.Tensor, norm_L: torch.Tensor, rows_KC: torch.Tensor, up: Up
    ) -> torch.Tensor:
        """See Plan."""
        latent, rope = len(norm_L), self.cos_TP.shape[1]
        q_nope_THN, q_rope_THP = q_THQ[..., :-rope], q_THQ[..., -rope:]
        q_rope_THP = apply_rope(q_rope_THP, self.cos_TP[:, None], self.sin_TP[:, None])
        latent_TL = rms_norm(kv_TC[:, :latent], norm_L, LATENT_EPS)
        k_rope_TP = apply_rope(kv_TC[:, latent:], self.cos_TP, self.sin_TP)
        rows_KC.index_copy_(0, self.write_T, torch.cat((latent_TL, k_rope_TP), dim=-1))
        parts = []
        if decodes := self.num_decodes:
            q_RHC = absorb_queries(q_nope_THN[:decodes], q_rope_THP[:decodes], up)
            context_RJC = F.embedding(self.decode_RJ, rows_KC)
            latent_RHL = absorbed_decode(q_RHC, context_RJC, self.hidden_R1J, up)
            parts.append(values_of_latents(latent_RHL, up))
        for chunk in self.chunks:
            q_nope, q_rope = q_nope_THN[chunk.start : chunk.stop], q_rope_THP[chunk.start : chunk.stop]
            context_JC = F.embedding(chunk.context_J, rows_KC)
            if chunk.absorbed:
                latent_THL = absorbed_chunk(absorb_queries(q_nope, q_rope, up), context_JC, up)
                parts.append(values_of_latents(latent_THL, up))
            else:
                parts.append(expanded_chunk(q_nope, q_rope, context_JC, up))
        if not parts:
            return q_nope_THN.new_empty(0, up.w_uv_HVL.shape[0], up.w_uv_HVL.shape[1])
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class Attention:
    """Weights and forward of one layer's attention."""

    def __init__(
        self, architecture: Architecture, source: Source, prefix: str, like: torch.Tensor, *, fp8: bool
    ) -> None:
        """Load from `source`; `like` gives dtype and device, `fp8` means that weights stay quantised."""
        a = self._architecture = architecture
        queries = a.num_heads * a.qk_head_dim
        self._split = [a.q_lora_rank or queries, a.cache_dim]
        self._w_in_ID = empty_weight(like, sum(self._split), a.hidden_size, fp8=fp8)
        w_q_ID, w_kv_CD = split_rows(self._w_in_ID, self._split)
        self._w_q_b: Weight | None = None
        if a.q_lora_rank is None:
            source.fill(w_q_ID, f"{prefix}.q_proj.weight")
            w_queries = w_q_ID
        else:
            source.fill(w_q_ID, f"{prefix}.q_a_proj.weight")
            self._q_norm_A = like.new_empty(a.q_lora_rank)
            source.fill(self._q_norm_A, f"{prefix}.q_a_layernorm.weight")
            self._w_q_b = w_queries = empty_weight(like, queries, a.q_lora_rank, fp8=fp8)
            source.fill(w_queries, f"{prefix}.q_b_proj.weight")
        source.fill(w_kv_CD, f"{prefix}.kv_a_proj_with_mqa.weight")
        if a.rope.interleave:
            ropes_HPI = rows_of(w_queries).view(a.num_heads, a.qk_head_dim, -1)[:, a.qk_nope_head_dim :]
            ropes_HPI.copy_(halves_from_pairs(ropes_HPI))
            rope_PD = rows_of(w_kv_CD)[a.kv_lora_rank :]
            rope_PD.copy_(halves_from_pairs(rope_PD))
        self._kv_norm_L = like.new_empty(a.kv_lora_rank)
        source.fill(self._kv_norm_L, f"{prefix}.kv_a_layernorm.weight")
        w_kv_b_YL = like.new_empty(a.num_heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank)
        source.fill(w_kv_b_YL, f"{prefix}.kv_b_proj.weight")
        self._up = Up.of(w_kv_b_YL, a)
        self._w_o = empty_weight(like, a.hidden_size, a.num_heads * a.v_head_dim, fp8=fp8)
        source.fill(self._w_o, f"{prefix}.o_proj.weight")

    def forward(self, x: Activations, plan: Plan, rows_KC: torch.Tensor, ops: Ops) -> Any:
        """Attention over normalised inputs, [T, D], or its parts where `add_rms_norm` takes them. `rows_KC` is this
        layer's cache, to which the step's rows are written."""
        a = self._architecture
        q_TA, kv_TC = torch.split(ops.linear(x, self._w_in_ID), self._split, dim=-1)
        if self._w_q_b is not None:
            q_TA = ops.linear(ops.rms_norm(q_TA, self._q_norm_A, LATENT_EPS), self._w_q_b)
        q_THQ = q_TA.view(len(q_TA), a.num_heads, a.qk_head_dim)
        return ops.linear_to_add(plan.attend(q_THQ, kv_TC, self._kv_norm_L, rows_KC, self._up).flatten(1), self._w_o)
