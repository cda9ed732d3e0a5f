"""RDEP between worker processes on the CPU: the ranks' slabs are in memory that all of them inherited.

For the protocol, and why two waits and one buffer suffice, see docs/rdep.md. Slabs are evenly spaced, so a single
strided assignment writes the rows of every owner.

Shape suffixes: N ranks, T tokens of this rank, C slots per rank, K experts per token, D hidden, S rows in transit.
"""

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nmoe.messages import CHANNEL_DECODE
from nmoe.slab import DISPATCH, RETURN, SlabLayout
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.rdep import TILE_ROWS, Combine, LocalExperts
from nmoe.worker.rdep.signals import Signals

Array = npt.NDArray[Any]

# A wait may last as long as the other ranks' work between two exchanges, most of which grows with their tokens.
_BOUND_S = 5.0
_BOUND_S_PER_TOKEN = 0.005


class SharedMemory:
    """One rank's end of the exchange. See nmoe.worker.rdep.Exchange."""

    def __init__(
        self,
        layout: SlabLayout,
        memory: mmap.mmap,
        rank: int,
        dtype: torch.dtype,
        *,
        bound_s: float = _BOUND_S,
        bound_s_per_token: float = _BOUND_S_PER_TOKEN,
    ) -> None:
        """`memory` is `make_slabs(layout)`; `dtype` is the model's. A wait may take `bound_s`, plus `bound_s_per_token`
        for each token of the largest rank."""
        self._signals = Signals(layout, memory, rank)
        self._slots = [_Slots(layout, memory, rank, channel) for channel in range(len(layout.channels))]
        self._num_experts = layout.num_experts
        self._ranks_N11 = np.arange(layout.world_size)[:, None, None]
        self._route_dtype = _route_dtype(layout.top_k)
        self._tile_SD = torch.empty(TILE_ROWS, layout.row_bytes // dtype.itemsize, dtype=dtype)
        self._tile_rows = _as_rows(self._tile_SD)
        self._bound_s, self._bound_s_per_token = bound_s, bound_s_per_token
        self._channel = CHANNEL_DECODE

    def meet(self, life: int, stopped: Callable[[], bool], *, bounded: bool) -> bool:
        """See Exchange."""
        self._signals.set_bound(self._bound_s if bounded else math.inf)
        return self._signals.meet(life, stopped)

    def begin(self, channel: int, num_tokens: int, real: torch.Tensor | None = None) -> None:
        """See Exchange; nothing is captured on the CPU."""
        if num_tokens > (limit := self._slots[channel].max_tokens):
            raise ValueError(f"a step of {num_tokens} tokens per rank on channel {channel}, which has {limit} slots")
        self._channel = channel
        self._signals.set_bound(self._bound_s + self._bound_s_per_token * num_tokens)

    def announce(self, num_tokens: int) -> None:
        """See Exchange; there is nothing to prepare."""

    def leave(self) -> None:
        """See Exchange."""
        self._signals.leave()

    def check(self) -> bool:
        """See Exchange."""
        return self._signals.check()

    def dispatch(self, experts: LocalExperts, x_TD: torch.Tensor, routes: Routes) -> Combine:
        """See Exchange."""
        channel, num_tokens = self._channel, len(x_TD)
        slots, epoch = self._slots[channel], self._signals.next_epoch(channel)
        owners_S, tokens_S = self._push(slots, x_TD, routes.ids_TK.numpy(), routes.weights_TK.numpy())
        self._signals.raise_flags(channel, DISPATCH, epoch, num_tokens)

        def combine() -> torch.Tensor:
            self._signals.wait(channel, DISPATCH, epoch)
            self._serve(slots, experts, self._signals.tokens(channel))
            self._signals.raise_flags(channel, RETURN, epoch, 0)
            self._signals.wait(channel, RETURN, epoch)
            return self._sum(slots, owners_S, tokens_S, num_tokens)

        return combine

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """There is a single compute thread; the others' rows arrive meanwhile."""
        return contextlib.nullcontext()

    def _push(self, slots: "_Slots", x_TD: torch.Tensor, ids_TK: Array, weights_TK: Array) -> tuple[Array, Array]:
        """Write each token once into the slab of each rank that owns experts of it. Returns these pairs, by owner."""
        owners_TK = ids_TK // self._num_experts
        here_NTK = owners_TK == self._ranks_N11
        counts_NT = here_NTK.sum(-1, dtype=np.int32)
        owners_S, tokens_S = counts_NT.nonzero()
        here_SK = here_NTK[owners_S, tokens_S]
        local_SK = np.where(here_SK, (ids_TK - owners_TK * self._num_experts)[tokens_S], self._num_experts)
        # An owner's experts come first, in the order of K, so it need not look at the other places.
        order_SK = (~here_SK).argsort(axis=-1, kind="stable")
        rows_S1 = np.arange(len(owners_S))[:, None]
        routes_S = np.empty(len(owners_S), self._route_dtype)
        routes_S["ids"] = local_SK[rows_S1, order_SK]
        routes_S["weights"] = weights_TK[tokens_S[:, None], order_SK]

        slots.theirs_hidden_NC[owners_S, tokens_S] = _as_rows(x_TD)[tokens_S]
        slots.theirs_routes_NC[owners_S, tokens_S] = routes_S
        slots.theirs_counts_NC[:, : len(x_TD)] = counts_NT
        return owners_S, tokens_S

    def _serve(self, slots: "_Slots", experts: LocalExperts, tokens_N: list[int]) -> None:
        """Compute the rows that arrived, in tiles in slot order, and send the sums back."""
        counts_NC = slots.my_counts_NC[:, : max(tokens_N)]
        arrived_NC = (counts_NC > 0) & (np.arange(counts_NC.shape[1]) < np.array(tokens_N)[:, None])
        sources_S, tokens_S = arrived_NC.nonzero()
        for sources, tokens in zip(_tiles(sources_S), _tiles(tokens_S), strict=True):
            wanted = counts_NC[sources, tokens].max()
            routes = slots.my_routes_NC[sources, tokens]
            ids_SK = torch.from_numpy(routes["ids"][:, :wanted].astype(np.int64))
            weights_SK = torch.from_numpy(routes["weights"][:, :wanted])
            sums_SD = experts(self._gather(slots.my_hidden_NC, sources, tokens), Routes(ids_SK, weights_SK))
            slots.theirs_returned_NC[sources, tokens] = _as_rows(sums_SD.to(self._tile_SD.dtype))

    def _sum(self, slots: "_Slots", owners_S: Array, tokens_S: Array, num_tokens: int) -> torch.Tensor:
        """The owners' rows of each token, added in float32 in rank order."""
        sums_TD = torch.zeros(num_tokens, self._tile_SD.shape[1])
        for owners, tokens in zip(_tiles(owners_S), _tiles(tokens_S), strict=True):
            rows_SD = self._gather(slots.my_returned_NC, owners, tokens).float()
            sums_TD.index_add_(0, torch.from_numpy(tokens), rows_SD)
        return sums_TD

    def _gather(self, rows_NC: Array, ranks: Array, tokens: Array) -> torch.Tensor:
        """The rows of these slots, at most one tile; overwritten by the next call."""
        np.take(rows_NC.reshape(-1), ranks * rows_NC.shape[1] + tokens, out=self._tile_rows[: len(ranks)], mode="clip")
        return self._tile_SD[: len(ranks)]


class _Slots:
    """Views of one channel: `my_*` of this rank's slab [other rank, slot], `theirs_*` of this rank's part of every
    rank's slab [other rank, slot]. A row is a single element, so that copying it is one memcpy."""

    def __init__(self, layout: SlabLayout, memory: mmap.mmap, rank: int, channel: int) -> None:
        self._layout, self._memory, self._rank = layout, memory, rank
        at = layout.channels[channel]
        self.max_tokens = at.max_tokens
        hidden, route, count = np.dtype((np.void, layout.row_bytes)), _route_dtype(layout.top_k), np.dtype(np.int32)
        self.my_counts_NC, self.theirs_counts_NC = self._views(at.counts, count)
        self.my_routes_NC, self.theirs_routes_NC = self._views(at.routes, route)
        self.my_hidden_NC, self.theirs_hidden_NC = self._views(at.hidden, hidden)
        self.my_returned_NC, self.theirs_returned_NC = self._views(at.returned, hidden)

    def _views(self, offset: int, row: np.dtype[Any]) -> tuple[Array, Array]:
        slab, shape = self._layout.slab_bytes, (self._layout.world_size, self.max_tokens)
        per_rank = self.max_tokens * row.itemsize
        mine: Array = np.ndarray(shape, row, self._memory, self._rank * slab + offset)
        theirs: Array = np.ndarray(shape, row, self._memory, offset + self._rank * per_rank, (slab, row.itemsize))
        return mine, theirs


def _route_dtype(top_k: int) -> np.dtype[Any]:
    return np.dtype([("ids", np.int32, (top_k,)), ("weights", np.float32, (top_k,))])


def _as_rows(x_TD: torch.Tensor) -> Array:
    """The tensor's rows as single elements, [T], sharing its memory if it is contiguous."""
    row_bytes = x_TD.shape[1] * x_TD.itemsize
    array: Array = x_TD.contiguous().view(torch.uint8).numpy()
    return array.view(np.dtype((np.void, row_bytes)))[:, 0]


def _tiles(array_S: Array) -> Iterator[Array]:
    return (array_S[start : start + TILE_ROWS] for start in range(0, len(array_S), TILE_ROWS))
