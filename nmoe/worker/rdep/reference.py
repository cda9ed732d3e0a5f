"""What an exchange computes, in one process and without shared memory: the specification that implementations are
tested against, bit for bit.

Shape suffixes: T tokens of a rank, K experts per token, D hidden, S rows, E experts of a rank.
"""

from collections.abc import Sequence

import torch

from nmoe.worker.kernels.lists import Routes
from nmoe.worker.rdep import TILE_ROWS, LocalExperts

# x_TD and the routes (global ids) of one rank
Tokens = tuple[torch.Tensor, Routes]


def exchange(experts: Sequence[LocalExperts], num_experts: int, ranks: Sequence[Tokens]) -> list[torch.Tensor]:
    """The weighted sums of each rank's tokens, float32 [T, D].

    `experts[r]` are rank r's `num_experts` experts, ids [r * num_experts, (r + 1) * num_experts). An owner computes its
    rows ordered by rank, then by token, TILE_ROWS at a time; its sum for a token is rounded to the dtype of x, and the
    owners' sums are added in float32 in rank order.
    """
    sums = [torch.zeros_like(x_TD, dtype=torch.float32) for x_TD, _ in ranks]
    for owner, local_experts in enumerate(experts):
        wanted = [
            (rank, token)
            for rank, (_, routes) in enumerate(ranks)
            for token, ids_K in enumerate(routes.ids_TK)
            if (ids_K // num_experts == owner).any()
        ]
        for start in range(0, len(wanted), TILE_ROWS):
            tile = wanted[start : start + TILE_ROWS]
            rows = [_row(ranks[rank], token, owner, num_experts) for rank, token in tile]
            x_SD, ids_SK, weights_SK = (torch.stack(column) for column in zip(*rows, strict=True))
            for (rank, token), sum_D in zip(tile, local_experts(x_SD, Routes(ids_SK, weights_SK)), strict=True):
                sums[rank][token] += sum_D.to(x_SD.dtype).float()
    return sums


def _row(tokens: Tokens, token: int, owner: int, num_experts: int) -> tuple[torch.Tensor, ...]:
    """One token as its owner receives it: local ids, the owner's own first, `num_experts` for experts of others."""
    x_TD, (ids_TK, weights_TK, _) = tokens
    ids_K, weights_K = ids_TK[token], weights_TK[token]
    here_K = ids_K // num_experts == owner
    local_K = torch.where(here_K, ids_K - owner * num_experts, num_experts)
    order_K = (~here_K).to(torch.int8).argsort(stable=True)
    return x_TD[token], local_K[order_K], weights_K[order_K]
