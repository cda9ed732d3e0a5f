"""How tokens reach their experts: one interface, whatever lies between the ranks."""

from collections.abc import Callable
from typing import Protocol

import torch

# x_TD, ids_TK, weights_TK -> float32 [T, D]; local ids in [0, E], where E stands for an expert of another rank.
LocalExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Combine = Callable[[], torch.Tensor]


class Exchange(Protocol):
    """Sends token rows to the ranks that own their experts and brings the weighted sums back.

    Every rank calls it for every layer of every step, also with T = 0: it must serve its experts.
    """

    def dispatch(
        self, experts: LocalExperts, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Combine:
        """Start the exchange; ids are global. The returned function waits for the sums, float32 [T, D].

        What the caller computes between the two runs while the tokens are under way.
        """
        ...


class OneRank:
    """World size 1: every expert is here."""

    def dispatch(
        self, experts: LocalExperts, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Combine:
        """See Exchange."""
        return lambda: experts(x_TD, ids_TK, weights_TK)
