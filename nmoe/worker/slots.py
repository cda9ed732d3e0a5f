"""What a worker remembers of its requests, one row per slot, so that a Step can be a delta.

The host keeps what it must check a Step against; the device keeps what a step reads: the page table and the last
tokens. The host never holds a page table of its own: what a Step adds goes up with the step's other inputs.

Shape suffixes: S slots, P pages of a slot, R rows of a step.

Invariants, checked with one vectorised pass each:
- `pages_SP[s, : lengths[s]]` are the slot's pages in the order of its positions; what lies behind them means nothing.
- Positions below `ends[s]` have their cache rows, written by this slot or shared; a row starts at `ends[s]`. Only
  before a slot has computed anything may a row start lower, to recompute the last of the shared positions.
- Positions below `floors[s]` lie in shared pages and are never written.
- `last_S[s]` is the slot's last sampled token. A step may read it before the host has seen it. `sampled[s]` says that
  there is one.
- Rows that were checked and go on start where their slots end, and have room for `_ahead` more steps: nothing but a new
  request in a slot, which sets it to 0, moves a slot's end or takes its pages. So these steps pass without a look.

A Step that breaks an invariant is a defect of the scheduler and raises MalformedStep.
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
    """A Step contradicts what the worker knows; the message names the row."""


class DeviceSlots:
    """What the device knows of the slots, in device order. The last slot is nobody's: padding rows read it and write
    its last token; its pages are the reserved one."""

    def __init__(self, num_slots: int, pages_per_slot: int, num_pages: int, device: torch.device) -> None:
        self.nobody = num_slots
        self.pages_SP = torch.full((num_slots + 1, pages_per_slot), num_pages, dtype=torch.int32, device=device)
        self._table = self.pages_SP.view(-1)
        self.last_S = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)

    def append(self, assigned_2N: torch.Tensor) -> None:
        """`SlotTable.append_pages`' result: where in the flattened table, and which pages. int32, on the device."""
        places_N, pages_N = assigned_2N.unbind()
        self._table.index_put_((places_N,), pages_N)

    def remember(self, slots_N: torch.Tensor, tokens_N: torch.Tensor) -> None:
        """These are the slots' last tokens now; NO_TOKEN becomes one that exists, because the next step may be on its
        way with it. `slots_N` int32."""
        self.last_S.index_put_((slots_N,), tokens_N.clamp(min=0).int())


class SlotTable:
    """The slots of one rank, as the host knows them."""

    def __init__(self, num_slots: int, pages_per_slot: int, page_size: int, num_pages: int) -> None:
        self.num_slots = num_slots
        self.pages_per_slot = pages_per_slot
        self.page_size = page_size
        self.num_pages = num_pages  # the reserved page has this number
        self.lengths = np.zeros(num_slots, np.int64)  # pages
        self.ends = np.zeros(num_slots, np.int64)  # positions
        self.floors = np.zeros(num_slots, np.int64)  # positions
        self.sampled = np.zeros(num_slots, np.bool_)
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots, np.float64)
        self.min_p = np.zeros(num_slots, np.float64)
        self.seeds = np.zeros(num_slots, np.int64)
        # The rows that advanced last, where they are now, and how many more steps of theirs need no check.
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
        """Append to the slots' page lists: [N, 2] of (slot, page), in this order. What `DeviceSlots.append` takes,
        int32 [2, N]."""
        slots, pages = assigned[:, 0], assigned[:, 1]
        if slots.min(initial=0) < 0 or slots.max(initial=0) >= self.num_slots:
            raise MalformedStep(f"pages: slots {slots.min()} to {slots.max()} of {self.num_slots}")
        if pages.min(initial=0) < 0 or pages.max(initial=0) >= self.num_pages:
            raise MalformedStep(f"pages: pages {pages.min()} to {pages.max()} of {self.num_pages}")
        order = slots.argsort(kind="stable")
        slots, pages = slots[order], pages[order]
        # Of the pages that a slot gets in this step, how many come before each.
        nth = np.arange(len(slots)) - np.searchsorted(slots, slots)
        places = self.lengths[slots] + nth
        if places.max(initial=0) >= self.pages_per_slot:
            row = int(places.argmax())
            raise MalformedStep(f"pages: slot {slots[row]} gets more than the {self.pages_per_slot} a request can have")
        np.maximum.at(self.lengths, slots, places + 1)
        return np.stack((slots.astype(np.int64) * self.pages_per_slot + places, pages)).astype(np.int32)

    def advance(self, slots: Array, firsts: Array, counts: Array) -> Array:
        """Move the rows' slots on by `counts` positions from `firsts`; gives their new ends. All int64 [R]. Rows that
        go on come as the same arrays: `slots`, and as `firsts` the ends that were given last."""
        ends = firsts + counts
        if self._ahead and slots is self._advanced and firsts is self._reached:
            self._ahead -= 1
        else:
            self._ahead = self._check(slots, firsts, counts, ends)
        self.ends[slots] = ends
        self._advanced, self._reached = slots, ends
        return ends

    def _check(self, slots: Array, firsts: Array, counts: Array, ends: Array) -> int:
        """How many more steps like this one the slots' pages have room for, at least."""
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
