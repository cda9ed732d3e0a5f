"""Turns Steps into forwards: slot table, batch, model, sampler.

Shape suffixes: T tokens of the step, R its rows, S rows that sample, V the vocabulary.

`launch` needs nothing of the previous step on the host: a decode row's input is its slot's last sampled token, which
stays on the device, and positions, pages and random numbers follow from the Step and the slot table alone. So a step
can be launched while the one before it runs. What only changes with the rows (their order, which of them sample, how)
is made once and kept while the Steps say that the rows go on.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmoe.messages import CHANNEL_DECODE, ROW_HAS_IDS, ROW_SAMPLES, Step
from nmoe.profiles import Numerics
from nmoe.worker.adjustments import Adjustment, Adjustments
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.blocks import Arena, Blocks
from nmoe.worker.graphs import DecodeGraphs
from nmoe.worker.model import Model
from nmoe.worker.outputs import Outputs, Returning, Selection
from nmoe.worker.philox import uniforms
from nmoe.worker.sampler import Plan, greedy, make_plan, sample
from nmoe.worker.slots import MalformedStep, SlotTable

Array = npt.NDArray[Any]
# Raw logits [S, V], tokens [S], and the log-probabilities of the draws, float32 [S], where some row draws.
_Sampled = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class Launched:
    """A step on its way. On the CPU it is done when it is made."""

    def __init__(self, step_id: int, tokens_S: torch.Tensor, blocks: Blocks | None = None) -> None:
        self.step_id = step_id
        self._blocks = blocks
        self._event: torch.cuda.Event | None = None
        if tokens_S.is_cuda:
            host_S = torch.empty(tokens_S.shape, dtype=torch.int32, pin_memory=True)
            host_S.copy_(tokens_S, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
            self._tokens_S = host_S
        else:
            self._tokens_S = tokens_S.to(torch.int32)

    def ready(self) -> bool:
        """Whether `tokens` would not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def tokens(self) -> bytes:
        """The sampled tokens, int32 [S], as `StepDone.tokens`; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens_S.numpy().tobytes()

    def blocks(self) -> tuple[bytes, bytes]:
        """`StepDone.blocks` and `block_sizes`, after `tokens`; logits are in their cells."""
        return self._blocks.finish() if self._blocks is not None else (b"", b"")


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a step, as far as they stay the same while the rows go on."""

    slots: Array  # int64 [R]
    counts: Array  # int64 [R]
    starts: list[int]  # [R + 1]
    num_tokens: int  # T
    num_continued: int  # rows without ids, which come first: their input is their slot's last token
    num_ids: int  # ids that the Step must bring
    num_decodes: int  # leading rows with one token
    token_slots: Array  # int64 [T]
    token_offsets: Array  # int64 [T]: how far into its row each token is
    sampling: Array  # int64 [S]: the rows that sample
    drawing_seeds: Array  # int64 [D]
    drawing: Array  # int64 [D]: the rows that draw
    continued_slots: torch.Tensor  # int64 [rows without ids], on the device
    sampling_slots: torch.Tensor  # int64 [S], on the device
    last_tokens: torch.Tensor  # int64 [S], on the device: the sampling rows' last tokens, in T
    plan: Plan
    adjustment: Adjustment | None  # of the sampling rows' logits
    returning: Returning | None  # what comes back besides tokens


