"""What rows return besides their tokens: which positions, and the tensors that describe them.

Shape suffixes: T tokens of the step, R its rows, S rows that sample, N rows that return something, M those of them that
sample, P positions of prompts that have a record, J routed positions, C cells, V vocabulary, K top-k, I ids whose
log-probabilities are wanted, W words of a record. In `pages_SP`: S slots, P pages of a slot.

Invariants: `_cursors[slot]` is where the slot's outputs continue; a row returns what lies between it and the row's end,
once. A prompt position's record is about the next token, which may come with a later step, so the slot keeps its
prompt. Which rows return something, and in what shape, depends on the rows alone and is computed once per set of rows;
a step without such rows does nothing here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmoe.messages import ROW_RETURNS, ROW_SAMPLES, Admit
from nmoe.outputs import Returns
from nmoe.profiles import Numerics
from nmoe.worker.batch import KVCache
from nmoe.worker.blocks import Arena, Blocks, Shapes
from nmoe.worker.kernels.records import make_records
from nmoe.worker.kernels.routing import read_routing
from nmoe.worker.model import Model
from nmoe.worker.slots import MalformedStep
from nmoe.worker.stages import put

Array = npt.NDArray[Any]
_TILE = 1 << 24  # prompt logits that exist at a time
# What a slot's request wants.
_WISH = np.dtype(
    [
        ("records", np.bool_),
        ("prompt", np.bool_),
        ("logits", np.bool_),
        ("routing", np.bool_),
        ("prompt_len", np.int64),
        ("top_k", np.int64),
        ("scored", np.int64),
    ]
)


@dataclasses.dataclass(frozen=True, slots=True)
class Returning:
    """The rows of a step that return something: the part that does not change while the rows continue."""

    rows: Array  # int64 [N]
    slots: Array  # int64 [N]
    starts: Array  # int64 [N]: where each row's tokens begin in T
    has_prompt: Array  # bool [N]
    has_sampled: Array  # bool [N]: whether it returns a record of the token it samples
    has_logits: Array  # bool [N]
    has_routing: Array  # bool [N]
    prompt_lens: Array  # int64 [N]
    top_k: Array  # int64 [N]
    scored: Array  # int64 [N]: how many ids
    scored_ids_NI: Array  # int64, the rows' ids, padded with zeros
    sampled_M: torch.Tensor  # int64, on the device: their indices in S
    scored_ids_MI: torch.Tensor  # int64, on the device
    celled_M: torch.Tensor  # int64, on the device: those of M that return logits


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """What one step returns: positions and tokens, on the host."""

    returning: Returning
    shapes: Shapes
    prompt_rows_P: Array  # int64: the row in N of each
    prompt_places_P: Array  # int64: the index in T of its hidden state
    prompt_tokens_P: Array  # int32, like sampled ones: the token that the record is about
    routed_slots_J: Array  # int64
    routed_positions_J: Array  # int64


class Outputs:
    """What each slot wants returned, and how much of it has been."""

    def __init__(self, model: Model, cache: KVCache, pages_SP: torch.Tensor, arena: Arena | None) -> None:
        """`pages_SP` is the slots' page table on the device; `arena` is where this rank's logits go, None if no request
        can ask for them."""
        self._model, self._cache, self._pages_SP, self._arena = model, cache, pages_SP, arena
        self._vocab_size = model.architecture.vocab_size
        num_slots = len(pages_SP)
        self._wishes = np.zeros(num_slots, _WISH)
        self._named = [np.empty(0, np.int64)] * num_slots  # the ids to be scored
        self._prompts = [np.empty(0, np.int32)] * num_slots
        self._cursors = np.zeros(num_slots, np.int64)

    def reset(self) -> None:
        """Forget every request."""
        self._wishes.fill(0)

    def admit(self, admits: Sequence[Admit]) -> None:
        """Start new requests in their slots."""
        for admit in admits:
            slot, returns = admit.slot, admit.returns
            if not returns:
                self._wishes[slot] = 0
                continue
            self._check(slot, returns)
            self._wishes[slot] = (
                returns.records,
                returns.prompt,
                returns.logits,
                returns.routing,
                admit.prompt_len,
                returns.top_k,
                len(returns.scored_ids),
            )
            self._named[slot] = np.array(returns.scored_ids, np.int64)
            self._cursors[slot] = admit.returned
            if returns.prompt:
                prompt = np.frombuffer(admit.past, np.int32)[: admit.prompt_len]
                if len(prompt) != admit.prompt_len:
                    raise MalformedStep(f"admit: slot {slot} returns its prompt's records and brings no prompt")
                self._prompts[slot] = prompt

    def _check(self, slot: int, returns: Returns) -> None:
        top = max(returns.scored_ids, default=0)
        if returns.top_k > self._vocab_size or top >= self._vocab_size or min(returns.scored_ids, default=0) < 0:
            raise MalformedStep(
                f"admit: slot {slot} asks for top {returns.top_k} and ids up to {top} of {self._vocab_size} tokens"
            )
        if returns.logits and self._arena is None:
            raise MalformedStep(f"admit: slot {slot} asks for logits, and there is no arena")
        if returns.routing and self._cache.routing_NSLK is None:
            raise MalformedStep(f"admit: slot {slot} asks for routing, and none is kept")

    def plan(self, slots: Array, starts: Array, flags: Array) -> Returning | None:
        """The plan for rows of these slots, int64 [R], with tokens starting at `starts`; None if no row returns any."""
        rows = np.flatnonzero(flags & ROW_RETURNS)
        if not len(rows):
            return None
        returning_slots = slots[rows]
        wishes = self._wishes[returning_slots]
        if not (wishes["records"] | wishes["routing"]).all():
            slot = returning_slots[(~(wishes["records"] | wishes["routing"])).argmax()]
            raise MalformedStep(f"a row of slot {slot} returns something, and its request asked for nothing")
        samples = flags & ROW_SAMPLES != 0
        has_sampled = samples[rows] & wishes["records"]
        scored_ids_NI = self._scored_ids(returning_slots, wishes["scored"])
        return Returning(
            rows=rows,
            slots=returning_slots,
            starts=starts[rows],
            has_prompt=wishes["prompt"],
            has_sampled=has_sampled,
            has_logits=wishes["logits"],
            has_routing=wishes["routing"],
            prompt_lens=wishes["prompt_len"],
            top_k=wishes["top_k"],
            scored=wishes["scored"],
            scored_ids_NI=scored_ids_NI,
            sampled_M=self._put((samples.cumsum() - 1)[rows[has_sampled]]),
            scored_ids_MI=self._put(scored_ids_NI[has_sampled]),
            celled_M=self._put(np.flatnonzero(wishes["logits"][has_sampled])),
        )

    def _scored_ids(self, slots_N: Array, scored_N: Array) -> Array:
        """The ids named by the requests in these slots, int64 [N, I], padded with zeros."""
        scored_ids_NI = np.zeros((len(slots_N), scored_N.max()), np.int64)
        for row in np.flatnonzero(scored_N):
            scored_ids_NI[row, : scored_N[row]] = self._named[slots_N[row]]
        return scored_ids_NI

    def select(self, returning: Returning | None, firsts: Array, ends: Array, cells: bytes) -> Selection | None:
        """What a step returns whose rows, int64 [R], span `firsts` to `ends`. Raises MalformedStep."""
        if returning is None:
            if cells:
                raise MalformedStep(f"{len(cells) // 4} cells where no row returns anything")
            return None
        slots, firsts, ends = returning.slots, firsts[returning.rows], ends[returning.rows]
        cursors = self._cursors[slots]
        begins = np.maximum(firsts, cursors)
        told = np.where(returning.has_prompt, np.minimum(ends, returning.prompt_lens - 1) - begins, 0).clip(0)
        routed = np.where(returning.has_routing, ends - cursors, 0).clip(0)
        records = told + returning.has_sampled
        cells_C = np.frombuffer(cells, np.int32)
        num_cells = np.where(returning.has_logits, records, 0)
        self._check_cells(cells_C, int(num_cells.sum()))
        self._cursors[slots] = np.maximum(cursors, ends)
        prompt_rows_P = np.repeat(np.arange(len(slots)), told)
        prompt_positions_P = begins[prompt_rows_P] + _counted(told)
        routed_rows_J = np.repeat(np.arange(len(slots)), routed)
        tokens = [self._prompts[slots[row]][begins[row] + 1 :][: told[row]] for row in np.flatnonzero(told)]
        return Selection(
            returning=returning,
            shapes=Shapes(
                told, returning.has_sampled, num_cells, routed, returning.top_k, returning.scored, cells_C, slots
            ),
            prompt_rows_P=prompt_rows_P,
            prompt_places_P=(returning.starts - firsts)[prompt_rows_P] + prompt_positions_P,
            prompt_tokens_P=np.concatenate(tokens) if tokens else np.empty(0, np.int32),
            routed_slots_J=slots[routed_rows_J],
            routed_positions_J=cursors[routed_rows_J] + _counted(routed),
        )

    def _check_cells(self, cells_C: Array, needed: int) -> None:
        if len(cells_C) != needed:
            raise MalformedStep(f"{len(cells_C)} cells where {needed} records have logits")
        if needed and self._arena is not None:
            mine = self._arena.cells
            if cells_C.min() < mine.start or cells_C.max() >= mine.stop or len(np.unique(cells_C)) != needed:
                raise MalformedStep(f"cells {cells_C.tolist()}: not of {mine.start} to {mine.stop - 1}, each once")

    @torch.inference_mode()
    def compute(
        self,
        selection: Selection,
        hidden_TD: torch.Tensor,
        logits_SV: torch.Tensor,
        tokens_S: torch.Tensor,
        drawn_S: torch.Tensor | None,
        numerics: Numerics,
    ) -> Blocks:
        """Start copying the outputs to the host. `logits_SV` are raw, in any dtype; `drawn_S` float32 is None if every
        row is greedy."""
        returning = selection.returning
        blocks = Blocks(selection.shapes, self._arena)
        if len(returning.sampled_M):
            sampled_M = returning.sampled_M
            words = make_records(
                logits_SV,
                sampled_M,
                tokens_S[sampled_M],
                0.0 if drawn_S is None else drawn_S[sampled_M],
                int(returning.top_k.max()),
                returning.scored_ids_MI,
            )
            blocks.add_sampled(words)
            if len(returning.celled_M):
                blocks.add_sampled_logits(logits_SV[sampled_M[returning.celled_M]])
        if len(selection.prompt_rows_P):
            self._score_prompts(selection, hidden_TD, numerics, blocks)
        if len(selection.routed_slots_J) and (routing_NSLK := self._cache.routing_NSLK) is not None:
            slots_J, positions_J = self._put(np.stack((selection.routed_slots_J, selection.routed_positions_J)))
            pages_J = self._pages_SP[slots_J, positions_J // self._cache.page_size]
            blocks.add_routing(read_routing(routing_NSLK, pages_J, positions_J))
        return blocks

    def _score_prompts(self, selection: Selection, hidden_TD: torch.Tensor, numerics: Numerics, blocks: Blocks) -> None:
        """Compute the prompts' records by tiles of positions: all their logits at once would fill the memory."""
        returning, rows_P = selection.returning, selection.prompt_rows_P
        size = max(1, _TILE // self._vocab_size)
        for begin in range(0, len(rows_P), size):
            tile = slice(begin, begin + size)
            rows = rows_P[tile]
            logits_PV = self._model.logits(hidden_TD[self._put(selection.prompt_places_P[tile])], numerics)
            words = make_records(
                logits_PV,
                torch.arange(len(rows), device=logits_PV.device),
                self._put(selection.prompt_tokens_P[tile]),
                math.nan,  # they were not drawn
                int(returning.top_k.max()),
                self._put(returning.scored_ids_NI[rows]),
            )
            blocks.add_prompts(words)
            celled = np.flatnonzero(returning.has_logits[rows])
            if len(celled) == len(rows):
                blocks.add_prompt_logits(logits_PV)
            elif len(celled):
                blocks.add_prompt_logits(logits_PV[self._put(celled)])

    def _put(self, array: Array) -> torch.Tensor:
        return put(array, self._model.device)


def _counted(counts: Array) -> Array:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, ..."""
    counted: Array = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return counted
