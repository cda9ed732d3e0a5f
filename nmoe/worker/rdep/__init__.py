"""How tokens reach their experts: one interface, whatever lies between the ranks. The protocol is docs/rdep.md.

Shape suffixes: T tokens, K experts per token, D hidden, E experts of this rank.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

from nmoe.worker.kernels.experts import Arrived, Returned
from nmoe.worker.kernels.lists import Routes

# x_TD, routes -> float32 [T, D]; local ids in [0, E], where E stands for an expert of another rank. On the GPU the
# routes have lists, what comes back are the terms of that sum, [T, K, D], and x may be `Arrived` rows.
LocalExperts = Callable[[torch.Tensor | Arrived, Routes], torch.Tensor]
Combine = Callable[[], torch.Tensor | Returned]

TILE_ROWS = 1024  # that the experts get at once: bounds their memory when all ranks' tokens want one rank's experts


class Exchange(Protocol):
    """Sends token rows to the ranks that own their experts and brings the weighted sums back.

    Every rank calls it for every layer of every step, also with T = 0: it must serve its experts. An owner's sum over
    a token's local experts is rounded to the model's dtype, on the token's own rank too, and the owners' sums are added
    in float32 in the order of the ranks.
    """

    def meet(self, life: int, stopped: Callable[[], bool], *, bounded: bool) -> bool:
        """Begin a new life, greater than any before and the same on every rank, and wait until every rank has.

        As long as it takes, or `bounded` as other waits are. `stopped` is asked now and then; False when it says so.
        """
        ...

    def begin(self, channel: int, num_tokens: int, real: torch.Tensor | None = None) -> None:
        """A step begins: its channel, and the most tokens that a rank has, which is at least that of its largest rank.

        Of a step that is captured into a graph, `num_tokens` counts padding, and `real`, an integer [1] on the device,
        is read in each replay: how many of this rank's tokens are none, the first ones. Padding is pushed nowhere.
        """
        ...

    def announce(self, num_tokens: int) -> None:
        """Called before the router: the next dispatch has so many tokens, and what the caller will compute `beside` it
        has its inputs."""
        ...

    def dispatch(self, experts: LocalExperts, x_TD: torch.Tensor, routes: Routes) -> Combine:
        """Start the exchange; the routes' ids are global. Of the only rank on a GPU the routes have lists.

        The returned function waits for the sums of the tokens' owners, and gives what the device's `sum_experts` takes:
        on the CPU the float32 sums [T, D]; on the GPU what is yet to be added, in float32 and in order: terms [T, J, D]
        or `Returned`. `experts` gets a bounded number of rows at a time (on the CPU TILE_ROWS), which it must not keep.
        """
        ...

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """Where the caller computes, after `dispatch` and before it calls what that returned, what needs no sums: it
        runs while the tokens are under way."""
        ...

    def leave(self) -> None:
        """End this life on every rank: whoever waits in it goes on at once, and what it computes is void."""
        ...

    def check(self) -> bool:
        """Whether a step's results are right and may leave the rank; False when a rank has ended this life.

        Raises PeerSilent when a rank did not take part. Waits are bounded, and after the first that was in vain the
        others are not waited for at all.
        """
        ...


class OneRank:
    """World size 1: every expert is here, and no memory is shared. The same bits as an exchange with oneself."""

    def meet(self, life: int, stopped: Callable[[], bool], *, bounded: bool) -> bool:
        """There is nobody else."""
        return True

    def begin(self, channel: int, num_tokens: int, real: torch.Tensor | None = None) -> None:
        """Nothing depends on the channel."""

    def announce(self, num_tokens: int) -> None:
        """Nothing is made ready."""

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
        """Nothing is under way."""
        return contextlib.nullcontext()

    def leave(self) -> None:
        """Nobody else waits."""

    def check(self) -> bool:
        """Nobody else can be silent."""
        return True
