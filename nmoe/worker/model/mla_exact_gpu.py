"""Attention of exact steps on the GPU: every query absorbed, in spans that depend on its position only.

Shape suffixes as in nmoe/worker/model/mla.py.
"""

import torch

from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.kernels.mla import Up
from nmoe.worker.kernels.mla_exact_prefill_gluon import exact_prefill
from nmoe.worker.kernels.mla_exact_triton import exact_decode, span_prefix
from nmoe.worker.kernels.mla_values_triton import values_of_latents
from nmoe.worker.model.mla_gpu import PagedPlan, chunks_of

_POSITIONS = 1 << 30  # context positions at a time: unlimited, because contexts are not expanded


class ExactGPUPlan(PagedPlan):
    """See Plan in nmoe/worker/model/mla.py."""

    __slots__ = ()

    @classmethod
    def of(cls, batch: Batch, cache: KVCache, rope_M2P: torch.Tensor) -> "ExactGPUPlan":
        """Build from the step's rows."""
        contexts_R, prefix = None, None
        if decodes := batch.num_decodes:
            contexts_R, prefix = span_prefix(
                batch.positions_T[:decodes] if batch.decodes_R is None else batch.decodes_R
            )
        return cls(batch, rope_M2P, cache.page_size, contexts_R, prefix, chunks_of(batch, _POSITIONS))

    def attend(
        self, q_THQ: torch.Tensor, kv_TC: torch.Tensor, norm_L: torch.Tensor, rows_KC: torch.Tensor, up: Up
    ) -> torch.Tensor:
        """See Plan."""
        decodes, pages_RB = self.batch.num_decodes, self.batch.pages_RP
        q_latent_THL = q_THQ.new_empty(*q_THQ.shape[:2], len(norm_L))
        self.enter(q_THQ, kv_TC, norm_L, rows_KC, up, q_latent_THL)
        latent_THL = torch.empty_like(q_latent_THL)
        if self.contexts_R is not None and self.prefix is not None:
            exact_decode(
                q_latent_THL[:decodes],
                q_THQ[:decodes],
                rows_KC,
                pages_RB[:decodes],
                self.contexts_R,
                self.prefix,
                self.page_size,
                up.scale,
                latent_THL[:decodes],
            )
        for chunks in self.chunks:
            exact_prefill(q_latent_THL, q_THQ, rows_KC, pages_RB, chunks, self.page_size, up.scale, latent_THL)
        out_THV = q_THQ.new_empty(*q_THQ.shape[:2], up.w_uv_HVL.shape[1])
        values_of_latents(latent_THL, up.w_uv_HVL, out_THV)
        return out_THV
