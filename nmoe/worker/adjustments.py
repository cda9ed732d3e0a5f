"""Adjustments of a request's logits before a token is chosen: bias, minimum length, penalties.

Shape suffixes: S rows that sample, P those of them with penalties, V the vocabulary, N places in the table of past
tokens.

The order is vLLM's: `logit_bias` and the bar on stop ids before `min_tokens`, then `repetition_penalty` (Keskar et al.,
"CTRL", 2019: divides positive logits, multiplies the others), `frequency_penalty` and `presence_penalty` (OpenAI's API
reference). The repetition penalty considers prompt and output, the others only the output.

Invariants: only slots with penalties have a place, and there are at most as many places as slots. A token is counted
on the device as it is sampled, in device order, so the next step's penalties include it before the host sees it; a
request that returns after a preemption recounts its whole output. No row's logits depend on another row's.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmoe.messages import Admit, Sampling
from nmoe.worker.stages import put

Array = npt.NDArray[Any]
_FEWEST = 8  # places allocated at first


@dataclasses.dataclass(frozen=True, slots=True)
class Adjustment:
    """How the logits of a step's S sampling rows change; built once per set of rows. Tensors are on the device."""

    biased: tuple[torch.Tensor, torch.Tensor] | None  # rows and ids, int64, without duplicates
    bias: torch.Tensor  # float32, one per pair
    barred: tuple[torch.Tensor, torch.Tensor] | None  # rows and ids, int64
    barred_rows: Array  # the same rows, on the host
    barred_until: Array  # int64: the first position at which each id is allowed
    penalised_P: torch.Tensor | None  # int64: rows
    places_P: torch.Tensor  # int64
    repetition_P1: torch.Tensor  # float32
    frequency_P1: torch.Tensor  # float32
    presence_P1: torch.Tensor  # float32


@dataclasses.dataclass(frozen=True, slots=True)
class _Wish:
    """What one slot requests in addition to penalties."""

    bias_ids: Array  # int32
    biases: Array  # float32
    barred_ids: Array  # int64
    barred_until: int  # position

    @classmethod
    def of(cls, sampling: Sampling, prompt_len: int) -> "_Wish":
        bias_ids, biases = np.frombuffer(sampling.bias_ids, np.int32), np.frombuffer(sampling.biases, np.float32)
        barred = np.array(sampling.barred_ids, np.int64)
        return cls(bias_ids, biases, barred, prompt_len + sampling.min_tokens)


_NOTHING = _Wish.of(Sampling(), 0)


