"""How tokens reach their experts: one interface, whatever connects the ranks. For the protocol, see docs/rdep.md.

Shape suffixes: T tokens, K experts per token, D hidden, E experts of this rank.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

from nmoe.worker.kernels.experts import Arrived, Returned
from nmoe.worker.kernels.lists import Routes

# x_TD, routes -> float32 [T, D]; local ids in [0, E], where E stands for an expert on another rank. On the GPU the
# routes have lists, the result is the terms of that sum, [T, K, D], and x may be `Arrived` rows.
LocalExperts = Callable[[torch.Tensor | Arrived, Routes], torch.Tensor]
Combine = Callable[[], torch.Tensor | Returned]

TILE_ROWS = 1024  # given to the experts at a time: bounds memory when all ranks' tokens want one rank's experts


class Exchange(Protocol):
    """Sends token rows to the ranks that own their experts and returns the weighted sums.

    Every rank calls it for every layer of every step, even with T = 0, because it must serve its experts. An owner's
    sum over a token's local experts is rounded to the model's dtype, even on the token's own rank, and the owners' sums
    are added in float32 in rank order.
    """

    def meet(self, life: int, stopped: Callable[[], bool], *, bounded: bool) -> bool:
        """Begin a new life, greater than any before and the same on every rank, and wait until every rank has begun it.

        Waits without limit, or, if `bounded`, like other waits. Polls `stopped` and returns False once it is true.
        """
        ...

    def begin(self, channel: int, num_tokens: int, real: torch.Tensor | None = None) -> None:
        """Begin a step on a channel. `num_tokens` is at least the token count of the largest rank.

        For a step captured into a graph, `num_tokens` includes padding, and each replay reads `real`, an integer [1] on
        the device: how many of this rank's tokens, at the start, are not padding. Padding is sent nowhere.
        """
        ...

    def announce(self, num_tokens: int) -> None:
        """Called before the router: the next dispatch has `num_tokens` tokens, and the inputs of the caller's
        computation `beside` it are ready."""
        ...

    def dispatch(self, experts: LocalExperts, x_TD: torch.Tensor, routes: Routes) -> Combine:
        """Start the exchange; the routes' ids are global. With a single rank on a GPU, the routes have lists.

        The returned function waits for the owners' sums and returns what the device's `sum_experts` takes: on the CPU
        the float32 sums [T, D]; on the GPU what is still to be added, in float32 and in order: terms [T, J, D] or
        `Returned`. `experts` gets a bounded number of rows at a time (TILE_ROWS on the CPU) and must not keep them.
        """
        ...

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which the caller computes what needs no sums, between `dispatch` and calling the function it
        returned: it overlaps with the transfer of tokens."""
        ...

    def leave(self) -> None:
        """End this life on every rank: ranks waiting in it proceed at once, and their results are void."""
        ...

    def check(self) -> bool:
        """Whether a step's results are correct and may leave the rank. False if a rank has ended this life.

        Raises PeerSilent if a rank did not take part. Waits are bounded, and after the first one that fails there are
        no further waits.
        """
        ...


class OneRank:
    """World size 1: every expert is local and no memory is shared. Same bits as an exchange with oneself."""

    def meet(self, life: int, stopped: Callable[[], bool], *, bounded: bool) -> bool:
        """There are no other ranks."""
        return True

    def begin(self, channel: int, num_tokens: int, real: torch.Tensor | None = None) -> None:
        """Nothing depends on the channel."""

    def announce(self, num_tokens: int) -> None:
        """There is nothing to prepare."""

    def dispatch(self, experts: LocalExperts, x_TD: torch.Tensor, routes: Routes) -> Combine:
        """See Exchange."""
        ids_TK, weights_TK, _ = routes

        def combine() -> torch.Tensor:
            tiles = [slice(start, start + TILE_ROWS) for start in range(0, max(1, len(x_TD)), TILE_ROWS)]
            of_tiles = ((x_TD[tile], Routes(ids_TK[tile], weights_TK[tile])) for tile in tiles)
            sums = [experts(*tile).to(x_TD.dtype).float() for tile in of_tiles]
            return sums[0] if len(sums) == 1 else torch.cat(sums)

        return combine

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing is in transit."""
        return contextlib.nullcontext()

    def leave(self) -> None:
        """No other rank is waiting."""

    def check(self) -> bool:
        """There is no other rank to be silent."""
        return True
