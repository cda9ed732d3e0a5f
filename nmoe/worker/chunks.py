"""How the prefill rows of a step are cut for attention on the GPU: tiles of queries, blocks of their contexts.

Shape suffixes: R rows of the step, J positions in the workspace where contexts are expanded.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

TILE = 128  # queries of a tile
BLOCK = 128  # positions of a block; contexts begin at whole blocks of the workspace


@dataclasses.dataclass(frozen=True, slots=True)
class Chunks:
    """Rows whose contexts are expanded together: int32 on the device, but for `positions`. R + 1 rows: the last one is
    the padding's, which has queries and no context."""

    positions: int  # J
    starts: torch.Tensor  # [R + 2]: where each row's queries begin
    firsts: torch.Tensor  # [R + 1]: the position of each row's first query; of the padding, minus their number
    offsets: torch.Tensor  # [R + 1]: where each row's context begins in the workspace
    num_tiles: torch.Tensor  # [1]
    tile_row: torch.Tensor  # of each tile of queries
    tile_start: torch.Tensor  # of each tile: its first query, counted within its row
    num_blocks: torch.Tensor  # [1]
    block_row: torch.Tensor  # of each block of positions
    block_start: torch.Tensor  # of each block: its first position


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """The same on the host, for some of the rows."""

    offsets: Array  # [rows]
    tile_row: Array
    tile_start: Array
    block_row: Array
    block_start: Array


def cut(counts: Array, contexts: Array, first_row: int) -> Cut:
    """Rows `first_row`, ... with so many queries, the last positions of contexts of such lengths."""
    rows = np.arange(first_row, first_row + len(counts))
    blocks = -(-contexts // BLOCK)
    return Cut((blocks.cumsum() - blocks) * BLOCK, *_pieces(rows, counts, TILE), *_pieces(rows, contexts, BLOCK))


def _pieces(rows: Array, lengths: Array, size: int) -> tuple[Array, Array]:
    """Row and start of every piece of at most `size`."""
    pieces = -(-lengths // size)
    nth = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    return np.repeat(rows, pieces), nth * size
