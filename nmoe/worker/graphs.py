"""Decode steps as CUDA graphs, one per batch size of a ladder.

A step of rows that each go on from their slot's last token needs nothing from the host but where its rows are: slots,
positions, where their cache rows go, and pages. They go up in one copy from pinned memory into a place the graphs read;
a batch between two sizes is filled up with rows that belong to nobody. Several staging buffers take turns, so that a
step can be launched while the copies of those in flight may still be under way.

Shape suffixes: R rows, padded to the graph's size, P pages of a slot, V vocabulary.
"""

import bisect

import numpy as np
import numpy.typing as npt
import torch

from nmoe.messages import CHANNEL_DECODE
from nmoe.profiles import Numerics
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.model import Model
from nmoe.worker.sampler import greedy

_STAGES = 3  # one more than the steps in flight
_HEAD = 2  # words of a graph's inputs before those of its rows: how many rows there are, and one to keep 16 bytes whole

Int64s = npt.NDArray[np.int64]


def ladder(largest: int) -> list[int]:
    """The batch sizes that are captured: dense where a step is short, and wherever padding would cost over 1/8."""
    sizes = [1, 2, 4, 8, 12, 16]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(8, sizes[-1] // 8 // 8 * 8))
    return [*(size for size in sizes if size < largest), largest]


class DecodeGraphs:
    """The captured steps of one model, cache and slot table."""

    def __init__(
        self, model: Model, cache: KVCache, last_S: torch.Tensor, pages_per_slot: int, max_batch_size: int
    ) -> None:
        """Capture all sizes; `last_S` has one more entry than there are slots, for the rows that belong to nobody."""
        self._model, self._cache, self._last_S = model, cache, last_S
        self._pages = pages_per_slot
        self._sizes = ladder(max_batch_size)
        words = _HEAD + max_batch_size * (3 + pages_per_slot)
        self._inputs = torch.zeros(words, dtype=torch.int64, device=model.device)
        self._staging = [torch.zeros(words, dtype=torch.int64).pin_memory() for _ in range(_STAGES)]
        self._turn = 0
        self._logits_RV = torch.empty(
            max_batch_size, model.architecture.vocab_size, dtype=model.dtype, device=model.device
        )
        self._tokens_R = torch.empty(max_batch_size, dtype=torch.int32, device=model.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._capture()

    def covers(self, rows: int) -> bool:
        """Whether a step of so many rows can be replayed."""
        return 0 < rows <= self._sizes[-1]

    def launch(
        self, num_tokens: int, slots: Int64s, positions: Int64s, places: Int64s, pages_RP: Int64s
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replay the step of these rows: their logits [R, V] in the model's dtype and greedy tokens, int32 [R].

        `num_tokens` are those of the rank with most, so that all ranks replay the same size; this one may have none.
        Both are overwritten by the next launch. The greedy tokens have become their slots' last ones.
        """
        rows = len(slots)
        size = self._sizes[bisect.bisect_left(self._sizes, num_tokens)]
        staging = self._staging[self._turn]
        self._turn = (self._turn + 1) % _STAGES
        host = staging.numpy()[: _HEAD + size * (3 + self._pages)]
        host[0] = rows
        head_3R = host[_HEAD : _HEAD + 3 * size].reshape(3, size)
        table_RP = host[_HEAD + 3 * size :].reshape(size, self._pages)
        head_3R[:, :rows] = slots, positions, places
        head_3R[:, rows:] = self._nobody()
        table_RP[:rows, : pages_RP.shape[1]] = pages_RP
        table_RP[rows:, 0] = self._cache.num_pages
        self._inputs[: len(host)].copy_(staging[: len(host)], non_blocking=True)
        self._graphs[size].replay()
        return self._logits_RV[:rows], self._tokens_R[:rows]

    def _nobody(self) -> Int64s:
        """Slot, position and place of a padding row, int64 [3, 1]: the reserved page's first position."""
        return np.array([[len(self._last_S) - 1], [0], [self._cache.num_pages * self._cache.page_size]], np.int64)

    def _capture(self) -> None:
        host = self._staging[0].numpy()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            host[0] = 0
            host[_HEAD : _HEAD + 3 * size].reshape(3, size)[:] = self._nobody()
            host[_HEAD + 3 * size : _HEAD + size * (3 + self._pages)] = self._cache.num_pages
            self._inputs.copy_(self._staging[0])
            self._step(size)  # compiles its kernels, outside the capture
            self._graphs[size] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(size)

    def _step(self, size: int) -> None:
        rows, inputs = self._inputs[:1], self._inputs[_HEAD : _HEAD + size * (3 + self._pages)]
        slots_R, positions_R, places_R = inputs[: 3 * size].view(3, size).unbind()
        self._model.exchange.begin(CHANNEL_DECODE, size, rows)
        batch = Batch(
            ids_T=self._last_S[slots_R],
            positions_T=positions_R,
            write_T=places_R,
            starts=[],
            contexts=[],
            pages_RP=inputs[3 * size :].view(size, self._pages),
            num_decodes=size,
        )
        logits_RV = self._logits_RV[:size]
        self._model.logits_into(self._model.forward(batch, self._cache, Numerics.FAST), logits_RV, Numerics.FAST)
        tokens_R = greedy(logits_RV)
        self._tokens_R[:size].copy_(tokens_R)
        self._last_S.index_copy_(0, slots_R, tokens_R)
