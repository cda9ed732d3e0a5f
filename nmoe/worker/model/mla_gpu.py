"""How a step attends on the GPU: decode rows absorbed over pages, chunks expanded over their gathered contexts.

All of it follows from the batch's device tensors and the lengths the host knows, without waiting for the device; a step
of decode rows alone needs no lengths, so that it can be captured.

Shape suffixes as in nmoe/worker/model/mla.py.
"""

import dataclasses
import itertools

import torch
import torch.nn.functional as F

from nmoe.architecture import Architecture
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.kernels.mla import Up
from nmoe.worker.kernels.mla_decode_triton import absorbed_decode, page_prefix
from nmoe.worker.kernels.mla_inputs_triton import rope_and_cache
from nmoe.worker.kernels.mla_prefill_triton import BLOCK_M, Tiles, expanded_chunks

_LATENT_EPS = 1e-6  # as in nmoe/worker/model/mla.py
_EXPANDED_BYTES = 1 << 31  # keys and values that exist at one time


@dataclasses.dataclass(frozen=True, slots=True)
class _Chunks:
    """Prefill rows whose contexts are expanded together."""

    tiles: Tiles
    context_J: torch.Tensor  # int64: cache rows of their contexts, end to end


@dataclasses.dataclass(frozen=True, slots=True)
class GPUPlan:
    """See Plan in nmoe/worker/model/mla.py."""

    batch: Batch
    rope_M2P: torch.Tensor
    page_size: int
    contexts_R: torch.Tensor | None  # of the decode rows, int32; None without any
    prefix: torch.Tensor | None
    chunks: list[_Chunks]

    @classmethod
    def of(cls, batch: Batch, cache: KVCache, rope_M2P: torch.Tensor, architecture: Architecture) -> "GPUPlan":
        """From the step's rows."""
        contexts_R, prefix = None, None
        if decodes := batch.num_decodes:
            contexts_R, prefix = page_prefix(batch.positions_T[:decodes], cache.page_size)
        a = architecture
        per_token = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim) * cache.rows_LNSC.element_size()
        chunks = [
            _expand(batch, cache.page_size, rows) for rows in _groups(batch, max(1, _EXPANDED_BYTES // per_token))
        ]
        return cls(batch, rope_M2P, cache.page_size, contexts_R, prefix, chunks)

    def enter(
        self, q_THQ: torch.Tensor, kv_TC: torch.Tensor, norm_L: torch.Tensor, rows_KC: torch.Tensor
    ) -> torch.Tensor:
        """See Plan."""
        batch = self.batch
        rope_and_cache(q_THQ, kv_TC, batch.positions_T, batch.write_T, self.rope_M2P, norm_L, rows_KC, _LATENT_EPS)
        return q_THQ

    def attend(self, q_THQ: torch.Tensor, rows_KC: torch.Tensor, up: Up) -> torch.Tensor:
        """See Plan."""
        heads, nope, latent = up.w_uk_HNL.shape
        out_THV = q_THQ.new_empty(len(q_THQ), heads, up.w_uv_HVL.shape[1])
        if decodes := self.batch.num_decodes:
            assert self.contexts_R is not None and self.prefix is not None
            q_RHQ, pages_RB = q_THQ[:decodes], self.batch.pages_RP[:decodes]
            q_latent_HRL = torch.bmm(q_RHQ[..., :nope].transpose(0, 1), up.w_uk_HNL)
            latent_HRL = absorbed_decode(
                q_latent_HRL, q_RHQ, rows_KC, pages_RB, self.contexts_R, self.prefix, self.page_size, up.scale
            )
            torch.bmm(latent_HRL, up.w_uv_HVL.transpose(1, 2), out=out_THV[:decodes].transpose(0, 1))
        for chunks in self.chunks:
            context_JC = F.embedding(chunks.context_J, rows_KC)
            kv_JHX = F.linear(context_JC[:, :latent], up.w_HXL.flatten(0, 1)).view(len(context_JC), heads, -1)
            expanded_chunks(q_THQ, kv_JHX, context_JC[:, latent:], chunks.tiles, up.scale, out_THV)
        return out_THV


def _groups(batch: Batch, most: int) -> list[range]:
    """The prefill rows in order, in groups whose contexts are together at most `most` tokens, or one row."""
    groups, first, tokens = [], batch.num_decodes, 0
    for row in range(batch.num_decodes, len(batch.contexts)):
        if row > first and tokens + batch.contexts[row] > most:
            groups.append(range(first, row))
            first, tokens = row, 0
        tokens += batch.contexts[row]
    if first < len(batch.contexts):
        groups.append(range(first, len(batch.contexts)))
    return groups


def _expand(batch: Batch, page_size: int, rows: range) -> _Chunks:
    starts = batch.starts[rows.start : rows.stop + 1]
    contexts = [0]
    for row in rows:
        contexts.append(contexts[-1] + batch.contexts[row])
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    tiles = [(row, start) for row, length in enumerate(lengths) for start in range(0, length, BLOCK_M)]
    device, total = batch.pages_RP.device, contexts[-1]
    sizes = [len(tiles), len(tiles), len(starts), len(contexts)]
    host = torch.tensor(
        [*(row for row, _ in tiles), *(start for _, start in tiles), *starts, *contexts], dtype=torch.int32
    )
    row_, start_, queries, ends = torch.split(host.pin_memory().to(device, non_blocking=True), sizes)
    row_J = torch.repeat_interleave(torch.arange(len(rows), device=device), ends[1:] - ends[:-1], output_size=total)
    position_J = torch.arange(total, device=device) - ends[row_J]
    page_J = batch.pages_RP[row_J + rows.start, position_J // page_size]
    return _Chunks(Tiles(row_, start_, queries, ends), page_J * page_size + position_J % page_size)
