"""What a worker remembers of its requests, one row per slot, so that a Step can be a delta.

Shape suffixes: S slots, P pages of a slot, R rows of a step.

Invariants, checked on every step with one vectorised pass each:
- `pages[s, : lengths[s]]` are the slot's pages in the order of its positions; every later entry is the reserved page.
- Positions below `ends[s]` have their cache rows, written by this slot or shared; a row starts at `ends[s]`. Only
  before a slot has computed anything may a row start lower, to recompute the last of the shared positions.
- Positions below `floors[s]` lie in shared pages and are never written.
- `last_S[s]` is the slot's last sampled token. It lives on the device, in device order: a step may read it before the
  host has seen it. `sampled[s]` says that there is one.

A Step that breaks an invariant is a defect of the scheduler and raises MalformedStep.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmoe.messages import Admit

Array = npt.NDArray[Any]


class MalformedStep(AssertionError):
    """A Step contradicts what the worker knows; the message names the row."""


class SlotTable:
    """The slots of one rank. Host arrays, but for `last_S`."""

    def __init__(
        self, num_slots: int, pages_per_slot: int, page_size: int, num_pages: int, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        self.page_size = page_size
        self.num_pages = num_pages  # the reserved page has this number
        self.pages = np.full((num_slots, pages_per_slot), num_pages, np.int64)
        self.lengths = np.zeros(num_slots, np.int64)  # pages
        self.ends = np.zeros(num_slots, np.int64)  # positions
        self.floors = np.zeros(num_slots, np.int64)  # positions
        self.sampled = np.zeros(num_slots, np.bool_)
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots, np.float64)
        self.min_p = np.zeros(num_slots, np.float64)
        self.seeds = np.zeros(num_slots, np.int64)
        # One entry more, for rows of a captured step that belong to nobody.
        self.last_S = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Forget every request."""
        self.pages.fill(self.num_pages)
        for array in (self.lengths, self.ends, self.floors, self.sampled):
            array.fill(0)

    def admit(self, admits: Sequence[Admit]) -> None:
        """Start new requests in their slots."""
        for admit in admits:
            slot = admit.slot
            if not 0 <= slot < self.num_slots:
                raise MalformedStep(f"admit: slot {slot} of {self.num_slots}")
            self.pages[slot, : self.lengths[slot]] = self.num_pages
            self.lengths[slot] = 0
            self.ends[slot] = self.floors[slot] = admit.cached
            self.sampled[slot] = False
            sampling = admit.sampling
            self.temperature[slot] = sampling.temperature
            self.top_k[slot] = sampling.top_k
            self.top_p[slot] = sampling.top_p
            self.min_p[slot] = sampling.min_p
            self.seeds[slot] = sampling.seed

    def append_pages(self, assigned: Array) -> None:
        """Append to the slots' page lists: [N, 2] of (slot, page), in this order."""
        slots, pages = assigned[:, 0], assigned[:, 1]
        if slots.min(initial=0) < 0 or slots.max(initial=0) >= self.num_slots:
            raise MalformedStep(f"pages: slots {slots.min()} to {slots.max()} of {self.num_slots}")
        if pages.min(initial=0) < 0 or pages.max(initial=0) >= self.num_pages:
            raise MalformedStep(f"pages: pages {pages.min()} to {pages.max()} of {self.num_pages}")
        order = slots.argsort(kind="stable")
        slots, pages = slots[order], pages[order]
        # The how-maniest of its slot in this step each page is.
        nth = np.arange(len(slots)) - np.searchsorted(slots, slots)
        places = self.lengths[slots] + nth
        if places.max(initial=0) >= self.pages.shape[1]:
            row = int(places.argmax())
            raise MalformedStep(f"pages: slot {slots[row]} gets more than the {self.pages.shape[1]} a request can have")
        self.pages[slots, places] = pages
        np.maximum.at(self.lengths, slots, places + 1)

    def advance(self, slots: Array, firsts: Array, counts: Array) -> Array:
        """Move the rows' slots on by `counts` positions from `firsts`; gives their new ends. All int64 [R]."""
        ends, known = firsts + counts, self.ends[slots]
        if (firsts != known).any():
            wrong = (firsts > known) | (firsts < known) & (known != self.floors[slots])
            self._refuse(wrong, slots, "starts at position {}, its slot goes on at {}", firsts, known)
        room = self.lengths[slots] * self.page_size
        if (ends > room).any():
            self._refuse(ends > room, slots, "ends at position {}, its slot's pages hold {}", ends, room)
        self.ends[slots] = ends
        return ends

    def pages_of(self, slots: Array, ends: Array) -> Array:
        """The page lists of the rows, [R, P] as in `Batch.pages_RP`."""
        needed = -(-ends // self.page_size)
        pages_RP = self.pages[:, : needed.max(initial=0)][slots]
        if (self.lengths[slots] != needed).any():
            pages_RP[np.arange(pages_RP.shape[1]) >= needed[:, None]] = self.num_pages
        return pages_RP

    def places_of(self, slots: Array, positions: Array) -> Array:
        """Where each token's cache row goes, as in `Batch.write_T`, from the tokens' slots and positions."""
        page, offset = np.divmod(positions, self.page_size)
        pages = self.pages[slots, page]
        shared = positions < self.floors[slots]
        if shared.any():
            pages[shared] = self.num_pages
        return pages * self.page_size + offset

    @staticmethod
    def _refuse(wrong: Array, slots: Array, text: str, *numbers: Array) -> None:
        if len(rows := np.flatnonzero(wrong)):
            row = rows[0]
            raise MalformedStep(f"row {row} (slot {slots[row]}) " + text.format(*(array[row] for array in numbers)))
