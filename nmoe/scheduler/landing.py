"""Distributes the results of a step to the requests they belong to."""

import msgspec
import numpy as np
import numpy.typing as npt

from nmoe.messages import Reason
from nmoe.scheduler.flight import Blocks, Flight
from nmoe.scheduler.ranks import Ranks
from nmoe.scheduler.request import State
from nmoe.scheduler.slots import Bools, Ints, Slots


class Results(msgspec.Struct, frozen=True):
    """What a step produced: tokens in row order (counts None: one per row), and which rows ended, as (slot, reason).

    `failed`: slots of live rows whose logits were not finite; their results are left out.
    """

    uids: npt.NDArray[np.int64]
    tokens: Ints
    counts: Ints | None
    ended: list[tuple[int, Reason]]
    blocks: Blocks | None = None
    failed: list[int] = []


def append_results(flight: Flight, ranks: Ranks) -> Results:
    """Append each live row's tokens to its slot. Tokens after an EOS or beyond max_tokens are dropped."""
    tokens, counts = flight.results()
    live = ranks.table.uid[flight.slots] == flight.uids
    failed: list[int] = []
    if slots := flight.failed(ranks.table.num_slots):
        wrong = np.isin(flight.slots, slots)
        failed = flight.slots[live & wrong].tolist()
        live &= ~wrong
    if flight.samples is None and counts is None:
        results = _one_each(flight, ranks, tokens, live)
    else:
        results = _several(flight, ranks, tokens, _spread(counts, flight), live)
    blocks = flight.blocks()
    if blocks and np.count_nonzero(live) < len(live):
        blocks = blocks.of(live)
    return msgspec.structs.replace(results, blocks=blocks, failed=failed) if blocks or failed else results


def deliver_cells(flight: Flight, ranks: Ranks) -> None:
    """Give the cells of live rows to their frontends, and free those of the others."""
    if cargo := flight.cargo:
        live = ranks.table.uid[cargo.slots] == cargo.uids
        ranks.cells.deliver(cargo.cells, np.where(live, cargo.uids, -1))


def _spread(counts: Ints | None, flight: Flight) -> Ints:
    """Expand the counts of the sampling rows to all rows."""
    if flight.samples is None and counts is not None:
        return counts
    spread = np.zeros(len(flight.slots), np.int32)
    spread[flight.samples] = 1 if counts is None else counts
    return spread


def _one_each(flight: Flight, ranks: Ranks, tokens: Ints, live: Bools) -> Results:
    slots, uids = flight.slots, flight.uids
    if np.count_nonzero(live) < len(live):
        slots, uids, tokens = slots[live], uids[live], tokens[live]
    by_eos, by_length = ranks.table.append(slots, tokens)
    return Results(uids, tokens, None, _reasons(slots, by_eos, by_length))


def _several(flight: Flight, ranks: Ranks, tokens: Ints, counts: Ints, live: Bools) -> Results:
    """Round j appends the j-th token of every row that has one and has not ended yet."""
    starts = np.cumsum(counts) - counts
    taken = np.zeros(len(tokens), np.bool_)
    kept = np.zeros(len(counts), np.int32)
    going = live.copy()
    ended: list[tuple[int, Reason]] = []
    for j in range(int(counts.max(initial=0))):
        rows = np.flatnonzero(going & (counts > j))
        at = starts[rows] + j
        by_eos, by_length = ranks.table.append(flight.slots[rows], tokens[at])
        taken[at] = True
        kept[rows] += 1
        going[rows] = ~(by_eos | by_length)
        ended += _reasons(flight.slots[rows], by_eos, by_length)
    _catch_up(flight, ranks, np.flatnonzero(going & (kept > 1)), kept)
    return Results(flight.uids[live], tokens[taken], kept[live], ended)


def _catch_up(flight: Flight, ranks: Ranks, rows: npt.NDArray[np.int64], kept: Ints) -> None:
    """Each row was planned as one token; any extra tokens it returned advance the row's next position."""
    table = ranks.table
    for slot, extra in zip(flight.slots[rows].tolist(), (kept[rows] - 1).tolist(), strict=True):
        request = table.request(slot)
        if request.state is State.DECODE:
            table.position[slot] = min(table.position[slot] + extra, table.end[slot])
            if table.position[slot] == table.end[slot]:
                ranks.finish_decode(request)


def _reasons(slots: Slots, by_eos: Bools, by_length: Bools) -> list[tuple[int, Reason]]:
    (over,) = (by_eos | by_length).nonzero()
    if not len(over):
        return []
    return [
        (slot, "stop" if eos else "length")
        for slot, eos in zip(slots[over].tolist(), by_eos[over].tolist(), strict=True)
    ]
