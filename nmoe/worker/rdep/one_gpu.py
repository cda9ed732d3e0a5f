"""World size 1 on a GPU: every expert is here, and the shared experts run on a second stream beside the routed ones.

Both are captured into one graph. The routed experts' kernels follow the router's on one stream, where each is made
ready while the one before it runs (early.py). (Shared experts beside the router too would slow its small kernels by
more than they gain.) The terms of a token's sum are handed over as they are, [T, K, D]: the norm behind the layer adds
them, one pass over memory less.
"""

import contextlib
from typing import Any

import torch

from nmoe.worker.rdep import Combine, LocalExperts, OneRank


class OneGPU(OneRank):
    """The exchange of the only rank."""

    def __init__(self, device: torch.device) -> None:
        self._beside = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def dispatch(
        self, experts: LocalExperts, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Combine:
        """See Exchange; the returned function gives the experts' terms, [T, K, D] in the model's dtype."""
        # What the second stream frees it reuses for itself, after this wait.
        self._beside.wait_stream(torch.cuda.current_stream())
        parts_TKD = experts(x_TD, ids_TK, weights_TK)

        def combine() -> torch.Tensor:
            torch.cuda.current_stream().wait_stream(self._beside)
            return parts_TKD

        return combine

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """See Exchange."""
        return torch.cuda.stream(self._beside)
