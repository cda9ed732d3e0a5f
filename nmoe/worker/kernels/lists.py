"""Which experts tokens want, and the other way round: which tokens an expert has.

Shape suffixes: T tokens, K experts per token, E experts of this rank, C the most tokens an expert can have, W words.
"""

import dataclasses
from typing import NamedTuple

import torch

WORDS = 8  # int32 between two counts: 32 bytes, so that programs that count for different experts seldom meet


@dataclasses.dataclass(frozen=True, slots=True)
class Lists:
    """Each expert's pairs (token, slot), the number token * K + slot, as the GPU's experts take them.

    Whoever learns a token's experts adds its pairs, so they are in no order: what becomes of a pair must not depend on
    its place in a list, nor on its neighbours (docs/exact.md).
    """

    pairs_EC: torch.Tensor  # int32: an expert's come first in its row
    # int32 [E + 1, WORDS]: how many pairs each expert has; then how many pieces of work the programs of the first and
    # the second product have taken, zero but while these run.
    counts_EW: torch.Tensor


class Routes(NamedTuple):
    """A router's choice."""

    ids_TK: torch.Tensor  # int64; int32 on the GPU
    weights_TK: torch.Tensor  # float32
    lists: Lists | None = None  # the same by expert, on the GPU


def empty_lists(tokens: int, num_experts: int, device: torch.device, tiles: int = 1) -> list[Lists]:
    """For so many tokens in each of some tiles. The memory is as it was: the counts have yet to be set to zero, all of
    them together, as they lie side by side."""
    pairs = torch.empty(tiles, num_experts, tokens, dtype=torch.int32, device=device)
    counts = torch.empty(tiles, num_experts + 1, WORDS, dtype=torch.int32, device=device)
    return [Lists(pairs_EC, counts_EW) for pairs_EC, counts_EW in zip(pairs, counts, strict=True)]


def lists_of(ids_TK: torch.Tensor, num_experts: int) -> Lists:
    """What the kernels are to make of ids in [0, E], where E stands for an expert that lives elsewhere."""
    [lists] = empty_lists(len(ids_TK), num_experts, ids_TK.device)
    has_PE = ids_TK.flatten()[:, None] == torch.arange(num_experts, device=ids_TK.device)
    pair, expert = has_PE.nonzero(as_tuple=True)
    lists.pairs_EC[expert, has_PE.cumsum(0)[pair, expert] - 1] = pair.int()
    lists.counts_EW.zero_()
    lists.counts_EW[:num_experts, 0] = has_PE.sum(0)
    return lists
