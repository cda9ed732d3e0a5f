"""RDEP between GPUs: one-sided writes into the owners' memory, by kernels that are replayed in a CUDA graph.

For the protocol, see docs/rdep.md; the kernels are in `rows_triton.py` and `signals_triton.py`. They run one after
another on the caller's stream, each launched early while its predecessor runs (early.py); the caller's shared experts
run on a second stream, alongside the router and the exchange.

Shape suffixes: N ranks, T tokens of this rank, C slots per rank, K experts per token, D hidden, S rows of a tile.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from nmoe.errors import PeerSilent
from nmoe.messages import CHANNEL_DECODE
from nmoe.slab import COUNT_BITS, NUM_CHANNELS, SlabLayout
from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.experts import Arrived, Returned
from nmoe.worker.kernels.lists import Lists, Routes, empty_lists
from nmoe.worker.rdep import Combine, LocalExperts
from nmoe.worker.rdep import rows_triton as rows
from nmoe.worker.rdep.control import Control
from nmoe.worker.rdep.one_gpu import SharedExpertsStream
from nmoe.worker.rdep.signals_triton import BOUND_NS, EPOCHS, STATE_WORDS

_BOUND_S = 4.0
_WARM_UP_BOUND_S = 600.0  # ranks load kernels then, and may compile one that others have
_NAP_S = 0.001  # between checks of which ranks have begun a life
_TILE_BYTES = 512 << 20  # of the experts' outputs for a tile's rows
_SLOTS_PER_PROGRAM, _OF_FEW_SLOTS, _FEW_SLOTS = 256, 32, 512
_SLOTS_AT_A_TIME = 2048  # counted at a time by a program before its own
# Above this many programs per multiprocessor, each program takes several rows or pieces.
_DISPATCH_PROGRAMS, _DISPATCH_WARPS = 4, 8
_RETURN_PROGRAMS, _RETURN_WARPS = 8, 4
_COLUMNS = 1024  # per piece
_RETURN_REGISTERS = 64  # per thread; with it, the compiler can load all terms of a piece before adding them


def announce_compilation(control: Control, rank: int) -> None:
    """From now on, tell the other ranks when this process compiles a kernel, as on the first use of each shape."""
    triton.knobs.runtime.jit_cache_hook = lambda **_: control.compiles(rank, True)
    triton.knobs.runtime.jit_post_compile_hook = lambda **_: control.compiles(rank, False)


class BetweenGPUs:
    """One rank's end of the exchange. See nmoe.worker.rdep.Exchange."""

    def __init__(
        self,
        layout: SlabLayout,
        slab: torch.Tensor,
        bases: Sequence[int],
        control: Control,
        rank: int,
        dtype: torch.dtype,
        *,
        expected_rows: int,
        bound_s: float = _BOUND_S,
    ) -> None:
        """`slab` uint8 [layout.slab_bytes] is this rank's; `bases` are every rank's slab addresses in this process;
        `dtype` is the model's. Decode steps are tiled for at most `expected_rows` per expert. A wait may take
        `bound_s`."""
        self._layout, self._slab, self._control, self._rank, self._dtype = layout, slab, control, rank, dtype
        self._hidden = layout.row_bytes // dtype.itemsize
        self._expected_rows, self._bound_s = expected_rows, bound_s
        self._second = SharedExpertsStream(slab.device)
        self._bases = torch.tensor(list(bases), dtype=torch.int64, device=slab.device)
        self._state = torch.zeros(STATE_WORDS, dtype=torch.int64, device=slab.device)
        slots = layout.world_size * max(channel.max_tokens for channel in layout.channels)
        # Zeros are valid slots and ids, so reading a row that does not exist stays in bounds.
        self._slots_S = torch.zeros(slots, dtype=torch.int32, device=slab.device)
        self._ids_SK = torch.zeros(slots, layout.top_k, dtype=torch.int32, device=slab.device)
        self._weights_SK = torch.zeros(slots, layout.top_k, dtype=torch.float32, device=slab.device)
        self._num_rows = torch.zeros(1, dtype=torch.int32, device=slab.device)
        self._multiprocessors = multiprocessors(slab.device)
        # Compile-time constants of the kernels.
        self._sizes = {"RANKS": layout.world_size, "K": layout.top_k}
        self._row_sizes = {"EXPERTS": layout.num_experts, "D": self._hidden}
        self._block_k = triton.next_power_of_2(layout.top_k)
        self._tile_rows = max(1, _TILE_BYTES // (layout.top_k * layout.row_bytes) // 1024) * 1024
        self._pushed = [self._pushed_rows(channel) for channel in range(NUM_CHANNELS)]
        self._returned = [self._returned_rows(channel) for channel in range(NUM_CHANNELS)]
        self._life = 0
        self._channel, self._most = CHANNEL_DECODE, 1
        self._real: torch.Tensor | None = None
        torch.cuda.synchronize(slab.device)

    def meet(self, life: int, stopped: Callable[[], bool], *, bounded: bool) -> bool:
        """See Exchange."""
        self.leave()
        # Work left over from the previous life no longer waits for anybody. After this, no kernel of this rank writes
        # anything until all other ranks have reached this point.
        torch.cuda.synchronize(self._slab.device)
        self._life = life
        state = torch.zeros(STATE_WORDS, dtype=torch.int64)
        state[EPOCHS : EPOCHS + NUM_CHANNELS] = life << COUNT_BITS
        state[BOUND_NS] = int((self._bound_s if bounded else _WARM_UP_BOUND_S) * 1e9)
        self._state.copy_(state)
        torch.cuda.synchronize(self._slab.device)
        self._control.begin(self._rank, life)
        started = time.monotonic()
        while missing := self._control.missing(life):
            if stopped():
                return False
            if self._control.blamed(self._rank, life) is not None:
                return True
            if bounded and time.monotonic() - started > self._bound_s:
                self._control.poison(self._rank, life, missing)
                return True
            time.sleep(_NAP_S)
        return True

    def begin(self, channel: int, num_tokens: int, real: torch.Tensor | None = None) -> None:
        """See Exchange."""
        if num_tokens > (limit := self._layout.channels[channel].max_tokens):
            raise ValueError(f"a step of {num_tokens} tokens per rank on channel {channel}, which has {limit} slots")
        self._channel, self._most, self._real = channel, max(1, num_tokens), real

    def announce(self, num_tokens: int) -> None:
        """See Exchange."""
        self._second.announce(num_tokens)

    def leave(self) -> None:
        """See Exchange."""
        self._control.poison(self._rank, self._life, self._control.blamed(self._rank, self._life) or ())

    def check(self) -> bool:
        """See Exchange."""
        if (blamed := self._control.blamed(self._rank, self._life)) is None:
            return True
        if blamed:
            raise PeerSilent(self._rank, sorted(blamed), self._bound_s)
        return False

    def dispatch(self, experts: LocalExperts, x_TD: torch.Tensor, routes: Routes) -> Combine:
        """See Exchange. Ids beyond the last rank's experts belong to nobody. The returned function gives a `Returned`,
        to be added before the next dispatch."""
        if len(x_TD) > self._most:
            raise ValueError(f"{len(x_TD)} tokens in a step that was begun with {self._most} for the largest rank")
        lists = self._empty_lists()
        owners_T = self._push(x_TD, routes, lists)
        self._second.routed(len(x_TD))
        self._arrive(lists)
        self._serve(experts, lists)

        def combine() -> Returned:
            self._second.join()
            return Returned(self._returned[self._channel][: len(x_TD)], owners_T)

        return combine

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """See Exchange."""
        return self._second.use()

    def _push(self, x_TD: torch.Tensor, routes: Routes, lists: list[Lists]) -> torch.Tensor:
        """Send the tokens to their owners and prepare the lists of arriving rows. Returns the tokens' owners, int32
        [T], one bit per rank."""
        layout, at = self._layout, self._layout.channels[self._channel]
        tokens = len(x_TD)
        owners_T = torch.empty(tokens, dtype=torch.int32, device=x_TD.device)
        rows.dispatch_kernel[(max(1, min(tokens, _DISPATCH_PROGRAMS * self._multiprocessors)),)](
            x_TD,
            routes.ids_TK,
            routes.weights_TK,
            owners_T,
            lists[0].counts_EW,
            self._bases,
            self._state,
            self._real,
            len(lists) * lists[0].counts_EW.numel(),
            tokens,
            self._rank,
            self._channel,
            at.max_tokens,
            x_TD.stride(0),
            at.counts,
            at.routes,
            at.hidden,
            at.scales,
            **self._sizes,
            **self._row_sizes,
            BLOCK_K=self._block_k,
            BLOCK_G=triton.next_power_of_2(self._hidden // 128),
            QUANTISED=layout.quantised,
            num_warps=_DISPATCH_WARPS,
            launch_pdl=early(tokens),
        )
        return owners_T

    def _arrive(self, lists: list[Lists]) -> None:
        """Wait for all ranks' rows, then list them, and their pairs by expert."""
        layout, at = self._layout, self._layout.channels[self._channel]
        slots = layout.world_size * self._most
        block = _OF_FEW_SLOTS if slots <= _FEW_SLOTS else _SLOTS_PER_PROGRAM
        rows.arrive_kernel[(triton.cdiv(slots, block),)](
            self._state,
            self._slots_S,
            self._ids_SK,
            self._weights_SK,
            self._num_rows,
            lists[0].counts_EW,
            lists[0].pairs_EC,
            self._slab.data_ptr(),
            self._control.address,
            lists[0].pairs_EC.shape[1],
            self._rank,
            self._channel,
            at.max_tokens,
            self._most,
            at.counts,
            at.routes,
            **self._sizes,
            EXPERTS=layout.num_experts,
            BLOCK_K=self._block_k,
            BLOCK=block,
            SCAN=_SLOTS_AT_A_TIME,
            num_warps=4,
            launch_pdl=early(self._most),
        )

    def _empty_lists(self) -> list[Lists]:
        """Lists for the rows of each tile."""
        slots, num_experts = self._layout.world_size * self._most, self._layout.num_experts
        rows = min(self._tile_rows, slots)
        return empty_lists(rows, num_experts, self._slab.device, tiles=triton.cdiv(slots, rows))

    def _serve(self, experts: LocalExperts, lists: list[Lists]) -> None:
        """Compute the rows that arrived, a tile at a time, and send the sums back; then wait for the others' sums."""
        slots = self._layout.world_size * self._most
        values_CD, scales_CG = self._pushed[self._channel]
        for first, its_lists in zip(range(0, slots, self._tile_rows), lists, strict=True):
            tile = slice(first, min(first + self._tile_rows, slots))
            arrived = Arrived(values_CD, scales_CG, self._slots_S[tile], self._rows_per_expert())
            routes = Routes(self._ids_SK[tile], self._weights_SK[tile], its_lists)
            self._push_back(tile, experts(arrived, routes), tile.stop == slots)

    def _push_back(self, tile: slice, parts_SKD: torch.Tensor, last: bool) -> None:
        at, most = self._layout.channels[self._channel], tile.stop - tile.start
        pieces = most * triton.cdiv(self._hidden, _COLUMNS)
        rows.return_kernel[(min(pieces, _RETURN_PROGRAMS * self._multiprocessors),)](
            parts_SKD,
            self._slots_S[tile],
            self._ids_SK[tile],
            self._num_rows,
            self._bases,
            self._state,
            self._slab.data_ptr(),
            self._control.address,
            tile.start,
            most,
            self._rank,
            self._channel,
            at.max_tokens,
            int(last),
            at.returned,
            **self._sizes,
            **self._row_sizes,
            COLUMNS=_COLUMNS,
            num_warps=_RETURN_WARPS,
            maxnreg=_RETURN_REGISTERS,
            launch_pdl=early(self._most),
        )

    def _view(self, offset: int, slots: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the slab, [slots, width]."""
        return self._slab[offset : offset + slots * width * dtype.itemsize].view(dtype).view(slots, width)

    def _pushed_rows(self, channel: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows of all slots, [N * C, D], and their scales, float32 [N * C, D / 128], if quantised."""
        at, hidden = self._layout.channels[channel], self._hidden
        slots = self._layout.world_size * at.max_tokens
        if not self._layout.quantised:
            return self._view(at.hidden, slots, hidden, self._dtype), None
        values_CD = self._view(at.hidden, slots, hidden, torch.float8_e4m3fn)
        return values_CD, self._view(at.scales, slots, hidden // 128, torch.float32)

    def _returned_rows(self, channel: int) -> torch.Tensor:
        """The owners' sums for all tokens, [C, N, D]."""
        at, ranks = self._layout.channels[channel], self._layout.world_size
        rows_CD = self._view(at.returned, ranks * at.max_tokens, self._hidden, self._dtype)
        return rows_CD.view(ranks, at.max_tokens, self._hidden).transpose(0, 1)

    def _rows_per_expert(self) -> float:
        """The number of a tile's rows per expert if tokens are spread evenly over all ranks' experts."""
        ranks, slots = self._layout.world_size, self._layout.top_k
        each = self._most * slots / self._layout.num_experts
        if self._channel == CHANNEL_DECODE:
            return min(each, self._expected_rows)
        # The expected number of owner ranks per token; a full tile's rows want as many experts here as their tokens do.
        owners = ranks * (1 - (1 - 1 / ranks) ** slots)
        return min(each, self._tile_rows * slots / owners / self._layout.num_experts)
