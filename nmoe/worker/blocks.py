"""The blocks of one step (nmoe/outputs.py), built from tensors that are being copied from the device.

Shape suffixes: N rows that return something, M records of sampled tokens, P records of prompt tokens, C cells, W words
of a record, J routed positions, B bytes of a position's routing, V vocabulary.
"""

import dataclasses
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmoe.arena import ArenaLayout
from nmoe.outputs import HEADER_BYTES, pack
from nmoe.worker.kernels.records import HEAD

Array = npt.NDArray[Any]


class Arena:
    """One rank's cells of the arena."""

    def __init__(self, layout: ArenaLayout, memory: mmap.mmap, rank: int) -> None:
        self.cells = range(rank * layout.cells_per_rank, (rank + 1) * layout.cells_per_rank)
        self._logits_CV = torch.frombuffer(memory, dtype=torch.float32).view(-1, layout.vocab_size)

    def write(self, cells_C: Array, logits_CV: torch.Tensor) -> None:
        """Write logits to these cells."""
        self._logits_CV.index_copy_(0, torch.from_numpy(cells_C.astype(np.int64)), logits_CV)


@dataclasses.dataclass(frozen=True, slots=True)
class Shapes:
    """The contents of each row's block: host arrays [N]."""

    told: Array  # int64: records of prompt tokens
    has_sampled: Array  # bool: whether the sampled token's record follows them
    cells: Array  # int64: as many as records, or none
    routed: Array  # int64: routed positions
    top_k: Array  # int64
    scored: Array  # int64: ids
    cells_C: Array  # int32: of all rows
    slots: Array  # int64: the rows' slots

    def table(self) -> Array:
        """The columns that determine a block's shape, [N, 6]."""
        return np.stack((self.told, self.has_sampled, self.cells, self.routed, self.top_k, self.scored), 1)


class Blocks:
    """The outputs of a launched step. Add everything, record the event that follows, then `finish`."""

    def __init__(self, shapes: Shapes, arena: Arena | None) -> None:
        self._shapes, self._arena = shapes, arena
        self._sampled_MW: list[torch.Tensor] = []
        self._routing_JB: list[torch.Tensor] = []
        self._prompts_PW: list[torch.Tensor] = []
        self._logits_CV: list[tuple[Array, torch.Tensor]] = []
        self._told_cells_C, self._sampled_cells_C = _split_cells(shapes)

    def failed(self) -> Array:
        """The slots of rows with a prompt token without a log-probability; valid once everything is on the host."""
        if not self._prompts_PW:
            return self._shapes.slots[:0]
        (wrong,) = np.isnan(_joined(self._prompts_PW)[:, 0].view(np.float32)).nonzero()
        rows_P = np.repeat(np.arange(len(self._shapes.told)), self._shapes.told)
        return self._shapes.slots[np.unique(rows_P[wrong])]

    def add_sampled(self, words_MW: torch.Tensor) -> None:
        """Add the records of the sampled tokens."""
        self._sampled_MW.append(_bring(words_MW))

    def add_sampled_logits(self, logits_CV: torch.Tensor) -> None:
        """Add the logits of those of them that have cells."""
        self._logits_CV.append((self._sampled_cells_C, _bring(logits_CV.float())))

    def add_prompts(self, words_PW: torch.Tensor) -> None:
        """Add records of prompt tokens, ordered by row and position."""
        self._prompts_PW.append(_bring(words_PW))

    def add_prompt_logits(self, logits_CV: torch.Tensor) -> None:
        """Add the logits of those of them that have cells."""
        cells_C, self._told_cells_C = np.split(self._told_cells_C, [len(logits_CV)])
        self._logits_CV.append((cells_C, _bring(logits_CV)))

    def add_routing(self, routing_JB: torch.Tensor) -> None:
        """Add the routing of all positions."""
        self._routing_JB.append(_bring(routing_JB))

    def finish(self) -> tuple[bytes, bytes]:
        """`StepDone.blocks` and `block_sizes`, once everything is on the host; writes the logits to their cells."""
        for cells_C, logits_CV in self._logits_CV:
            assert self._arena is not None
            self._arena.write(cells_C, logits_CV)
        shapes_N6 = self._shapes.table()
        if (shapes_N6 == shapes_N6[0]).all():  # the common case
            blocks = self._alike(np.arange(len(shapes_N6)))
            return blocks.tobytes(), np.full(len(blocks), blocks.shape[1], np.int32).tobytes()
        kinds: dict[tuple[int, ...], list[int]] = {}
        for row, shape in enumerate(shapes_N6.tolist()):
            kinds.setdefault(tuple(shape), []).append(row)
        groups = [np.array(rows) for rows in kinds.values()]
        alike = [self._alike(rows) for rows in groups]
        sizes = np.empty(len(shapes_N6), np.int32)
        for rows, blocks in zip(groups, alike, strict=True):
            sizes[rows] = blocks.shape[1]
        begins = _before(sizes)
        joined = np.empty(int(sizes.sum()), np.uint8)
        for rows, blocks in zip(groups, alike, strict=True):
            if len(rows) == 1:  # may be long
                joined[begins[rows[0]] :][: blocks.size] = blocks[0]
            else:
                joined[begins[rows, None] + np.arange(blocks.shape[1])] = blocks
        return joined.tobytes(), sizes.tobytes()

    def _alike(self, rows: Array) -> Array:
        """The blocks of these rows, which all have the same shape: uint8, one per line."""
        shapes, first = self._shapes, int(rows[0])
        told, routed = int(shapes.told[first]), int(shapes.routed[first])
        cells, records = int(shapes.cells[first]), told + bool(shapes.has_sampled[first])
        header = np.frombuffer(pack(bytes(4 * cells), b"", records, b"", routed), np.uint8)[:HEADER_BYTES]
        parts = [
            np.broadcast_to(header, (len(rows), HEADER_BYTES)),
            _lines(shapes.cells_C, _before(shapes.cells)[rows], cells),
        ]
        for words, begins, count in (
            (self._prompts_PW, _before(shapes.told)[rows], told),
            (self._sampled_MW, _before(shapes.has_sampled)[rows], records - told),
        ):
            if count:
                cut = _cut(_joined(words), shapes, first)
                parts.append(_lines(cut, begins, count))
        if routed:
            routing_JB = _joined(self._routing_JB)
            parts.append(_lines(routing_JB, _before(shapes.routed)[rows], routed))
        return np.concatenate(parts, 1)


