"""Attention of exact steps on the CPU: each query alone, absorbed, in calls whose shapes depend on its position only.

Shape suffixes as in nmoe/worker/model/mla.py.
"""

import dataclasses

import torch
import torch.nn.functional as F

from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.kernels.exact import aligned_rows, apply_rope, rms_norm
from nmoe.worker.kernels.mla import LATENT_EPS, Up


@dataclasses.dataclass(frozen=True, slots=True)
class ExactPlan:
    """See Plan in nmoe/worker/model/mla.py."""

    cos_TP: torch.Tensor
    sin_TP: torch.Tensor
    write_T: torch.Tensor
    context_RJ: list[torch.Tensor]  # int64: the cache rows of each row's context
    counts: list[int]  # each row's number of queries, the last positions of its context

    @classmethod
    def of(cls, batch: Batch, cache: KVCache, rope_M2P: torch.Tensor) -> "ExactPlan":
        """Build from the step's rows."""
        size = cache.page_size
        slots_RJ = (batch.pages_RP.long()[:, :, None] * size + torch.arange(size)).flatten(1)
        context_RJ = [slots_J[:context] for slots_J, context in zip(slots_RJ, batch.contexts, strict=True)]
        counts = [stop - start for start, stop in zip(batch.starts[:-1], batch.starts[1:], strict=True)]
        cos_TP, sin_TP = rope_M2P[batch.positions_T].unbind(1)
        return cls(cos_TP, sin_TP, batch.write_T.long(), context_RJ, counts)

    def attend(
        self, q_THQ: torch.Tensor, kv_TC: torch.Tensor, norm_L: torch.Tensor, rows_KC: torch.Tensor, up: Up
    ) -> torch.Tensor:
        """See Plan."""
        latent, rope = len(norm_L), self.cos_TP.shape[1]
        q_rope_THP = apply_rope(q_THQ[..., -rope:], self.cos_TP[:, None], self.sin_TP[:, None])
        latent_TL = rms_norm(kv_TC[:, :latent], norm_L, LATENT_EPS)
        k_rope_TP = apply_rope(kv_TC[:, latent:], self.cos_TP, self.sin_TP)
        rows_KC.index_copy_(0, self.write_T, torch.cat((latent_TL, k_rope_TP), dim=-1))
        q_THQ = torch.cat((q_THQ[..., :-rope], q_rope_THP), dim=-1)
        heads, values = up.w_uv_HVL.shape[:2]
        w_uk_HNL, w_uv_HLV = up.w_uk_HNL.float(), up.w_uv_HVL.float().transpose(1, 2)
        queries = iter(aligned_rows(q_THQ.flatten(1).float()) if len(q_THQ) else ())
        attended = []
        for context_J, count in zip(self.context_RJ, self.counts, strict=True):
            context_JC = F.embedding(context_J, rows_KC).float()
            for length in range(len(context_J) - count + 1, len(context_J) + 1):
                q_HQ = next(queries).view(heads, -1)
                attended.append(_attend(q_HQ, context_JC[:length], w_uk_HNL, w_uv_HLV, up.scale))
        return torch.stack(attended).to(q_THQ.dtype) if attended else q_THQ.new_empty(0, heads, values)


def _attend(
    q_HQ: torch.Tensor, context_JC: torch.Tensor, w_uk_HNL: torch.Tensor, w_uv_HLV: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query over its context. Returns attended values, float32 [H, V]."""
    nope, latent = w_uk_HNL.shape[1:]
    q_latent_HL = torch.bmm(q_HQ[:, None, :nope], w_uk_HNL)[:, 0]
    scores_HJ = torch.mm(torch.cat((q_latent_HL, q_HQ[:, nope:]), dim=-1), context_JC.t()).mul_(scale)
    latent_HL = torch.mm(F.softmax(scores_HJ, dim=-1), context_JC[:, :latent])
    return torch.bmm(latent_HL[:, None], w_uv_HLV)[:, 0]
