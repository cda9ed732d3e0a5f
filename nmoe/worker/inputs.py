"""A step's inputs from the host, as one array of int32 words that is uploaded in a single copy.

The words have fixed places for given sizes, so that a captured step can find them. Tokens and rows that pad a step
belong to an extra row after all others: its slot belongs to no request, it writes to the reserved page, and it has no
context.

Shape suffixes: R rows, T tokens.
"""

import dataclasses
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from nmoe.worker.chunks import Chunks, cut
from nmoe.worker.kernels import step
from nmoe.worker.rows import Rows
from nmoe.worker.slots import DeviceSlots

Array = npt.NDArray[Any]
Words = TypeVar("Words", torch.Tensor, Array)

_ALIGNMENT = 4  # every part starts at a multiple of 16 bytes
_NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True, slots=True)
class Parts(Generic[Words]):
    """The words by meaning, as views on the host or on the device."""

    real: Words  # [1]: how many tokens are not padding; these come first
    continued: Words  # [1]: how many tokens, at the start, are their slots' last tokens
    slots: Words  # [R + 1]
    firsts: Words  # [R + 1]: position of each row's first token
    floors: Words  # [R + 1]: positions from here on are written
    starts: Words  # [R + 2]: where each row's tokens begin
    decodes: Words  # [R]: positions of the decode rows; 0 where there is none
    sampling_slots: Words  # [R]: slots of the rows that sample, packed at the front
    last_tokens: Words  # [R]: each sampling row's last token
    sampling_ends: Words  # [R]: the position of the token that it samples
    ids: Words  # [T]: of the tokens that are not continued
    offsets: Words  # [R + 1]; from here on as in Chunks
    num_tiles: Words
    tile_row: Words
    tile_start: Words
    num_blocks: Words
    block_row: Words
    block_start: Words


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts are, for up to this many rows, tokens, tiles of queries and blocks of contexts."""

    rows: int
    tokens: int
    tiles: int = 0
    blocks: int = 0

    def _sizes(self) -> list[int]:
        rows = self.rows + 1
        chunks = [rows, 1, self.tiles, self.tiles, 1, self.blocks, self.blocks] if self.tiles else [0] * 7
        return [1, 1, rows, rows, rows, rows + 1, self.rows, self.rows, self.rows, self.rows, self.tokens, *chunks]

    @property
    def size(self) -> int:
        """Total number of words."""
        return sum(map(_aligned, self._sizes()))

    def parts(self, words: Words) -> Parts[Words]:
        """Views of the first `size` words."""
        views, at = [], 0
        for size in self._sizes():
            views.append(words[at : at + size])
            at += _aligned(size)
        return Parts(*views)

    def chunks(self, parts: Parts[torch.Tensor], positions: int) -> Chunks:
        """The prefill rows for attention, expanded in a workspace of `positions`."""
        return Chunks(
            positions,
            parts.starts,
            parts.firsts,
            parts.offsets,
            parts.num_tiles,
            parts.tile_row,
            parts.tile_start,
            parts.num_blocks,
            parts.block_row,
            parts.block_start,
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Inputs:
    """The words of consecutive steps, on the host.

    Rows that continue without new ids advance one position per step, and nothing else of theirs changes. So within one
    layout their words change by the same amounts in every step; the first two steps reveal these amounts.
    """

    def __init__(self, nobody: int) -> None:
        """`nobody` is the padding's slot."""
        self._nobody = nobody
        self._take(Layout(0, 0))
        self._rows: Rows | None = None
        self._moves: Array | None = None

    def write(self, layout: Layout, rows: Rows, firsts: Array, ids: Array) -> Array:
        """The words of the next step, int32 [layout.size], valid until the one after it. Arguments as in `write_rows`;
        rows that continue are passed as the same object."""
        goes_on = rows is self._rows and layout == self._layout and not rows.num_ids
        if goes_on and self._moves is not None:
            self._words += self._moves
            return self._words
        if layout != self._layout:
            self._take(layout)
        before = self._words.copy() if goes_on else None
        write_rows(self._parts, rows, firsts, ids, nobody=self._nobody)
        if layout.tiles:
            write_chunks(self._parts, rows, firsts + rows.counts)
        self._rows, self._moves = rows, None if before is None else self._words - before
        return self._words

    def _take(self, layout: Layout) -> None:
        self._layout = layout
        self._words: Array = np.zeros(layout.size, np.int32)
        self._parts = layout.parts(self._words)


def write_rows(parts: Parts[Array], given: Rows, firsts: Array, ids: Array, *, nobody: int) -> None:
    """Write a step's rows, given their first positions [R] and the new ids; `nobody` is the padding's slot."""
    rows, tokens, continued, decodes = len(given.slots), given.num_tokens, given.num_continued, given.num_decodes
    parts.real[0], parts.continued[0] = tokens, continued
    parts.slots[:rows], parts.slots[rows:] = given.slots, nobody
    parts.firsts[:rows], parts.firsts[rows:] = firsts, 0
    parts.floors[:rows], parts.floors[rows:] = given.floors, _NEVER
    parts.starts[: rows + 1], parts.starts[rows + 1 : -1] = given.starts, tokens
    parts.starts[-1] = len(parts.ids)
    parts.firsts[-1] = tokens - len(parts.ids)
    parts.decodes[:decodes], parts.decodes[decodes:] = firsts[:decodes], 0
    sampling = len(given.sampling)
    parts.sampling_slots[:sampling], parts.sampling_slots[sampling:] = given.sampling_slots, nobody
    parts.last_tokens[:sampling], parts.last_tokens[sampling:] = given.last_tokens, 0
    parts.sampling_ends[:sampling] = (firsts + given.counts)[given.sampling]
    parts.sampling_ends[sampling:] = 0
    parts.ids[continued:tokens], parts.ids[tokens:] = ids, 0


def write_chunks(parts: Parts[Array], given: Rows, ends: Array) -> None:
    """Write how the prefill rows and the padding's tokens are split."""
    first, rows = given.num_decodes, len(given.slots)
    pieces = cut(given.counts[first:], ends[first:], first)
    padding = cut(np.array([len(parts.ids) - given.num_tokens]), np.zeros(1, np.int64), len(parts.slots) - 1)
    parts.offsets[first:rows] = pieces.offsets
    # Kernels start with the last tile, which should be the longest.
    tile_row = np.concatenate((padding.tile_row, pieces.tile_row))
    parts.num_tiles[0], parts.num_blocks[0] = len(tile_row), len(pieces.block_row)
    parts.tile_row[: len(tile_row)] = tile_row
    parts.tile_start[: len(tile_row)] = np.concatenate((padding.tile_start, pieces.tile_start))
    parts.block_row[: len(pieces.block_row)] = pieces.block_row
    parts.block_start[: len(pieces.block_row)] = pieces.block_start


def locate(
    parts: Parts[torch.Tensor], slots: DeviceSlots, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and cache places of the tokens, int32 [T], and the rows' pages, int32 [R, P]."""
    rows = parts.slots, parts.firsts, parts.floors, parts.starts
    if parts.ids.is_cuda:
        from nmoe.worker.kernels.step_triton import locate_and_copy

        return locate_and_copy(parts.ids, *rows, parts.continued, slots.last_S, slots.pages_SP, page_size)
    tokens = step.locate(parts.ids, *rows, parts.continued, slots.last_S, slots.pages_SP, page_size)
    return *tokens, step.rows_of_table(parts.slots[:-1], slots.pages_SP)
