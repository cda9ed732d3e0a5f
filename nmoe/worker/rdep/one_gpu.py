"""World size 1 on a GPU: every expert is here, and the shared experts run on a second stream beside the routed ones.

Both are captured into one graph. The routed experts' kernels follow the router's on one stream, where each is made
ready while the one before it runs (early.py), and then keep every multiprocessor. The shared experts begin beside the
router, to be there first; but of a single token with the routed ones, since they would slow the router's kernels by
more than they gain. The terms of a token's sum are handed over as they are, [T, K, D]: the norm behind the layer adds
them, one pass over memory less.
"""

import contextlib
from typing import Any

import torch

from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.rdep import Combine, LocalExperts, OneRank


class SharedExpertsStream:
    """The second stream. In steps of few tokens its kernels go first: behind those of the routed experts, which want
    every multiprocessor, they would end after them. The long ones of a prefill take turns as they come."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._in_turn = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._current = self._in_turn
        self._forked = False

    def announce(self, tokens: int) -> None:
        """The tokens are there, and their router comes next on the caller's stream."""
        self._forked = tokens > 1
        if self._forked:
            self._fork(tokens)

    def routed(self, tokens: int) -> None:
        """The routed experts come next."""
        if not self._forked:
            self._fork(tokens)

    def _fork(self, tokens: int) -> None:
        # What is put there from now on follows what the caller's stream has been given. What the second stream frees it
        # reuses for itself, after this.
        self._current = self._first if early(tokens) else self._in_turn
        self._current.wait_stream(torch.cuda.current_stream())

    def join(self) -> None:
        """What the caller's stream is given from now on follows what was put there."""
        torch.cuda.current_stream().wait_stream(self._current)
        self._forked = False

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """Put there what runs in this context."""
        return torch.cuda.stream(self._current)


class OneGPU(OneRank):
    """The exchange of the only rank."""

    def __init__(self, device: torch.device) -> None:
        self._second = SharedExpertsStream(device)

    def announce(self, num_tokens: int) -> None:
        """See Exchange."""
        self._second.announce(num_tokens)

    def dispatch(self, experts: LocalExperts, x_TD: torch.Tensor, routes: Routes) -> Combine:
        """See Exchange; the returned function gives the experts' terms, [T, K, D] in the model's dtype."""
        self._second.routed(len(x_TD))
        parts_TKD = experts(x_TD, routes)

        def combine() -> torch.Tensor:
            self._second.join()
            return parts_TKD

        return combine

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """See Exchange."""
        return self._second.use()