class Adjustments:
    """The state of all slots. `active[slot]` says whether a slot's logits are adjusted at all."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self.active = np.zeros(num_slots, np.bool_)
        self._penalised = np.zeros(num_slots, np.bool_)
        self._powers = np.zeros((num_slots, 3), np.float32)  # repetition, frequency, presence
        self._places = np.zeros(num_slots, np.int64)
        self._wishes = [_NOTHING] * num_slots
        self._forget()

    def reset(self) -> None:
        """Forget every request."""
        self.active.fill(False)
        self._penalised.fill(False)
        self._forget()

    def _forget(self) -> None:
        # Twice the number of times the token was generated, plus one if it occurs in the prompt.
        self._past_NV = torch.zeros(0, self._vocab_size, dtype=torch.int32, device=self._device)
        self._free: list[int] = []

    def admit(self, admits: Sequence[Admit]) -> None:
        """Start new requests in their slots, given their known tokens."""
        for admit in admits:
            slot, sampling = admit.slot, admit.sampling
            if self._penalised[slot]:
                self._free.append(int(self._places[slot]))
            self._penalised[slot] = sampling.needs_past
            self.active[slot] = sampling.needs_past or bool(sampling.bias_ids or sampling.barred_ids)
            self._wishes[slot] = _Wish.of(sampling, admit.prompt_len) if self.active[slot] else _NOTHING
            if sampling.needs_past:
                self._powers[slot] = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
                self._places[slot] = place = self._take_place()
                self._remember(place, np.frombuffer(admit.past, np.int32), admit.prompt_len)

    def _take_place(self) -> int:
        if not self._free:
            count = len(self._past_NV)
            more = min(max(count, _FEWEST), len(self.active) - count)
            self._past_NV = torch.cat((self._past_NV, self._past_NV.new_zeros(more, self._vocab_size)))
            self._free = list(range(count + more - 1, count - 1, -1))
        return self._free.pop()

    def _remember(self, place: int, past: Array, prompt_len: int) -> None:
        counts_V = 2 * np.bincount(past[prompt_len:], minlength=self._vocab_size).astype(np.int32)
        counts_V[past[:prompt_len]] += 1  # once, however often it occurs in the prompt
        self._past_NV[place] = put(counts_V, self._device)

    def plan(self, slots_S: Array) -> Adjustment | None:
        """The adjustment for rows of these slots, in this order; None if none of them has any."""
        active = np.flatnonzero(self.active[slots_S])
        if not len(active):
            return None
        wishes = [self._wishes[slot] for slot in slots_S[active].tolist()]
        bias_rows = np.repeat(active, [len(wish.bias_ids) for wish in wishes])
        barred_rows = np.repeat(active, [len(wish.barred_ids) for wish in wishes])
        penalised = np.flatnonzero(self._penalised[slots_S])
        slots_P = slots_S[penalised]
        powers_P3 = self._powers[slots_P]
        return Adjustment(
            biased=self._pairs(bias_rows, [wish.bias_ids for wish in wishes]) if len(bias_rows) else None,
            bias=self._put(np.concatenate([wish.biases for wish in wishes]), np.float32),
            barred=self._pairs(barred_rows, [wish.barred_ids for wish in wishes]) if len(barred_rows) else None,
            barred_rows=barred_rows,
            barred_until=np.repeat([wish.barred_until for wish in wishes], [len(wish.barred_ids) for wish in wishes]),
            penalised_P=self._put(penalised) if len(penalised) else None,
            places_P=self._put(self._places[slots_P]),
            repetition_P1=self._put(powers_P3[:, 0:1], np.float32),
            frequency_P1=self._put(powers_P3[:, 1:2], np.float32),
            presence_P1=self._put(powers_P3[:, 2:3], np.float32),
        )

    def _pairs(self, rows: Array, ids: list[Array]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._put(rows), self._put(np.concatenate(ids))

    def _put(self, array: Array, dtype: npt.DTypeLike = np.int64) -> torch.Tensor:
        return put(array.astype(dtype), self._device)

    def apply(self, plan: Adjustment, logits_SV: torch.Tensor, positions_S: Array) -> None:
        """Adjust the float32 logits in place; `positions_S` (on the host) are those of the tokens to be sampled."""
        if plan.biased is not None:
            logits_SV.index_put_(plan.biased, plan.bias, accumulate=True)
        if plan.barred is not None:
            bars = positions_S[plan.barred_rows] < plan.barred_until
            if bars.any():
                bar = self._put(np.where(bars, -np.inf, 0.0), np.float32)
                logits_SV.index_put_(plan.barred, bar, accumulate=True)
        if plan.penalised_P is not None:
            past_PV = self._past_NV[plan.places_P]
            logits_SV[plan.penalised_P] = _penalise(logits_SV[plan.penalised_P], past_PV, plan)

    def count(self, plan: Adjustment, tokens_S: torch.Tensor) -> None:
        """Count the sampled tokens as part of the output."""
        if plan.penalised_P is not None:
            places = plan.places_P, tokens_S[plan.penalised_P].long()
            self._past_NV[places] += 2


def _penalise(logits_PV: torch.Tensor, past_PV: torch.Tensor, plan: Adjustment) -> torch.Tensor:
    scaled_PV = torch.where(logits_PV > 0, logits_PV / plan.repetition_P1, logits_PV * plan.repetition_P1)
    logits_PV = torch.where(past_PV > 0, scaled_PV, logits_PV)
    times_PV = past_PV >> 1
    return logits_PV - plan.frequency_P1 * times_PV - plan.presence_P1 * (times_PV > 0)
