"""A worker's state per request, one row per slot, so that a Step can be a delta.

The host keeps what it needs to check a Step; the device keeps what a step reads: the page table and the last tokens.
The host has no page table of its own: a Step's additions are uploaded with the step's other inputs.

Shape suffixes: S slots, P pages of a slot, R rows of a step.

Invariants, checked with one vectorised pass each:
- `pages_SP[s, : lengths[s]]` are the slot's pages in position order; later entries are undefined.
- Positions below `ends[s]` have cache rows, written by this slot or shared; a row starts at `ends[s]`. Only before a
  slot has computed anything may a row start lower, to recompute the last shared position.
- Positions below `floors[s]` are in shared pages and are never written.
- `last_S[s]` is the slot's last sampled token. A step may read it before the host has seen it. `sampled[s]` says
  whether there is one.
- Rows that were checked and continue start where their slots end and have room for `_ahead` more steps: only a new
  request in a slot, which sets `_ahead` to 0, can move a slot's end or take its pages. So these steps skip the check.

A Step that breaks an invariant is a bug in the scheduler and raises MalformedStep.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmoe.messages import Admit

Array = npt.NDArray[Any]
_MOST = np.iinfo(np.int64).max


class MalformedStep(AssertionError):
    """A Step contradicts the worker's state; the message names the row."""


class DeviceSlots:
    """The slots' state on the device, updated in device order. The last slot belongs to no request: padding rows read
    it and write its last token; its pages are the reserved page."""

    def __init__(self, num_slots: int, pages_per_slot: int, num_pages: int, device: torch.device) -> None:
        self.nobody = num_slots
        self.pages_SP = torch.full((num_slots + 1, pages_per_slot), num_pages, dtype=torch.int32, device=device)
        self._table = self.pages_SP.view(-1)
        self.last_S = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)

    def append(self, assigned_2N: torch.Tensor) -> None:
        """Apply `SlotTable.append_pages`' result: flat indices into the table, and the pages. int32, on the device."""
        if assigned_2N.is_cuda:
            from nmoe.worker.kernels.copies_triton import put_words

            put_words(self._table, assigned_2N)
        else:
            places_N, pages_N = assigned_2N.unbind()
            self._table.index_put_((places_N,), pages_N)

    def remember(self, slots_N: torch.Tensor, tokens_N: torch.Tensor) -> None:
        """Set the slots' last tokens. NO_TOKEN is replaced by a valid token, because the next step may already be in
        flight and read it. `slots_N` int32."""
        self.last_S.index_put_((slots_N,), tokens_N.clamp(min=0).int())


class SlotTable:
    """The state of one rank's slots on the host."""

    def __init__(self, num_slots: int, pages_per_slot: int, page_size: int, num_pages: int) -> None:
        self.num_slots = num_slots
        self.pages_per_slot = pages_per_slot
        self.page_size = page_size
        self.num_pages = num_pages  # this is also the number of the reserved page
        self.lengths = np.zeros(num_slots, np.int64)  # pages
        self.ends = np.zeros(num_slots, np.int64)  # positions
        self.floors = np.zeros(num_slots, np.int64)  # positions
        self.sampled = np.zeros(num_slots, np.bool_)
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots, np.float64)
        self.min_p = np.zeros(num_slots, np.float64)
        self.seeds = np.zeros(num_slots, np.int64)
        # The rows that advanced last, their new ends, and how many more of their steps need no check.
        self._advanced = self._reached = np.empty(0, np.int64)
        self._ahead = 0

    def reset(self) -> None:
        """Forget every request."""
        self._ahead = 0
        for array in (self.lengths, self.ends, self.floors, self.sampled):
            array.fill(0)

    def admit(self, admits: Sequence[Admit]) -> None:
        """Start new requests in their slots."""
        self._ahead = 0
        for admit in admits:
            slot = admit.slot
            if not 0 <= slot < self.num_slots:
                raise MalformedStep(f"admit: slot {slot} of {self.num_slots}")
            self.lengths[slot] = 0
            self.ends[slot] = self.floors[slot] = admit.cached
            self.sampled[slot] = False
            sampling = admit.sampling
            self.temperature[slot] = sampling.temperature
            self.top_k[slot] = sampling.top_k
            self.top_p[slot] = sampling.top_p
            self.min_p[slot] = sampling.min_p
            self.seeds[slot] = sampling.seed

    def append_pages(self, assigned: Array) -> Array:
        """Append pages, [N, 2] of (slot, page), to the slots' page lists in this order. Returns the input of
        `DeviceSlots.append`, int32 [2, N]."""
        slots, pages = assigned[:, 0], assigned[:, 1]
        if slots.min(initial=0) < 0 or slots.max(initial=0) >= self.num_slots:
            raise MalformedStep(f"pages: slots {slots.min()} to {slots.max()} of {self.num_slots}")
        if pages.min(initial=0) < 0 or pages.max(initial=0) >= self.num_pages:
            raise MalformedStep(f"pages: pages {pages.min()} to {pages.max()} of {self.num_pages}")
        order = slots.argsort(kind="stable")
        slots, pages = slots[order], pages[order]
        # For each page, how many pages of this step precede it in its slot.
        nth = np.arange(len(slots)) - np.searchsorted(slots, slots)
        places = self.lengths[slots] + nth
        if places.max(initial=0) >= self.pages_per_slot:
            row = int(places.argmax())
            raise MalformedStep(f"pages: slot {slots[row]} gets more than the {self.pages_per_slot} a request can have")
        np.maximum.at(self.lengths, slots, places + 1)
        return np.stack((slots.astype(np.int64) * self.pages_per_slot + places, pages)).astype(np.int32)

    def advance(self, slots: Array, firsts: Array, counts: Array) -> Array:
        """Advance the rows' slots by `counts` positions from `firsts`. Returns their new ends. All int64 [R]. Rows that
        continue are passed as the same arrays: `slots`, and as `firsts` the ends returned last."""
        ends = firsts + counts
        if self._ahead and slots is self._advanced and firsts is self._reached:
            self._ahead -= 1
        else:
            self._ahead = self._check(slots, firsts, counts, ends)
        self.ends[slots] = ends
        self._advanced, self._reached = slots, ends
        return ends

    def _check(self, slots: Array, firsts: Array, counts: Array, ends: Array) -> int:
        """At least how many more steps like this one fit the slots' pages."""
        known = self.ends[slots]
        if (firsts != known).any():
            wrong = (firsts > known) | (firsts < known) & (known != self.floors[slots])
            self._refuse(wrong, slots, "starts at position {}, its slot goes on at {}", firsts, known)
        room = self.lengths[slots] * self.page_size
        least = int((room - ends).min(initial=_MOST))
        if least < 0:
            self._refuse(ends > room, slots, "ends at position {}, its slot's pages hold {}", ends, room)
        return least // int(counts.max(initial=1))

    @staticmethod
    def _refuse(wrong: Array, slots: Array, text: str, *numbers: Array) -> None:
        if len(rows := np.flatnonzero(wrong)):
            row = rows[0]
            raise MalformedStep(f"row {row} (slot {slots[row]}) " + text.format(*(array[row] for array in numbers)))
