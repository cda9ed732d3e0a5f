"""World size 1 on a GPU: every expert is here, and a second stream stands in for the way there and back.

The experts run on the second stream while the caller's shared experts run on its own; both are captured into one graph.
(Shared experts beside the router too would slow its small kernels by more than they gain.) The terms of a token's sum
are handed over as they are, [T, K, D]: the norm behind the layer adds them, one pass over memory less.
"""

import torch

from nmoe.worker.rdep import Combine, LocalExperts, OneRank


class OneGPU(OneRank):
    """The exchange of the only rank."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def dispatch(
        self, experts: LocalExperts, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Combine:
        """See Exchange; the returned function gives the experts' terms, [T, K, D] in the model's dtype."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            parts_TKD = experts(x_TD, ids_TK, weights_TK)

        def combine() -> torch.Tensor:
            # What the second stream frees it reuses for itself, after its next wait for this one.
            torch.cuda.current_stream().wait_stream(self._stream)
            return parts_TKD

        return combine
