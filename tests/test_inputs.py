"""The words of a step, with and without padding, say the same of its tokens; and the tables on the device are right."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.messages import ROW_HAS_IDS, ROW_SAMPLES, Admit, Sampling
from nmoe.worker import stages
from nmoe.worker.chunks import BLOCK, TILE
from nmoe.worker.graphs import chunk_ladder, ladder
from nmoe.worker.inputs import Inputs, Layout, locate, write_chunks, write_rows
from nmoe.worker.rows import Rows
from nmoe.worker.slots import DeviceSlots, MalformedStep, SlotTable
from nmoe.worker.stages import Stage, Stages

CPU = torch.device("cpu")
SLOTS, PER_SLOT, PAGE, PAGES = 8, 12, 4, 500


def _tables(rng):
    """Slots of random lengths with random pages, on the host and on the device."""
    table, there = SlotTable(SLOTS, PER_SLOT, PAGE, PAGES), DeviceSlots(SLOTS, PER_SLOT, PAGES, CPU)
    own = [rng.integers(0, PAGES, PER_SLOT).tolist() for _ in range(SLOTS)]
    order = rng.permutation(np.repeat(np.arange(SLOTS), PER_SLOT))
    nth = dict.fromkeys(range(SLOTS), 0)
    assigned = []
    for slot in order.tolist():
        assigned.append((slot, own[slot][nth[slot]]))
        nth[slot] += 1
    for part in np.array_split(np.array(assigned, np.int32), 3):
        there.append(torch.from_numpy(table.append_pages(part)))
    assert there.pages_SP[:-1].tolist() == own
    assert (there.pages_SP[-1] == PAGES).all()
    there.last_S[:] = torch.arange(SLOTS + 1) * 100
    table.sampled[:] = True
    return table, there, own


def _step(rng, table):
    """Random rows: decodes, then chunks, as (Rows, firsts, ids)."""
    slots = rng.permutation(SLOTS)[: rng.integers(0, SLOTS + 1)]
    decodes = int(rng.integers(0, len(slots) + 1))
    firsts = rng.integers(0, 20, len(slots))
    counts = np.where(np.arange(len(slots)) < decodes, 1, rng.integers(1, 20, len(slots)))
    table.floors[slots[decodes:]] = firsts[decodes:] + 3
    flags = np.where(np.arange(len(slots)) < decodes, ROW_SAMPLES, ROW_HAS_IDS)
    rows = Rows.of(np.stack((slots, firsts, counts, flags), 1).reshape(-1, 4), table)
    return rows, firsts, rng.integers(1000, 2000, rows.num_ids)


def _words(layout, rows, firsts, ids):
    words = np.full(layout.size, -7, np.int32)
    write_rows(layout.parts(words), rows, firsts, ids, nobody=SLOTS)
    return words


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 9), st.integers(0, 40))
def test_every_token_is_where_its_row_says(seed, more_rows, more_tokens):
    rng = np.random.default_rng(seed)
    table, there, own = _tables(rng)
    rows, firsts, ids = _step(rng, table)
    layout = Layout(len(rows.slots) + more_rows, rows.num_tokens + more_tokens)
    parts = layout.parts(torch.from_numpy(_words(layout, rows, firsts, ids)))
    found = [tensor.tolist() for tensor in locate(parts, there, PAGE)]
    expected_ids, expected_positions, expected_places = [], [], []
    came = iter(ids.tolist())
    for slot, first, count, floor in zip(rows.slots, firsts, rows.counts, rows.floors, strict=True):
        for position in range(first, first + count):
            is_continued = len(expected_ids) < rows.num_continued
            expected_ids.append(slot * 100 if is_continued else next(came))
            expected_positions.append(position)
            page = PAGES if position < floor else own[slot][position // PAGE]
            expected_places.append(page * PAGE + position % PAGE)
    real = rows.num_tokens
    assert found[0][:real] == expected_ids and found[1][:real] == expected_positions
    assert found[2][:real] == expected_places
    # Padding is at the reserved page, whatever it is.
    assert all(PAGES * PAGE <= place < (PAGES + 1) * PAGE for place in found[2][real:])
    assert found[3] == [own[slot] for slot in rows.slots] + [[PAGES] * PER_SLOT] * more_rows
    assert parts.real.tolist() == [real]
    assert parts.decodes.tolist()[: rows.num_decodes] == firsts[: rows.num_decodes].tolist()


def _meaning(layout, words, rows):
    """The parts, without the places that nothing reads: ids of tokens that are continued, pieces that are none."""
    parts = {name: part.tolist() for name, part in dataclasses.asdict(layout.parts(words)).items()}
    parts["ids"] = parts["ids"][rows.num_continued :]
    if layout.tiles:
        parts["offsets"] = parts["offsets"][rows.num_decodes : len(rows.slots)]
        for name, count in (("tile", parts["num_tiles"][0]), ("block", parts["num_blocks"][0])):
            parts |= {part: parts[part][:count] for part in (f"{name}_row", f"{name}_start")}
    return parts


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_words_of_rows_that_go_on_are_those_written_anew(seed):
    rng = np.random.default_rng(seed)
    table, _, _ = _tables(rng)
    layouts = [Layout(SLOTS, 200), Layout(SLOTS, 300), Layout(SLOTS, 200, tiles=200 // TILE + SLOTS + 1, blocks=20)]
    inputs, layout = Inputs(SLOTS), layouts[0]
    rows, firsts, ids = _step(rng, table)
    for _ in range(25):
        if rng.random() < 0.2:
            rows, firsts, ids = _step(rng, table)
        if rng.random() < 0.2:
            layout = layouts[rng.integers(len(layouts))]
        written = inputs.write(layout, rows, firsts, ids)
        anew = Inputs(SLOTS).write(Layout(**dataclasses.asdict(layout)), rows, firsts, ids)
        assert _meaning(layout, written, rows) == _meaning(layout, anew, rows)
        firsts = firsts + rows.counts


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 300))
def test_tiles_cover_every_query_of_a_chunk_and_the_padding_once(seed, padding):
    rng = np.random.default_rng(seed)
    counts = np.concatenate((np.ones(rng.integers(0, 4), np.int64), rng.integers(2, 400, rng.integers(0, 4))))
    firsts = rng.integers(0, 500, len(counts))
    flags = np.full(len(counts), ROW_HAS_IDS)
    rows = Rows.of(np.stack((np.arange(len(counts)), firsts, counts, flags), 1), SlotTable(8, 1, PAGE, 1))
    tokens = rows.num_tokens + padding
    layout = Layout(9, tokens, tiles=tokens // TILE + 10, blocks=60)
    parts = layout.parts(np.zeros(layout.size, np.int32))
    write_rows(parts, rows, firsts, np.zeros(rows.num_ids), nobody=8)
    write_chunks(parts, rows, firsts + counts)
    seen = np.zeros(tokens, int)
    for row, start in zip(parts.tile_row[: parts.num_tiles[0]], parts.tile_start, strict=False):
        begin, end = parts.starts[row] + start, min(parts.starts[row] + start + TILE, parts.starts[row + 1])
        assert begin < end
        seen[begin:end] += 1
    assert not seen[: rows.num_decodes].any() and (seen[rows.num_decodes :] == 1).all()
    assert parts.firsts[-1] + parts.starts[-1] - parts.starts[-2] == 0, "the padding has no context"
    used = set()
    for row, start in zip(parts.block_row[: parts.num_blocks[0]], parts.block_start, strict=False):
        place = parts.offsets[row] + start
        assert place % BLOCK == 0 and start < firsts[row] + counts[row]
        used.add(int(place))
    assert len(used) == parts.num_blocks[0] == sum(-(-(firsts + counts)[rows.num_decodes :] // BLOCK))


def test_more_pages_than_a_slot_can_have():
    table = SlotTable(2, 3, PAGE, 9)
    table.append_pages(np.array([(0, 1), (0, 2), (1, 3)]))
    with pytest.raises(MalformedStep, match="slot 0 gets more than the 3"):
        table.append_pages(np.array([(1, 1), (0, 2), (0, 3)]))
    table.admit([Admit(0, 0, Sampling())])
    assert table.append_pages(np.array([(0, 4)])).tolist() == [[0], [4]]


def test_a_reset_table_checks_rows_again():
    table, slots, ones = SlotTable(2, 3, PAGE, 9), np.array([1, 0]), np.ones(2, np.int64)
    table.append_pages(np.array([(0, 1), (1, 2)]))
    ends = table.advance(slots, np.zeros(2, np.int64), ones)
    ends = table.advance(slots, ends, ones)
    table.reset()
    with pytest.raises(MalformedStep, match=r"row 0 \(slot 1\) starts at position 2, its slot goes on at 0"):
        table.advance(slots, ends, ones)


def test_a_stage_is_used_again_once_its_tokens_were_read():
    free = Stages(CPU)
    first, second = free.take(), free.take()
    assert first is not second
    for stage, token in ((first, 3), (second, 4)):
        stage.download(stage.upload(np.full(5, token, np.int32))[:2])
    assert [np.frombuffer(stage.tokens(), np.int32).tolist() for stage in (first, second)] == [[3, 3], [4, 4]]
    free.put_back(first)
    assert free.take() is first and free.take() not in (first, second)


def test_a_stage_keeps_its_memory_and_takes_any_size(monkeypatch):
    """As on the GPU, where it is pinned."""
    empty, made = torch.empty, []

    def pinned(*size, pin_memory=False, **fields):
        made.extend(size if pin_memory else ())
        return empty(*size, **fields)

    stage, (there, elsewhere) = Stage(CPU), torch.zeros(2, 20, dtype=torch.int32)
    monkeypatch.setattr(stages.torch, "empty", pinned)
    stage._up, stage._down = stages._Room(True), stages._Room(True)
    for nth, (size, into) in enumerate([(5, there), (5, there), (3, there), (5, there), (5, elsewhere), (9, there)]):
        before = into.clone()
        uploaded = stage.upload(np.arange(nth, nth + size, dtype=np.int32), into)
        assert uploaded.tolist() == into[:size].tolist() == [*range(nth, nth + size)]
        assert torch.equal(into[size:], before[size:])
        stage.download(uploaded[1:])
        assert np.frombuffer(stage.tokens(), np.int32).tolist() == [*range(nth + 1, nth + size)]
    assert made == [5, 4, 9, 8]


def test_words_that_are_not_pinned_are_not_shared_between_steps():
    stage = Stage(CPU)
    first, second = stage.upload(np.array([1], np.int32)), stage.upload(np.array([2], np.int32))
    assert (first.item(), second.item()) == (1, 2)


def test_the_ladder_pads_little():
    for largest in (1, 7, 16, 100, 256, 4096):
        sizes = ladder(largest)
        assert sizes == sorted(set(sizes)) and sizes[-1] == largest
        assert all(larger - smaller <= max(8, smaller // 8) for smaller, larger in itertools.pairwise(sizes))
        sizes = chunk_ladder(largest)
        assert sizes == sorted(set(sizes)) and sizes[-1] == largest
