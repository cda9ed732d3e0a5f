"""How each device samples a step's rows: by the reference, or by kernels that look up parameters by slot.

Shape suffixes: N slots, S rows that sample, V the vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nmoe.messages import Admit
from nmoe.worker.inputs import Parts
from nmoe.worker.philox import uniforms
from nmoe.worker.sampler import COLDEST, ONE, greedy, make_plan, sample
from nmoe.worker.slots import DeviceSlots, SlotTable
from nmoe.worker.stages import put

Array = npt.NDArray[Any]
# Tokens [S], NO_TOKEN where the logits are not finite, and their log-probabilities under the distributions they were
# drawn from, float32 [S], 0 for greedy rows; None if all rows are greedy.
Sampled = tuple[torch.Tensor, torch.Tensor | None]


class Sampler(Protocol):
    """Samples the rows given last. `draws`: whether any of them draws. `simple`: whether none of them has top-k or
    top-p."""

    draws: bool
    simple: bool

    def admit(self, admits: Sequence[Admit]) -> None:
        """Requests have started in these slots; the slot table already has them."""
        ...

    def take_rows(self, slots_S: Array) -> None:
        """Set the slots of the rows that sample from now on."""
        ...

    def sample(self, logits_SV: torch.Tensor, parts: Parts[torch.Tensor]) -> Sampled:
        """Sample a token per row, which becomes its slot's last; `parts` are the step's inputs. Keeps the logits."""
        ...


class ReferenceSampler:
    """Plain torch; see Sampler."""

    def __init__(self, table: SlotTable, slots: DeviceSlots, vocab_size: int) -> None:
        self._table, self._slots, self._vocab_size = table, slots, vocab_size
        self.draws = self.simple = False

    def admit(self, admits: Sequence[Admit]) -> None:
        """See Sampler."""

    def take_rows(self, slots_S: Array) -> None:
        """See Sampler."""
        table = self._table
        self._plan = make_plan(
            table.temperature[slots_S],
            table.top_k[slots_S],
            table.top_p[slots_S],
            table.min_p[slots_S],
            self._vocab_size,
            self._slots.last_S.device,
        )
        self.draws = len(self._plan.drawn) > 0
        self._seeds = table.seeds[slots_S][self._plan.drawn]

    def sample(self, logits_SV: torch.Tensor, parts: Parts[torch.Tensor]) -> Sampled:
        """See Sampler."""
        rows, logprobs_S = len(logits_SV), None
        logits_SV = logits_SV.float()
        if len(drawn := self._plan.drawn):
            random_D = uniforms(self._seeds, parts.sampling_ends[:rows].numpy()[drawn])
            logprobs_S = logits_SV.new_empty(rows)
            tokens_S = sample(logits_SV, self._plan, torch.from_numpy(random_D), logprobs_S)
        else:
            tokens_S = greedy(logits_SV)
        self._slots.remember(parts.sampling_slots[:rows], tokens_S)
        return tokens_S, logprobs_S


class GPUSampler:
    """The kernels of kernels/sampling_triton.py; see Sampler."""

    def __init__(self, table: SlotTable, slots: DeviceSlots, vocab_size: int) -> None:
        self._table, self._slots, self._vocab_size = table, slots, vocab_size
        # The padding slot's row stays zero, which means greedy.
        self._parameters_NP = torch.zeros(slots.nobody + 1, 5, dtype=torch.int64, device=slots.last_S.device)
        self.simple = True
        self.draws = False

    def admit(self, admits: Sequence[Admit]) -> None:
        """See Sampler."""
        table, chosen = self._table, np.array([admit.slot for admit in admits])
        top_k = table.top_k[chosen]
        words = np.empty((len(chosen), 6), np.int64)
        words[:, 0] = chosen
        temperature = table.temperature[chosen]
        words[:, 1] = np.where(temperature > 0, np.maximum(temperature, COLDEST), 0).astype(np.float64).view(np.int64)
        words[:, 2] = np.ceil(table.min_p[chosen] * ONE)
        words[:, 3] = np.where((top_k <= 0) | (top_k > self._vocab_size), self._vocab_size, top_k)
        words[:, 4] = table.top_p[chosen].view(np.int64)
        words[:, 5] = table.seeds[chosen]
        given = put(words, self._parameters_NP.device)
        self._parameters_NP.index_put_((given[:, 0],), given[:, 1:])

    def take_rows(self, slots_S: Array) -> None:
        """See Sampler."""
        table = self._table
        draws, top_k = table.temperature[slots_S] > 0, table.top_k[slots_S]
        filters = (top_k > 0) & (top_k < self._vocab_size) | (table.top_p[slots_S] < 1)
        self.draws, self.simple = bool(draws.any()), not (draws & filters).any()

    def sample(self, logits_SV: torch.Tensor, parts: Parts[torch.Tensor]) -> Sampled:
        """See Sampler."""
        tokens_S, logprobs_S = self.sample_any(logits_SV, parts, simple=self.simple)
        return tokens_S, logprobs_S if self.draws else None

    def sample_any(
        self, logits_SV: torch.Tensor, parts: Parts[torch.Tensor], *, simple: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`sample` for rows that only the device knows, as in a captured step, where all are `simple`."""
        from nmoe.worker.kernels.sampling_triton import sample_rows

        rows = len(logits_SV)
        slots_S, ends_S = parts.sampling_slots[:rows], parts.sampling_ends[:rows]
        table_NP, last_N = self._parameters_NP, self._slots.last_S
        return sample_rows(logits_SV, slots_S, ends_S, table_NP, last_N, filtered=not simple)
