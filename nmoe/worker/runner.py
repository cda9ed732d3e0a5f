"""Turns Steps into forwards: slot table, batch, model, sampler.

Shape suffixes: T tokens of the step, R its rows, S rows that sample, V the vocabulary.

`launch` needs nothing from the previous step on the host: a decode row's input is its slot's last sampled token, which
stays on the device; positions, pages and random numbers depend only on the Step and the slot table. So a step can be
launched while the previous one runs. What changes only with the rows (their order, which of them sample, and how) is
computed once and kept while the Steps say that the rows continue.

After a step of many milliseconds the host's caches are cold, and each call into torch or numpy costs several times what
it costs in a loop. So a captured step whose rows continue makes as few calls as possible: it enters no inference mode,
slices no views and rewrites no words.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmoe.messages import CHANNEL_DECODE, Step
from nmoe.profiles import Numerics
from nmoe.worker.adjustments import Adjustment, Adjustments
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.blocks import Arena, Blocks
from nmoe.worker.graphs import StepGraph, StepGraphs
from nmoe.worker.inputs import Inputs, Layout, Parts, locate
from nmoe.worker.model import Model
from nmoe.worker.outputs import Outputs, Returning, Selection
from nmoe.worker.rows import Rows
from nmoe.worker.samplers import GPUSampler, ReferenceSampler, Sampled
from nmoe.worker.slots import DeviceSlots, MalformedStep, SlotTable
from nmoe.worker.stages import Stage, Stages

Array = npt.NDArray[Any]
_NO_IDS, _NO_PAGES = np.empty(0, np.int32), np.empty((2, 0), np.int32)
# Raw logits [S, V], tokens [S], and the log-probabilities of the draws, float32 [S], if any row draws.
_Sampled = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class Launched:
    """A launched step. On the CPU it is already complete."""

    def __init__(self, step_id: int, slots_S: Array, stage: Stage, stages: Stages, blocks: Blocks | None) -> None:
        """`slots_S`: the slots of the rows that sample."""
        self.step_id = step_id
        self._slots_S, self._failed = slots_S, slots_S[:0]
        self._blocks = blocks
        self._stage, self._stages = stage, stages

    def ready(self) -> bool:
        """Whether `tokens` would return without waiting."""
        return self._stage.ready()

    def tokens(self) -> bytes:
        """The sampled tokens, int32 [S], as in `StepDone.tokens`; waits for the device. Call once."""
        tokens = self._stage.tokens()
        self._stages.put_back(self._stage)
        self._failed = self._slots_S[np.frombuffer(tokens, np.int32) < 0]
        return tokens

    def blocks(self) -> tuple[bytes, bytes]:
        """`StepDone.blocks` and `block_sizes`; call after `tokens`. Writes the logits to their cells."""
        return self._blocks.finish() if self._blocks is not None else (b"", b"")

    def failed(self) -> bytes:
        """`StepDone.failed`; call after `tokens`."""
        failed = self._failed
        if self._blocks is not None:
            failed = np.union1d(failed, self._blocks.failed())
        return failed.astype(np.int32).tobytes()


class Runner:
    """One rank's model, cache and slots."""

    def __init__(
        self, model: Model, cache: KVCache, *, num_slots: int, max_seq_len: int, arena: Arena | None = None
    ) -> None:
        """`arena`: where returned logits go; without it, no request can ask for them."""
        pages_per_slot = -(-max_seq_len // cache.page_size)
        self._model = model
        self.exchange = model.exchange
        self._cache = cache
        self._device = model.device
        self._table = SlotTable(num_slots, pages_per_slot, cache.page_size, cache.num_pages)
        self._slots = DeviceSlots(num_slots, pages_per_slot, cache.num_pages, model.device)
        sampler = GPUSampler if model.device.type == "cuda" else ReferenceSampler
        self._sampler = sampler(self._table, self._slots, model.architecture.vocab_size)
        self._adjustments = Adjustments(num_slots, model.architecture.vocab_size, model.device)
        self._outputs = Outputs(model, cache, self._slots.pages_SP, arena)
        self._inputs = Inputs(self._slots.nobody)
        self._stages = Stages(model.device)
        self._graphs: StepGraphs | None = None
        self.reset()

    def capture(self, max_batch_size: int, max_chunk: int, *, rehearsal: bool = False) -> None:
        """From now on, replay steps from CUDA graphs: those of up to `max_batch_size` rows that all decode, or whose
        other rows have up to `max_chunk` tokens in total. In a rehearsal (compiling.py), do all but capture them."""
        assert isinstance(self._sampler, GPUSampler)
        parts = self._model, self._cache, self._slots, self._sampler
        self._graphs = StepGraphs(*parts, max_batch_size, max_chunk, rehearsal=rehearsal)

    def reset(self) -> None:
        """Forget every request; the weights and the cache's memory stay. All ranks must do so, or none."""
        self._table.reset()
        self._adjustments.reset()
        self._outputs.reset()
        if self._graphs:
            self._graphs.forget()
        self._take_rows(np.empty((0, 4), np.int32))
        self._ends = np.empty(0, np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of the most recently launched step."""
        return self._rows.num_tokens

    def launch(self, step: Step) -> Launched:
        """Start `step` without waiting for the device. Raises MalformedStep, from which there is no recovery."""
        try:
            firsts, ids, pages_2N = self._prepare(step)
            selection = self._outputs.select(self._returning, firsts, self._ends, step.cells)
        except MalformedStep as error:
            raise MalformedStep(f"step {step.step_id}: {error}") from None
        rows, stage = self._rows, self._stages.take()
        graph = self._graphs.find(step, rows, self._ends) if self._graphs else None
        layout = graph.layout if graph else Layout(len(rows.slots), rows.num_tokens)
        words = self._inputs.write(layout, rows, firsts, ids)
        if pages_2N.size:
            words = np.concatenate((words, pages_2N.ravel()))
        inputs = graph.upload(stage, words) if graph else stage.upload(words)
        if pages_2N.size:
            self._slots.append(inputs[-pages_2N.size :].view(2, -1))
        if graph:
            graph.replay()
            hidden_TD = graph.hidden_TD
            sampled = self._take_sampled(graph, selection)
        else:
            hidden_TD, sampled = self._compute(step, layout.parts(inputs), selection)
        blocks = None
        if selection is not None:
            blocks = self._outputs.compute(selection, hidden_TD, *sampled, step.numerics)
        stage.download(sampled[1])
        return Launched(step.step_id, rows.sampling_slots, stage, self._stages, blocks)

    @torch.inference_mode()
    def _compute(
        self, step: Step, parts: Parts[torch.Tensor], selection: Selection | None
    ) -> tuple[torch.Tensor, _Sampled]:
        """The hidden states and tokens of a step launched kernel by kernel."""
        self.exchange.begin(step.channel, step.num_tokens)
        # An idle rank runs the layers too, because its experts serve the other ranks' tokens.
        hidden_TD = self._model.forward(self._batch(parts), self._cache, step.numerics)
        return hidden_TD, self._sample_last(hidden_TD, parts, step.numerics, selection)

    def _take_sampled(self, graph: StepGraph, selection: Selection | None) -> _Sampled:
        """The tokens of a captured step."""
        if graph.logits_RV is None:
            return self._sample_last(graph.hidden_TD, graph.parts, graph.numerics, selection)
        logits_SV, tokens_S, logprobs_S = graph.results(len(self._rows.slots))
        if self._sampler.simple and self._adjustment is None:
            return logits_SV, tokens_S, logprobs_S if self._sampler.draws else None
        return logits_SV, *self._sample(logits_SV, graph.parts, selection)

    @torch.inference_mode()
    def _sample_last(
        self, hidden_TD: torch.Tensor, parts: Parts[torch.Tensor], numerics: Numerics, selection: Selection | None
    ) -> _Sampled:
        """The tokens of the rows that sample, from the hidden states of their last positions."""
        if not (count := len(self._rows.sampling)):
            return hidden_TD[:0], parts.sampling_slots[:0], None
        logits_SV = self._model.logits(hidden_TD[parts.last_tokens[:count]], numerics)
        return logits_SV, *self._sample(logits_SV, parts, selection)

    @torch.inference_mode()
    def _sample(self, logits_SV: torch.Tensor, parts: Parts[torch.Tensor], selection: Selection | None) -> Sampled:
        """The step's tokens. If anything is returned, the logits are left unchanged."""
        if self._adjustment is None:
            return self._sampler.sample(logits_SV, parts)
        raw_SV, logits_SV = logits_SV, logits_SV.float()
        if selection is not None and logits_SV is raw_SV:
            logits_SV = raw_SV.clone()
        self._adjustments.apply(self._adjustment, logits_SV, self._ends[self._rows.sampling])
        tokens_S, drawn_S = self._sampler.sample(logits_SV, parts)
        self._adjustments.count(self._adjustment, tokens_S)
        return tokens_S, drawn_S

    def _prepare(self, step: Step) -> tuple[Array, Array, Array]:
        """Update the slots with `step`. Returns the first position of each row, int64, and the new ids and pages, the
        latter int32 [2, N] as `DeviceSlots.append` takes them."""
        if step.admits:
            self._table.admit(step.admits)
            self._sampler.admit(step.admits)
            self._adjustments.admit(step.admits)
            self._outputs.admit(step.admits)
        pages_2N = _NO_PAGES
        if step.pages:
            pages_2N = self._table.append_pages(np.frombuffer(step.pages, np.int32).reshape(-1, 2))
        if step.rows is None:
            firsts = self._ends
        else:
            given = np.frombuffer(step.rows, np.int32).reshape(-1, 4)
            self._take_rows(given)
            firsts = given[:, 1].astype(np.int64)
        rows = self._rows
        if len(step.ids) != 4 * rows.num_ids or rows.num_tokens > step.num_tokens:
            raise MalformedStep(
                f"{len(step.ids) // 4} ids where its rows need {rows.num_ids};"
                f" {rows.num_tokens} tokens of at most {step.num_tokens}"
            )
        if rows.num_ids and step.channel == CHANNEL_DECODE:
            raise MalformedStep(f"{rows.num_ids} ids on the channel of decode steps, whose tokens the device has")
        self._ends = self._table.advance(rows.slots, firsts, rows.counts)
        return firsts, np.frombuffer(step.ids, np.int32) if step.ids else _NO_IDS, pages_2N

    def _take_rows(self, given: Array) -> None:
        """Compute what depends on a Step's rows [R, 4] and stays valid until it brings new ones."""
        self._rows, table = Rows.of(given, self._table), self._table
        slots_S = self._rows.sampling_slots
        table.sampled[slots_S] = True
        self._sampler.take_rows(slots_S)
        self._adjustment: Adjustment | None = self._adjustments.plan(slots_S)
        self._returning: Returning | None = self._outputs.plan(self._rows.slots, self._rows.starts, self._rows.flags)

    def _batch(self, parts: Parts[torch.Tensor]) -> Batch:
        rows, ends = self._rows, self._ends
        needed = -(-int(ends.max(initial=0)) // self._cache.page_size)
        ids_T, positions_T, write_T, pages_RP = locate(parts, self._slots, self._cache.page_size)
        return Batch(
            ids_T=ids_T,
            positions_T=positions_T,
            write_T=write_T,
            starts=rows.starts.tolist(),
            contexts=ends.tolist(),
            pages_RP=pages_RP[:, :needed],
            num_decodes=rows.num_decodes,
        )
