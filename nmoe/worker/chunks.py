"""How a step's prefill rows are split for attention on the GPU: tiles of queries, blocks of their contexts.

Shape suffixes: R rows of the step, J positions in the workspace where contexts are expanded.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

TILE = 128  # queries per tile
BLOCK = 128  # positions per block; contexts start at whole blocks of the workspace


@dataclasses.dataclass(frozen=True, slots=True)
class Chunks:
    """Rows whose contexts are expanded together. int32 on the device, except `positions`. R + 1 rows: the last one is
    padding, which has queries but no context."""

    positions: int  # J
    starts: torch.Tensor  # [R + 2]: where each row's queries begin
    firsts: torch.Tensor  # [R + 1]: each row's first query's position; for padding, minus the number of queries
    offsets: torch.Tensor  # [R + 1]: where each row's context begins in the workspace
    num_tiles: torch.Tensor  # [1]
    tile_row: torch.Tensor  # the row of each tile of queries
    tile_start: torch.Tensor  # each tile's first query, counted within its row
    num_blocks: torch.Tensor  # [1]
    block_row: torch.Tensor  # the row of each block of positions
    block_start: torch.Tensor  # each block's first position


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """The same on the host, for a subset of the rows."""

    offsets: Array  # [rows]
    tile_row: Array
    tile_start: Array
    block_row: Array
    block_start: Array


def cut(counts: Array, contexts: Array, first_row: int) -> Cut:
    """Split rows `first_row`, ..., whose `counts` queries are the last positions of contexts of length `contexts`."""
    rows = np.arange(first_row, first_row + len(counts))
    blocks = -(-contexts // BLOCK)
    return Cut((blocks.cumsum() - blocks) * BLOCK, *_pieces(rows, counts, TILE), *_pieces(rows, contexts, BLOCK))


def _pieces(rows: Array, lengths: Array, size: int) -> tuple[Array, Array]:
    """Row and start of every piece of at most `size` items."""
    pieces = -(-lengths // size)
    nth = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    return np.repeat(rows, pieces), nth * size
