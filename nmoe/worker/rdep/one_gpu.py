"""World size 1 on a GPU: every expert is local. In most decode steps one kernel computes routed and shared experts, and
nothing comes here (`takes_shared` in experts_launch.py); otherwise, of very few tokens and of many, the shared experts
run on a second stream beside the routed ones.

Both streams are captured into one graph. The routed experts' kernels follow the router's on one stream, each launched
early while its predecessor runs (early.py), and then occupy every multiprocessor. The shared experts start with the
router, to be there first; but for a single token they start with the routed experts, as they would slow the router's
kernels by more than they gain. The terms of a token's sum are returned unsummed, [T, K, D]; the norm after the layer
adds them, which saves one pass over memory.
"""

import contextlib
from typing import Any

import torch

from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.rdep import Combine, LocalExperts, OneRank


class SharedExpertsStream:
    """The second stream. In steps of few tokens its kernels have priority: behind those of the routed experts, which
    occupy every multiprocessor, they would finish last. In a prefill, the long kernels run in arrival order."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._in_turn = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._current = self._in_turn
        self._forked = False

    def announce(self, tokens: int) -> None:
        """The tokens are ready, and their router comes next on the caller's stream."""
        self._forked = tokens > 1
        if self._forked:
            self._fork(tokens)

    def routed(self, tokens: int) -> None:
        """The routed experts come next."""
        if not self._forked:
            self._fork(tokens)

    def _fork(self, tokens: int) -> None:
        # From now on, work on the second stream runs after all work given to the caller's stream so far. Memory freed
        # on the second stream is reused there, after this point.
        self._current = self._first if early(tokens) else self._in_turn
        self._current.wait_stream(torch.cuda.current_stream())

    def join(self) -> None:
        """From now on, work on the caller's stream runs after all work on the second stream."""
        torch.cuda.current_stream().wait_stream(self._current)
        self._forked = False

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """Run what is in this context on the second stream."""
        return torch.cuda.stream(self._current)


class OneGPU(OneRank):
    """The exchange of a single rank."""

    def __init__(self, device: torch.device) -> None:
        self._second = SharedExpertsStream(device)

    def announce(self, num_tokens: int) -> None:
        """See Exchange."""
        self._second.announce(num_tokens)

    def dispatch(self, experts: LocalExperts, x_TD: torch.Tensor, routes: Routes) -> Combine:
        """See Exchange; the returned function returns the experts' terms, [T, K, D] in the model's dtype."""
        self._second.routed(len(x_TD))
        parts_TKD = experts(x_TD, routes)

        def combine() -> torch.Tensor:
            self._second.join()
            return parts_TKD

        return combine

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """See Exchange."""
        return self._second.use()
