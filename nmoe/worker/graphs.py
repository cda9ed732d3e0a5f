"""Steps as CUDA graphs: decode steps over a ladder of batch sizes, steps with chunks over a ladder of token counts.

A captured step reads everything about its rows from words at a fixed address (inputs.py) and from the slots' tables, so
one graph serves any split of its tokens into decodes and chunks; unused tokens and rows are padding. Steps beyond the
ladders are launched kernel by kernel: those with more tokens, and those whose chunks' contexts exceed `_CONTEXTS` in
total. Their kernels run long enough for the host to stay ahead of the device anyway.

Shape suffixes: R rows, T tokens, padded to the graph's sizes, V vocabulary.
"""

import bisect
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL, Step
from nmoe.profiles import Numerics
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.chunks import BLOCK, TILE
from nmoe.worker.inputs import Inputs, Layout, locate
from nmoe.worker.model import Model
from nmoe.worker.rows import Rows
from nmoe.worker.samplers import GPUSampler
from nmoe.worker.slots import DeviceSlots, SlotTable
from nmoe.worker.stages import Stage

Array = npt.NDArray[Any]

_CONTEXTS = 16384  # positions that a captured step's chunks can attend to, each context rounded up to whole blocks


def ladder(largest: int) -> list[int]:
    """The batch sizes to capture: dense where steps are short, and wherever padding would cost over 1/8."""
    sizes = [1, 2, 4, 8, 12, 16]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(8, sizes[-1] // 8 // 8 * 8))
    return [*(size for size in sizes if size < largest), largest]


def chunk_ladder(largest: int) -> list[int]:
    """The token counts to capture for steps with chunks. Up to 512 tokens, padding hardly makes a step longer."""
    sizes = [16, 32, 64, 128, 256, 384, *range(512, largest, 128)]
    return [*(size for size in sizes if size < largest), largest]


class StepGraph:
    """One captured step. Its results are overwritten by the next launch of any graph."""

    def __init__(self, numerics: Numerics, channel: int, layout: Layout, inputs: torch.Tensor) -> None:
        self.numerics, self.channel = numerics, channel
        self.layout = layout
        self.inputs = inputs
        self.parts = layout.parts(inputs)
        self.graph = torch.cuda.CUDAGraph()
        self.hidden_TD: torch.Tensor  # after the final norm
        self.logits_RV: torch.Tensor | None = None  # of a decode step, in the model's dtype
        # Of a decode step, as if no row had top-k, top-p or adjusted logits; see GPUSampler.sample_any.
        self.tokens_R: torch.Tensor
        self.logprobs_R: torch.Tensor
        self._count = -1  # rows of the cached results

    def upload(self, stage: Stage, words: Array) -> torch.Tensor:
        """Upload a step's words to `inputs`; returns them there."""
        return stage.upload(words, self.inputs, by_kernel=True)

    def replay(self) -> None:
        """Run it on the words uploaded to `inputs`."""
        self.graph.replay()

    def results(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A decode step's logits, tokens and log-probabilities for its first `rows`."""
        if rows != self._count:
            assert self.logits_RV is not None
            self._count = rows
            self._results = self.logits_RV[:rows], self.tokens_R[:rows], self.logprobs_R[:rows]
        return self._results


class RehearsedStep(StepGraph):
    """A step that is not captured: its kernels were compiled (compiling.py), and its results mean nothing."""

    def upload(self, stage: Stage, words: Array) -> torch.Tensor:
        """By the copy engine: kernels are not launched, and what follows a step may index by its words."""
        super().upload(stage, words)
        return stage.upload(words, self.inputs)

    def replay(self) -> None:
        """There is nothing to run."""


class StepGraphs:
    """The captured steps of one model, cache and slots."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        slots: DeviceSlots,
        sampler: GPUSampler,
        max_batch_size: int,
        max_chunk: int,
        *,
        rehearsal: bool = False,
    ) -> None:
        """Capture the steps of the fast class; those of the exact class are captured on first use of each size. In a
        rehearsal, launch each kernel by kernel instead."""
        self._rehearsal = rehearsal
        self._model, self._cache, self._slots, self._sampler = model, cache, slots, sampler
        self._max_batch_size = max_batch_size
        decodes, chunks = ladder(max_batch_size), chunk_ladder(max_batch_size + max_chunk)
        # Few servers run exact steps, so these are captured on demand, and in fewer sizes.
        self._sizes = {
            (Numerics.FAST, CHANNEL_DECODE): decodes,
            (Numerics.FAST, CHANNEL_PREFILL): chunks,
            (Numerics.EXACT, CHANNEL_DECODE): decodes[::-1][::4][::-1],
            (Numerics.EXACT, CHANNEL_PREFILL): chunks[::-1][::4][::-1],
        }
        most = self._layout(CHANNEL_PREFILL, chunks[-1])
        self._inputs = torch.zeros(most.size + 2 * slots.pages_SP.numel(), dtype=torch.int32, device=model.device)
        vocab = model.architecture.vocab_size
        self._logits_RV = torch.empty(max_batch_size, vocab, dtype=model.dtype, device=model.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._graphs: dict[tuple[Numerics, int, int], StepGraph] = {}
        for (numerics, channel), sizes in self._sizes.items():
            for size in reversed(sizes if numerics is Numerics.FAST else []):
                self._graph(numerics, channel, size)

    def forget(self) -> None:
        """Drop the graphs captured on demand. If only some ranks got a step, only those may have captured its graph;
        the others would capture it later, exchanging tokens that these ranks do not expect."""
        torch.cuda.synchronize()  # a dropped graph may still be running
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] is Numerics.FAST}

    def find(self, step: Step, rows: Rows, ends: Array) -> StepGraph | None:
        """The graph for this step, if there is one; the same on all ranks, except where contexts are too long."""
        decodes = step.channel == CHANNEL_DECODE
        sizes = self._sizes[step.numerics, step.channel]
        if not 0 < step.num_tokens <= sizes[-1] or len(rows.slots) > self._max_batch_size:
            return None
        # A capture exchanges tokens with the other ranks, so no rank may skip it.
        graph = self._graph(step.numerics, step.channel, sizes[bisect.bisect_left(sizes, step.num_tokens)])
        if not decodes and -(-ends[rows.num_decodes :] // BLOCK).sum() * BLOCK > _CONTEXTS:
            return None
        return graph

    def _layout(self, channel: int, size: int) -> Layout:
        rows = min(size, self._max_batch_size)
        if channel == CHANNEL_DECODE:
            return Layout(rows, size)
        # Padding is split into tiles too.
        return Layout(rows, size, tiles=size // TILE + rows + 1, blocks=_CONTEXTS // BLOCK)

    def _graph(self, numerics: Numerics, channel: int, size: int) -> StepGraph:
        if (graph := self._graphs.get((numerics, channel, size))) is None:
            graph = self._graphs[numerics, channel, size] = self._capture(numerics, channel, size)
        return graph

    @torch.inference_mode()
    def _capture(self, numerics: Numerics, channel: int, size: int) -> StepGraph:
        layout = self._layout(channel, size)
        kind = RehearsedStep if self._rehearsal else StepGraph
        graph = kind(numerics, channel, layout, self._inputs)
        nobody = Rows.of(np.empty((0, 4), np.int32), SlotTable(0, 0, 1, 0))
        words = Inputs(self._slots.nobody).write(layout, nobody, nobody.slots, nobody.slots)
        torch.cuda.synchronize()
        self._inputs[: layout.size].copy_(torch.from_numpy(words))
        with torch.cuda.stream(self._stream):
            self._step(graph)  # loads the kernels outside the capture
            self._stream.synchronize()
            if self._rehearsal:
                return graph
            # torch.cuda.graph would run the garbage collector first, which takes longer than the capture.
            graph.graph.capture_begin(pool=self._pool)
            self._step(graph)
            graph.graph.capture_end()
        return graph

    def _step(self, graph: StepGraph) -> None:
        layout, numerics = graph.layout, graph.numerics
        parts = graph.parts
        self._model.exchange.begin(graph.channel, layout.tokens, parts.real)
        ids_T, positions_T, write_T, pages_RP = locate(parts, self._slots, self._cache.page_size)
        batch = Batch(
            ids_T=ids_T,
            positions_T=positions_T,
            write_T=write_T,
            starts=[],
            contexts=[],
            pages_RP=pages_RP,
            num_decodes=layout.rows,
            decodes_R=parts.decodes,
            chunks=layout.chunks(parts, _CONTEXTS) if graph.channel == CHANNEL_PREFILL else None,
        )
        graph.hidden_TD = self._model.forward(batch, self._cache, numerics)
        if graph.channel == CHANNEL_PREFILL:
            return
        graph.logits_RV = self._logits_RV[: layout.rows]
        self._model.logits_into(graph.hidden_TD, graph.logits_RV, numerics)
        graph.tokens_R, graph.logprobs_R = self._sampler.sample_any(graph.logits_RV, parts, simple=True)
