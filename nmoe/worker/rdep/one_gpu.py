"""World size 1 on a GPU: every expert is here, and the shared experts run on a second stream beside the routed ones.

Both are captured into one graph. The routed experts' kernels follow the router's on one stream, where each is made
ready while the one before it runs (early.py), and then keep every multiprocessor. What of the shared experts needs
whole ones begins beside the router, to be there first. Those of a single token begin with the routed experts: they find
room beside them, and would slow the router's by more than they gain. The terms of a token's sum are handed over as they
are, [T, K, D]: the norm behind the layer adds them, one pass over memory less.
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

    def fork(self, tokens: int) -> None:
        """What is put there from now on follows what the caller's stream has been given. What the second stream frees
        it reuses for itself, after this."""
        self._current = self._first if early(tokens) else self._in_turn
        self._current.wait_stream(torch.cuda.current_stream())

    def join(self) -> None:
        """What the caller's stream is given from now on follows what was put there."""
        torch.cuda.current_stream().wait_stream(self._current)

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """Put there what runs in this context."""
        return torch.cuda.stream(self._current)


class OneGPU(OneRank):
    """The exchange of the only rank."""

    def __init__(self, device: torch.device) -> None:
        self._second = SharedExpertsStream(device)

    def announce(self, num_tokens: int) -> None:
        """See Exchange."""
        if num_tokens > 1:
            self._second.fork(num_tokens)

    def dispatch(self, experts: LocalExperts, x_TD: torch.Tensor, routes: Routes) -> Combine:
        """See Exchange; the returned function gives the experts' terms, [T, K, D] in the model's dtype."""
        if len(x_TD) <= 1:
            self._second.fork(len(x_TD))
        parts_TKD = experts(x_TD, routes)

        def combine() -> torch.Tensor:
            self._second.join()
            return parts_TKD

        return combine

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """See Exchange."""
        return self._second.use()
