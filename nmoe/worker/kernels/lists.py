"""Which experts each token wants, and conversely, which tokens each expert has.

Shape suffixes: T tokens, K experts per token, E experts of this rank, C the most tokens an expert can have, W words.
"""

import dataclasses
from typing import NamedTuple

import torch

WORDS = 8  # int32 between counts: 32 bytes, so that programs counting for different experts rarely collide


@dataclasses.dataclass(frozen=True, slots=True)
class Lists:
    """Each expert's pairs (token, slot), numbered token * K + slot, in the form that the GPU's experts take.

    A kernel that learns a token's experts adds its pairs, so they are in no particular order: the result for a pair
    must not depend on its place in a list or on its neighbours (docs/exact.md).
    """

    pairs_EC: torch.Tensor  # int32: an expert's pairs are at the start of its row
    # int32 [E + 1, WORDS], zero before pairs are added. Word 0: each expert's number of pairs; at E, how many pieces of
    # work have been taken. Word 1: how many results of each expert's first product are stored, see
    # experts_warps_gluon.py; at E, the shared experts'. So lists serve one launch.
    counts_EW: torch.Tensor
    # What the router computed them from. Held, because the experts' kernel writes to its own memory while the router
    # may still be running (early.py), so it must not be given the same.
    logits_PTE: torch.Tensor | None = None

    def renew(self) -> None:
        """Let them serve another launch."""
        self.counts_EW[:, 1] = 0
        self.counts_EW[-1, 0] = 0


class Routes(NamedTuple):
    """A router's decision."""

    ids_TK: torch.Tensor  # int64; int32 on the GPU
    weights_TK: torch.Tensor  # float32
    lists: Lists | None = None  # the same grouped by expert, on the GPU


def empty_lists(tokens: int, num_experts: int, device: torch.device, tiles: int = 1) -> list[Lists]:
    """Lists for `tokens` tokens in each of `tiles` tiles. The memory is uninitialised: the counts must still be zeroed,
    all at once, since they are contiguous."""
    pairs = torch.empty(tiles, num_experts, tokens, dtype=torch.int32, device=device)
    counts = torch.empty(tiles, num_experts + 1, WORDS, dtype=torch.int32, device=device)
    return [Lists(pairs_EC, counts_EW) for pairs_EC, counts_EW in zip(pairs, counts, strict=True)]


def lists_of(ids_TK: torch.Tensor, num_experts: int) -> Lists:
    """What the kernels should produce for ids in [0, E], where E stands for an expert on another rank."""
    [lists] = empty_lists(len(ids_TK), num_experts, ids_TK.device)
    has_PE = ids_TK.flatten()[:, None] == torch.arange(num_experts, device=ids_TK.device)
    pair, expert = has_PE.nonzero(as_tuple=True)
    lists.pairs_EC[expert, has_PE.cumsum(0)[pair, expert] - 1] = pair.int()
    lists.counts_EW.zero_()
    lists.counts_EW[:num_experts, 0] = has_PE.sum(0)
    return lists