def _joined(parts: list[torch.Tensor]) -> Array:
    return parts[0].numpy() if len(parts) == 1 else np.concatenate([part.numpy() for part in parts])


def _before(counts: Array) -> Array:
    """How many items precede each row's."""
    before: Array = counts.cumsum(dtype=np.int64) - counts
    return before


def _lines(items: Array, begins: Array, count: int) -> Array:
    """The bytes of `count` items starting at each of `begins`, one line each: uint8 [len(begins), ...]."""
    if len(begins) == 1:
        chosen = items[begins[0] : begins[0] + count]
    elif len(items) == len(begins) * count:
        chosen = items
    else:
        chosen = items[begins[:, None] + np.arange(count)]
    return np.ascontiguousarray(chosen).view(np.uint8).reshape(len(begins), -1)


def _split_cells(shapes: Shapes) -> tuple[Array, Array]:
    """Split the cells into those of prompt records and those of sampled tokens; a row's cells are in position order."""
    is_last = np.zeros(len(shapes.cells_C), np.bool_)
    with_cells = (shapes.cells > 0) & shapes.has_sampled
    is_last[shapes.cells.cumsum()[with_cells] - 1] = True
    return shapes.cells_C[~is_last], shapes.cells_C[is_last]


def _cut(words_NW: Array, shapes: Shapes, row: int) -> Array:
    """Cut records that are wide enough for any row to `row`'s width: words of `Returns.record_bytes`."""
    widest, k, scored = int(shapes.top_k.max()), int(shapes.top_k[row]), int(shapes.scored[row])
    logprobs, named = HEAD + widest, HEAD + 2 * widest
    if k == widest and words_NW.shape[1] == named + scored:
        return words_NW
    parts = words_NW[:, : HEAD + k], words_NW[:, logprobs : logprobs + k], words_NW[:, named : named + scored]
    return np.concatenate(parts, 1)


def _bring(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, valid once the device has copied it."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
