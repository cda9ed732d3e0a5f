"""The blocks of one step (nmoe/outputs.py), from tensors that are on their way from the device.

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
from nmoe.outputs import pack
from nmoe.worker.kernels.records import HEAD

Array = npt.NDArray[Any]


class Arena:
    """One rank's cells of the arena."""

    def __init__(self, layout: ArenaLayout, memory: mmap.mmap, rank: int) -> None:
        self.cells = range(rank * layout.cells_per_rank, (rank + 1) * layout.cells_per_rank)
        self._logits_CV = torch.frombuffer(memory, dtype=torch.float32).view(-1, layout.vocab_size)

    def write(self, cells_C: Array, logits_CV: torch.Tensor) -> None:
        """Fill these cells."""
        self._logits_CV.index_copy_(0, torch.from_numpy(cells_C.astype(np.int64)), logits_CV)


@dataclasses.dataclass(frozen=True, slots=True)
class Shapes:
    """What each row's block holds: host arrays [N]."""

    told: Array  # int64: records of prompt tokens
    has_sampled: Array  # bool: and one of the sampled token, after them
    cells: Array  # int64: as many as records, or none
    routed: Array  # int64: routed positions
    top_k: Array  # int64
    scored: Array  # int64: ids
    cells_C: Array  # int32: of all rows


class Blocks:
    """The outputs of a step that was launched. Bring everything, record the event that follows, then `finish`."""

    def __init__(self, shapes: Shapes, arena: Arena | None) -> None:
        self._shapes, self._arena = shapes, arena
        self._sampled_MW: torch.Tensor | None = None
        self._routing_JB: torch.Tensor | None = None
        self._prompts_PW: list[torch.Tensor] = []
        self._logits_CV: list[tuple[Array, torch.Tensor]] = []
        self._told_cells_C, self._sampled_cells_C = _split_cells(shapes)

    def add_sampled(self, words_MW: torch.Tensor) -> None:
        """The records of the sampled tokens."""
        self._sampled_MW = _bring(words_MW)

    def add_sampled_logits(self, logits_CV: torch.Tensor) -> None:
        """The logits behind those of them that have cells."""
        self._logits_CV.append((self._sampled_cells_C, _bring(logits_CV.float())))

    def add_prompts(self, words_PW: torch.Tensor) -> None:
        """More records of prompt tokens, in the order of the rows and their positions."""
        self._prompts_PW.append(_bring(words_PW))

    def add_prompt_logits(self, logits_CV: torch.Tensor) -> None:
        """The logits behind those of them that have cells."""
        cells_C, self._told_cells_C = np.split(self._told_cells_C, [len(logits_CV)])
        self._logits_CV.append((cells_C, _bring(logits_CV)))

    def add_routing(self, routing_JB: torch.Tensor) -> None:
        """The routing of all positions."""
        self._routing_JB = _bring(routing_JB)

    def finish(self) -> tuple[bytes, bytes]:
        """`StepDone.blocks` and `block_sizes`, once everything is on the host; the logits are in their cells."""
        for cells_C, logits_CV in self._logits_CV:
            assert self._arena is not None
            self._arena.write(cells_C, logits_CV)
        shapes, parts = self._shapes, self._parts()
        if not shapes.told.any() and all(_uniform(getattr(shapes, name)) for name in _SHAPES):
            return self._alike(*parts)
        return self._one_by_one(*parts)

    def _parts(self) -> tuple[Array, Array, Array]:
        """Records of sampled tokens, of prompts', and the routing: all on the host, of no rows where there are none."""
        none = np.empty((0, HEAD), np.int32)
        sampled_MW = none if self._sampled_MW is None else self._sampled_MW.numpy()
        prompts_PW = torch.cat(self._prompts_PW).numpy() if self._prompts_PW else none
        routing_JB = np.empty((0, 0), np.uint8) if self._routing_JB is None else self._routing_JB.numpy()
        return sampled_MW, prompts_PW, routing_JB

    def _alike(self, sampled_MW: Array, _: Array, routing_JB: Array) -> tuple[bytes, bytes]:
        """The usual step: every row has the same to say, and nothing of its prompt."""
        shapes, rows = self._shapes, len(self._shapes.told)
        cells, records, routed = int(shapes.cells[0]), int(shapes.has_sampled[0]), int(shapes.routed[0])
        header = np.frombuffer(pack(bytes(4 * cells), b"", records, b"", routed), np.uint8)[:12]
        parts = (
            np.broadcast_to(header, (rows, 12)),
            shapes.cells_C.reshape(rows, cells).view(np.uint8),
            sampled_MW.view(np.uint8).reshape(rows, -1),
            routing_JB.reshape(rows, -1),
        )
        blocks = np.concatenate(parts, 1)
        return blocks.tobytes(), np.full(rows, blocks.shape[1], np.int32).tobytes()

    def _one_by_one(self, sampled_MW: Array, prompts_PW: Array, routing_JB: Array) -> tuple[bytes, bytes]:
        shapes, widest = self._shapes, int(self._shapes.top_k.max())
        sampled, told, cell, position = 0, 0, 0, 0
        blocks = []
        for row in range(len(shapes.told)):
            count, cells, routed = int(shapes.told[row]), int(shapes.cells[row]), int(shapes.routed[row])
            k, scored, has_sampled = int(shapes.top_k[row]), int(shapes.scored[row]), bool(shapes.has_sampled[row])
            records = _cut(prompts_PW[told : told + count], widest, k, scored) + _cut(
                sampled_MW[sampled : sampled + has_sampled], widest, k, scored
            )
            blocks.append(
                pack(
                    shapes.cells_C[cell : cell + cells].tobytes(),
                    records,
                    count + has_sampled,
                    routing_JB[position : position + routed].tobytes(),
                    routed,
                )
            )
            sampled, told, cell, position = sampled + has_sampled, told + count, cell + cells, position + routed
        return b"".join(blocks), np.array([len(block) for block in blocks], np.int32).tobytes()


_SHAPES = ("has_sampled", "cells", "routed", "top_k", "scored")


def _uniform(array: Array) -> bool:
    return bool((array == array[0]).all())


def _split_cells(shapes: Shapes) -> tuple[Array, Array]:
    """The cells of prompts' records and of the sampled tokens': a row's are in the order of its positions."""
    is_last = np.zeros(len(shapes.cells_C), np.bool_)
    with_cells = (shapes.cells > 0) & shapes.has_sampled
    is_last[shapes.cells.cumsum()[with_cells] - 1] = True
    return shapes.cells_C[~is_last], shapes.cells_C[is_last]


def _cut(words_NW: Array, widest: int, k: int, scored: int) -> bytes:
    """The records of one request out of those that are wide enough for all: `Returns.record_bytes` each."""
    if not len(words_NW):
        return b""
    ids, logprobs, named = HEAD, HEAD + widest, HEAD + 2 * widest
    if k == widest and words_NW.shape[1] == named + scored:
        return words_NW.tobytes()
    parts = words_NW[:, :ids], words_NW[:, ids : ids + k], words_NW[:, logprobs : logprobs + k]
    return np.concatenate((*parts, words_NW[:, named : named + scored]), 1).tobytes()


def _bring(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, once the device is there."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
