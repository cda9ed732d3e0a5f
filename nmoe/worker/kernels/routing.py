"""Which experts each position chose, stored alongside its cache row.

Shape suffixes: T tokens, L layers with experts, K experts per token, N pages, S positions of a page, J positions, B
bytes of a position's routing.
"""

from collections.abc import Sequence

import torch


def keep_routing(ids_LTK: Sequence[torch.Tensor], write_T: torch.Tensor, routing_NSLK: torch.Tensor) -> None:
    """Store the routers' ids, each [T, K], where the tokens' cache rows go: `write_T` as in `Batch`."""
    if not len(write_T) or not ids_LTK:
        return
    ids_TLK = torch.stack(tuple(ids_LTK), 1)
    if ids_TLK.is_cuda:
        from nmoe.worker.kernels import routing_triton

        routing_triton.scatter(ids_TLK, write_T, routing_NSLK)
    else:
        routing_NSLK.flatten(0, 1)[write_T] = ids_TLK.to(routing_NSLK.dtype)


def read_routing(routing_NSLK: torch.Tensor, pages_J: torch.Tensor, positions_J: torch.Tensor) -> torch.Tensor:
    """The stored bytes of these positions, which are in these pages: uint8 [J, B]."""
    size = routing_NSLK.shape[1]
    kept = routing_NSLK.flatten(2).flatten(0, 1).index_select(0, pages_J * size + positions_J % size)
    return kept.view(torch.uint8)