class Runner:
    """One rank's model, cache and slots."""

    def __init__(
        self, model: Model, cache: KVCache, *, num_slots: int, max_seq_len: int, arena: Arena | None = None
    ) -> None:
        """`arena`: where logits go that come back; without it, no request can ask for them."""
        pages_per_slot = -(-max_seq_len // cache.page_size)
        self._model = model
        self.exchange = model.exchange
        self._cache = cache
        self._device = model.device
        self._slots = SlotTable(num_slots, pages_per_slot, cache.page_size, cache.num_pages, model.device)
        self._adjustments = Adjustments(num_slots, model.architecture.vocab_size, model.device)
        self._outputs = Outputs(model, self._slots, arena)
        self._graphs: DecodeGraphs | None = None
        self.reset()

    @torch.inference_mode()
    def capture(self, max_batch_size: int) -> None:
        """From here on, replay fast steps of up to `max_batch_size` decode rows from CUDA graphs."""
        self._graphs = DecodeGraphs(
            self._model, self._cache, self._slots.last_S, self._slots.pages.shape[1], max_batch_size
        )

    def reset(self) -> None:
        """Forget every request; the weights and the cache's memory stay."""
        self._slots.reset()
        self._adjustments.reset()
        self._outputs.reset()
        self._rows = self._form(np.empty((0, 4), np.int32))
        self._ends = np.empty(0, np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step launched last."""
        return self._rows.num_tokens

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Start `step`; returns without waiting for the device. Raises MalformedStep, which nothing can follow."""
        try:
            firsts, ids = self._prepare(step)
            selection = self._outputs.select(self._rows.returning, firsts, self._ends, step.cells)
        except MalformedStep as error:
            raise MalformedStep(f"step {step.step_id}: {error}") from None
        rows = self._rows
        self.exchange.begin(step.channel, step.num_tokens)
        graphs = self._graphs if step.numerics is Numerics.FAST else None
        if (
            graphs is not None
            and step.channel == CHANNEL_DECODE
            and graphs.covers(step.num_tokens)
            and not rows.num_ids
        ):
            hidden_TD, sampled = None, self._replay(graphs, step.num_tokens, firsts, selection)
        else:
            batch = self._batch(firsts, ids)
            # An idle rank goes through the layers too: there its experts serve the other ranks' tokens.
            hidden_TD = self._model.forward(batch, self._cache, step.numerics)
            sampled = self._sample_last(hidden_TD, step.numerics, selection)
        logits_SV, tokens_S, drawn_S = sampled
        if selection is None:
            return Launched(step.step_id, tokens_S)
        blocks = self._outputs.compute(selection, hidden_TD, logits_SV, tokens_S, drawn_S, step.numerics)
        return Launched(step.step_id, tokens_S, blocks)

    def _sample_last(self, hidden_TD: torch.Tensor, numerics: Numerics, selection: Selection | None) -> _Sampled:
        """The tokens of the rows that sample, from the hidden states of their last positions."""
        rows = self._rows
        if not len(rows.sampling):
            return hidden_TD[:0], rows.sampling_slots, None
        logits_SV = self._model.logits(hidden_TD[rows.last_tokens], numerics)
        tokens_S, drawn_S = self._sample(logits_SV, selection)
        self._slots.last_S.index_copy_(0, rows.sampling_slots, tokens_S)
        return logits_SV, tokens_S, drawn_S

    def _replay(self, graphs: DecodeGraphs, num_tokens: int, firsts: Array, selection: Selection | None) -> _Sampled:
        """The tokens of a step whose rows all go on from their last token."""
        rows, table = self._rows, self._slots
        places, pages = table.places_of(rows.slots, firsts), table.pages_of(rows.slots, self._ends)
        logits_SV, tokens_S = graphs.launch(num_tokens, rows.slots, firsts, places, pages)
        if not len(rows.drawing) and rows.adjustment is None:
            return logits_SV, tokens_S, None
        tokens_S, drawn_S = self._sample(logits_SV, selection)
        table.last_S.index_copy_(0, rows.sampling_slots, tokens_S)
        return logits_SV, tokens_S, drawn_S

    def _sample(self, raw_SV: torch.Tensor, selection: Selection | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The step's tokens, int64 [S]; a drawn one is at the position where its row ends. With something to return,
        also the log-probabilities of the draws, and the logits stay as they are."""
        rows, logits_SV = self._rows, raw_SV.float()
        if rows.adjustment is not None:
            if selection is not None and logits_SV is raw_SV:
                logits_SV = raw_SV.clone()
            self._adjustments.apply(rows.adjustment, logits_SV, self._ends[rows.sampling])
        drawn_S = None
        if len(rows.drawing):
            random_D = torch.from_numpy(uniforms(rows.drawing_seeds, self._ends[rows.drawing]))
            drawn_S = logits_SV.new_empty(len(logits_SV)) if selection is not None else None
            tokens_S = sample(logits_SV, rows.plan, random_D.to(self._device), drawn_S)
        else:
            tokens_S = greedy(logits_SV)
        if rows.adjustment is not None:
            self._adjustments.count(rows.adjustment, tokens_S)
        return tokens_S, drawn_S

    def _prepare(self, step: Step) -> tuple[Array, Array]:
        """Bring the slot table up to `step`; the first position of each row and the ids that came, int64."""
        if step.admits:
            self._slots.admit(step.admits)
            self._adjustments.admit(step.admits)
            self._outputs.admit(step.admits)
        if step.pages:
            self._slots.append_pages(np.frombuffer(step.pages, np.int32).reshape(-1, 2))
        if step.rows is None:
            firsts = self._ends
        else:
            given = np.frombuffer(step.rows, np.int32).reshape(-1, 4)
            self._rows = self._form(given)
            firsts = given[:, 1].astype(np.int64)
        rows = self._rows
        if len(step.ids) != 4 * rows.num_ids or rows.num_tokens > step.num_tokens:
            raise MalformedStep(
                f"{len(step.ids) // 4} ids where its rows need {rows.num_ids};"
                f" {rows.num_tokens} tokens of at most {step.num_tokens}"
            )
        self._ends = self._slots.advance(rows.slots, firsts, rows.counts)
        return firsts, np.frombuffer(step.ids, np.int32).astype(np.int64)

    def _form(self, given: Array) -> _Rows:
        """What follows from the rows [R, 4] of a Step until it brings new ones."""
        slots, counts, flags = (given[:, column].astype(np.int64) for column in (0, 2, 3))
        num_continued = len(slots) - int(np.count_nonzero(flags & ROW_HAS_IDS))
        self._check(slots, counts, flags, num_continued)
        starts = np.concatenate(([0], counts.cumsum()))
        sampling = np.flatnonzero(flags & ROW_SAMPLES)
        table, sampling_slots = self._slots, slots[sampling]
        table.sampled[sampling_slots] = True
        plan = make_plan(
            table.temperature[sampling_slots],
            table.top_k[sampling_slots],
            table.top_p[sampling_slots],
            table.min_p[sampling_slots],
            self._model.architecture.vocab_size,
            self._device,
        )
        drawing = sampling[plan.drawn]
        long = np.flatnonzero(counts != 1)
        return _Rows(
            slots=slots,
            counts=counts,
            starts=starts.tolist(),
            num_tokens=int(starts[-1]),
            num_continued=num_continued,
            num_ids=int(counts[num_continued:].sum()),
            num_decodes=int(long[0]) if len(long) else len(slots),
            token_slots=np.repeat(slots, counts),
            token_offsets=np.arange(starts[-1]) - np.repeat(starts[:-1], counts),
            sampling=sampling,
            drawing_seeds=table.seeds[slots[drawing]],
            drawing=drawing,
            continued_slots=self._put(slots[:num_continued]),
            sampling_slots=self._put(sampling_slots),
            last_tokens=self._put(starts[1:][sampling] - 1),
            plan=plan,
            adjustment=self._adjustments.plan(sampling_slots),
            returning=self._outputs.plan(slots, starts, flags),
        )

    def _check(self, slots: Array, counts: Array, flags: Array, num_continued: int) -> None:
        """Refuse rows that no slot table could make sense of."""
        table = self._slots
        wrong = (slots < 0) | (slots >= table.num_slots) | (counts < 1)
        if wrong.any():
            row = int(wrong.argmax())
            raise MalformedStep(f"row {row}: slot {slots[row]} of {table.num_slots}, {counts[row]} tokens")
        if len(np.unique(slots)) != len(slots):
            raise MalformedStep(f"two rows share a slot: {sorted(slots.tolist())}")
        wrong = ~table.sampled[slots] | (counts != 1) | (flags & ROW_SAMPLES == 0)
        wrong[num_continued:] = False
        wrong |= (flags & ROW_HAS_IDS != 0) != (np.arange(len(slots)) >= num_continued)
        if wrong.any():
            row = int(wrong.argmax())
            raise MalformedStep(
                f"row {row} (slot {slots[row]}): a row without ids has one token, samples, follows a sampled token and"
                " comes before all rows with ids"
            )

    def _batch(self, firsts: Array, ids: Array) -> Batch:
        rows, table = self._rows, self._slots
        if rows.num_tokens == len(rows.slots):
            positions = firsts
        else:
            positions = np.repeat(firsts, rows.counts) + rows.token_offsets
        continued_T = table.last_S[rows.continued_slots]
        ids_T, positions_T, write_T, pages_RP = self._put_all(
            ids, positions, table.places_of(rows.token_slots, positions), table.pages_of(rows.slots, self._ends)
        )
        return Batch(
            ids_T=torch.cat((continued_T, ids_T)) if len(ids) else continued_T,
            positions_T=positions_T,
            write_T=write_T,
            starts=rows.starts,
            contexts=self._ends.tolist(),
            pages_RP=pages_RP,
            num_decodes=rows.num_decodes,
        )

    def _put_all(self, *arrays: Array) -> list[torch.Tensor]:
        """The int64 arrays on the device, in one copy that the host does not wait for."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        host = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).pin_memory()
        parts = torch.split(host.to(self._device, non_blocking=True), [array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def _put(self, array: Array) -> torch.Tensor:
        """The array on the device, int64."""
        return torch.from_numpy(array).to(self._device, torch.int64, non_blocking=True)
