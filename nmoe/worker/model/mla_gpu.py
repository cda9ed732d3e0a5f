"""Attention on the GPU: decode rows absorbed over pages, prefill chunks expanded from theirs.

Everything is derived from the batch's device tensors and the lengths known to the host, without waiting for the device;
a captured step needs no lengths.

Shape suffixes as in nmoe/worker/model/mla.py.
"""

import dataclasses

import numpy as np
import torch

from nmoe.architecture import Architecture
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.chunks import BLOCK, Chunks, cut
from nmoe.worker.kernels.mla import LATENT_EPS, Up
from nmoe.worker.kernels.mla_decode_triton import absorbed_decode, page_prefix
from nmoe.worker.kernels.mla_inputs_triton import enter
from nmoe.worker.kernels.mla_prefill_triton import expanded_chunks
from nmoe.worker.stages import put

_EXPANDED_BYTES = 1 << 31  # keys and values expanded at a time


@dataclasses.dataclass(frozen=True, slots=True)
class PagedPlan:
    """What the plans of both classes share, and how they write the cache. See Plan in nmoe/worker/model/mla.py."""

    batch: Batch
    rope_M2P: torch.Tensor
    page_size: int
    contexts_R: torch.Tensor | None  # of the decode rows, int32; None if there are none
    prefix: torch.Tensor | None
    chunks: list[Chunks]

    def enter(
        self,
        q_THQ: torch.Tensor,
        kv_TC: torch.Tensor,
        norm_L: torch.Tensor,
        rows_KC: torch.Tensor,
        up: Up,
        absorbed_RHL: torch.Tensor,
    ) -> None:
        """Write the cache, rope the queries in place, and absorb the first R of them into `absorbed_RHL`."""
        positions_T, write_T, w_uk_HNL = self.batch.positions_T, self.batch.write_T, up.w_uk_HNL
        table, eps = self.rope_M2P, LATENT_EPS
        enter(q_THQ, kv_TC, positions_T, write_T, table, norm_L, rows_KC, eps, w_uk_HNL, absorbed_RHL)


class GPUPlan(PagedPlan):
    """See Plan in nmoe/worker/model/mla.py."""

    __slots__ = ()

    @classmethod
    def of(cls, batch: Batch, cache: KVCache, rope_M2P: torch.Tensor, architecture: Architecture) -> "GPUPlan":
        """Build from the step's rows."""
        contexts_R, prefix = None, None
        if decodes := batch.num_decodes:
            positions_R = batch.positions_T[:decodes] if batch.decodes_R is None else batch.decodes_R
            contexts_R, prefix = page_prefix(positions_R, cache.page_size)
        a = architecture
        per_token = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim) * cache.rows_LNSC.element_size()
        chunks = chunks_of(batch, max(1, _EXPANDED_BYTES // per_token))
        return cls(batch, rope_M2P, cache.page_size, contexts_R, prefix, chunks)

    def attend(
        self, q_THQ: torch.Tensor, kv_TC: torch.Tensor, norm_L: torch.Tensor, rows_KC: torch.Tensor, up: Up
    ) -> torch.Tensor:
        """See Plan."""
        (heads, _, latent), decodes = up.w_uk_HNL.shape, self.batch.num_decodes
        out_THV = q_THQ.new_empty(len(q_THQ), heads, up.w_uv_HVL.shape[1])
        q_latent_HRL = q_THQ.new_empty(heads, decodes, latent)
        self.enter(q_THQ, kv_TC, norm_L, rows_KC, up, q_latent_HRL.transpose(0, 1))
        if decodes:
            assert self.contexts_R is not None and self.prefix is not None
            absorbed_decode(
                q_latent_HRL,
                q_THQ[:decodes],
                rows_KC,
                self.batch.pages_RP[:decodes],
                self.contexts_R,
                self.prefix,
                self.page_size,
                up.scale,
                up.w_uv_HVL,
                out_THV[:decodes],
            )
        for chunks in self.chunks:
            expanded_chunks(q_THQ, rows_KC, self.batch.pages_RP, up.w_HXL, chunks, self.page_size, up.scale, out_THV)
        return out_THV


def chunks_of(batch: Batch, most: int) -> list[Chunks]:
    """The step's prefill rows, in groups of at most `most` context positions, or one row."""
    return [batch.chunks] if batch.chunks is not None else [_chunks(batch, rows) for rows in _groups(batch, most)]


def _groups(batch: Batch, most: int) -> list[range]:
    """The prefill rows in order, in groups whose contexts total at most `most` tokens, or one row."""
    groups, first, tokens = [], batch.num_decodes, 0
    for row in range(batch.num_decodes, len(batch.contexts)):
        if row > first and tokens + batch.contexts[row] > most:
            groups.append(range(first, row))
            first, tokens = row, 0
        tokens += batch.contexts[row]
    if first < len(batch.contexts):
        groups.append(range(first, len(batch.contexts)))
    return groups


def _chunks(batch: Batch, rows: range) -> Chunks:
    """These rows in the form attention takes, uploaded in one copy that does not block the host."""
    starts, contexts = np.array(batch.starts), np.array(batch.contexts)
    counts = np.diff(starts)
    pieces = cut(counts[rows.start : rows.stop], contexts[rows.start : rows.stop], rows.start)
    offsets = np.zeros_like(contexts)
    offsets[rows.start : rows.stop] = pieces.offsets
    blocks = len(pieces.block_row)
    tiles = [np.array([len(pieces.tile_row)]), pieces.tile_row, pieces.tile_start]
    arrays = [starts, contexts - counts, offsets, *tiles, np.array([blocks]), pieces.block_row, pieces.block_start]
    words = put(np.concatenate(arrays).astype(np.int32), batch.pages_RP.device)
    parts = torch.split(words, [len(array) for array in arrays])
    return Chunks(blocks * BLOCK, *parts)
