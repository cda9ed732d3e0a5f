"""The experts on the GPU in Triton: the cases that experts_gluon.py leaves, namely fewer rows than experts, and sizes
not in blocks of 128. `experts.py` is the reference.

Each expert's list of pairs (lists.py) is split into tiles of rows on the device: nothing is read back. Tiles are
numbered consecutively across experts, and so are the rows between the two products; some rows of an expert's last tile
are undefined. For few rows per expert the product is transposed (weights times tokens), so that the tensor cores stream
the tile of weights and the rows are the narrow side; then each expert's weights are read once, at the speed of memory.
A token's results are stored side by side until they are added in slot order.

Shape suffixes: T tokens, K experts per token, D hidden, F intermediate, E experts, G = 2F.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.expert_weights import TILE, experts_sizes, stored_rows
from nmoe.worker.kernels.experts import Arrived, Returned
from nmoe.worker.kernels.fp8 import Activations
from nmoe.worker.kernels.fp8_triton import room_for, store_quantised
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.kernels.lists_triton import find_tile, load_counts
from nmoe.worker.kernels.products_triton import add_product, by_rows, empty_tile


class Terms(NamedTuple):
    """Terms to be added in float32 in this order and rounded once: a token's expert results and its shared experts', or
    the parts of a product."""

    parts_TKD: torch.Tensor | Returned
    shared_TD: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class _Form:
    """How the two products are divided among programs for a given number of rows per expert. A program of the first
    one has a tile of gate and of up (expert_weights.py), a program of the second one two neighbouring tiles."""

    rows: int
    depth: int  # inputs at a time of the first product; of the second it is a tile's
    up_stages: int
    down_stages: int
    warps: int
    transposed: bool


# The forms after the first are used where F is not a multiple of 128.
_FEW = _Form(16, depth=128, up_stages=3, down_stages=5, warps=4, transposed=True)
_SOME = _Form(32, depth=64, up_stages=5, down_stages=5, warps=4, transposed=True)
_MORE = _Form(64, depth=64, up_stages=4, down_stages=4, warps=4, transposed=True)
_MANY = _Form(128, depth=64, up_stages=3, down_stages=4, warps=8, transposed=False)

_TILE = tl.constexpr(TILE)  # of outputs, and in bfloat16 also of inputs


def _form(rows_per_expert: float) -> _Form:
    if rows_per_expert <= 16:
        return _FEW
    if rows_per_expert <= 32:
        return _SOME
    return _MORE if rows_per_expert <= 96 else _MANY


@triton.jit
def _first_row(output, INPUTS: tl.constexpr, GROUP: tl.constexpr):
    """Where an output, counted over all experts as they are stored, has its first inputs (expert_weights.py)."""
    return output // GROUP * (INPUTS // _TILE * GROUP) + output % GROUP


@triton.jit(do_not_specialize=["capacity", "most"])
def _gate_up_kernel(
    x_ptr,
    slots_ptr,
    weight_desc,
    pairs_ptr,
    counts_ptr,
    out_ptr,
    capacity,
    most,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BINS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """The tiles' rows: silu(x @ gate) * (x @ up). `slots_ptr`: each token's index in x, if not in order."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    PER_TILE: tl.constexpr = F // _TILE
    counts, ends = load_counts(counts_ptr, capacity, most, E, BINS, ROWS)
    for work in range(tl.program_id(0), tl.max(ends, 0) * PER_TILE, tl.num_programs(0)):
        tile = work // PER_TILE
        block = work % PER_TILE
        expert, first, left = find_tile(tile, counts, ends, ROWS)
        lane = tl.arange(0, ROWS)
        exists = lane < left
        token = tl.load(pairs_ptr + expert * capacity + first + lane, mask=exists, other=0) // K
        if slots_ptr is not None:
            token = tl.load(slots_ptr + token, mask=exists, other=0)
        x_row = x_ptr + token.to(tl.int64)[:, None] * D + tl.arange(0, _TILE)[None, :]
        output = (block * _TILE) // (GROUP // 2) * GROUP + (block * _TILE) % (GROUP // 2)
        at = _first_row(expert * (2 * F) + output, D, GROUP)
        gate = empty_tile(ROWS, _TILE, TRANSPOSED)
        up = empty_tile(ROWS, _TILE, TRANSPOSED)
        for begin in tl.range(0, D, DEPTH, num_stages=STAGES):
            for k in tl.static_range(0, DEPTH, _TILE):
                x = tl.load(x_row + begin + k, mask=exists[:, None], other=0.0)
                row = at + (begin + k) // _TILE * GROUP
                w_gate = weight_desc.load([row, 0])
                w_up = weight_desc.load([row + GROUP // 2, 0])
                gate = add_product(gate, x, w_gate, TRANSPOSED)
                up = add_product(up, x, w_up, TRANSPOSED)
        hidden = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
        hidden = by_rows(hidden, TRANSPOSED)
        row = (tile * ROWS + lane).to(tl.int64)
        tl.store(
            out_ptr + row[:, None] * F + block * _TILE + tl.arange(0, _TILE)[None, :], hidden, eviction_policy=KEPT
        )


@triton.jit
def _store_weighted(acc, factor, rows_ptr, exists, TRANSPOSED: tl.constexpr, KEPT: tl.constexpr):
    """Store the products of some rows times the router's weights."""
    value = acc * factor[None, :] if TRANSPOSED else acc * factor[:, None]
    value = by_rows(value.to(rows_ptr.dtype.element_ty), TRANSPOSED)
    tl.store(rows_ptr[:, None] + tl.arange(0, _TILE)[None, :], value, mask=exists[:, None], eviction_policy=KEPT)


@triton.jit(do_not_specialize=["capacity", "most"])
def _down_kernel(
    hidden_desc,
    weight_desc,
    weights_ptr,
    pairs_ptr,
    counts_ptr,
    out_ptr,
    capacity,
    most,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    BINS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """hidden @ down times the router's weight, returned in pair order."""
    PER_TILE: tl.constexpr = D // (2 * _TILE)
    counts, ends = load_counts(counts_ptr, capacity, most, E, BINS, ROWS)  # the previous kernel has waited for them
    works = tl.max(ends, 0) * PER_TILE
    work = tl.program_id(0)
    expert, first, left = find_tile(work // PER_TILE, counts, ends, ROWS)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    while work < works:
        tile = work // PER_TILE
        block = 2 * (work % PER_TILE)
        lane = tl.arange(0, ROWS)
        exists = lane < left
        pair = tl.load(pairs_ptr + expert * capacity + first + lane, mask=exists, other=0)
        at = _first_row(expert * D + block * _TILE, F, GROUP)
        one = empty_tile(ROWS, _TILE, TRANSPOSED)
        other = empty_tile(ROWS, _TILE, TRANSPOSED)
        for k in tl.range(0, F, _TILE, num_stages=STAGES):
            hidden = hidden_desc.load([tile * ROWS, k])
            row = at + k // _TILE * GROUP
            one = add_product(one, hidden, weight_desc.load([row, 0]), TRANSPOSED)
            other = add_product(other, hidden, weight_desc.load([row + _TILE, 0]), TRANSPOSED)
        factor = tl.load(weights_ptr + pair, mask=exists, other=0.0)
        rows_ptr = out_ptr + pair.to(tl.int64) * D + block * _TILE
        _store_weighted(one, factor, rows_ptr, exists, TRANSPOSED, KEPT)
        _store_weighted(other, factor, rows_ptr + _TILE, exists, TRANSPOSED, KEPT)
        work += tl.num_programs(0)
        expert, first, left = find_tile(work // PER_TILE, counts, ends, ROWS)


@triton.jit(do_not_specialize=["scales_stride"])
def _silu_mul_kernel(x_ptr, out_ptr, values_ptr, scales_ptr, scales_stride, F: tl.constexpr, BLOCK: tl.constexpr):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < F
    gate = tl.load(x_ptr + token * (2 * F) + lane, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * (2 * F) + F + lane, mask=inside, other=0.0).to(tl.float32)
    hidden = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * F + lane, hidden, mask=inside)
    if values_ptr is not None:
        group = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
        blocks = tl.reshape(hidden.to(tl.float32), [BLOCK // 128, 128])
        store_quantised(blocks, group, group < F // 128, values_ptr, scales_ptr, token, scales_stride, F // 128)


def most_tiles(pairs: int, num_experts: int, rows: int) -> int:
    """The most tiles of `rows` rows that the lists of `pairs` pairs can be split into."""
    return (pairs + min(num_experts, pairs) * (rows - 1)) // rows


def launched_tiles(tiles: int, rows: int, num_experts: int, arrived: Arrived | None) -> int:
    """How many of `tiles` tiles to launch programs for. Usually few rows arrive, and a program without work still takes
    time to start and finish, so there are programs for twice the expected number of tiles, which loop."""
    if arrived is None:
        return tiles
    return min(tiles, 2 * num_experts * math.ceil(arrived.per_expert / rows))


def silu_mul(gate_up_TG: torch.Tensor, *, quantised: bool = False) -> Activations:
    """See experts.py. `quantised`: also return what products in FP8 take."""
    tokens, intermediate = len(gate_up_TG), gate_up_TG.shape[1] // 2
    out_TF = gate_up_TG.new_empty(tokens, intermediate)
    out = room_for(out_TF) if quantised else None
    if tokens:
        _silu_mul_kernel[(tokens, triton.cdiv(intermediate, 1024))](
            gate_up_TG,
            out_TF,
            out and out.values_PI,
            out and out.scales_CP,
            out.scales_CP.stride(0) if out else 0,
            F=intermediate,
            BLOCK=1024,
            launch_pdl=early(tokens),
        )
    return out_TF if out is None else out


def grouped_mlp(
    x: torch.Tensor | Arrived, routes: Routes, w_gate_up: torch.Tensor, w_down: torch.Tensor
) -> torch.Tensor:
    """Each token's weighted expert results, in the model's dtype, [T, K, D]: the terms of experts.py's sum.

    The weights are `empty_experts`'. Of the routes, only the lists and weights are used; terms of experts on other
    ranks, and of `Arrived` rows that do not exist, are left uninitialised. D is a multiple of 128 and F of 64.
    """
    assert routes.lists is not None
    arrived, x_TD = (x, x.values_CD) if isinstance(x, Arrived) else (None, x)
    (tokens, slots), (num_experts, hidden, inter) = routes.weights_TK.shape, experts_sizes(w_down)
    parts_TKD = x_TD.new_empty(tokens, slots, hidden)
    pairs = tokens * slots
    if not pairs:
        return parts_TKD
    form = _form(arrived.per_expert if arrived else pairs / num_experts)
    rows = form.rows
    tiles = most_tiles(pairs, num_experts, rows)
    launched = launched_tiles(tiles, rows, num_experts, arrived)
    pairs_EC, counts_EW = routes.lists.pairs_EC, routes.lists.counts_EW
    sizes = {"D": hidden, "F": inter, "E": num_experts, "BINS": triton.next_power_of_2(num_experts)}
    options = {
        "TRANSPOSED": form.transposed,
        "KEPT": kept(tokens),
        "num_warps": form.warps,
        "launch_pdl": early(tokens),
    }
    hidden_NF = x_TD.new_empty(tiles * rows, inter)
    _gate_up_kernel[(launched * (inter // TILE),)](
        x_TD,
        arrived.slots_S if arrived else None,
        _descriptor(w_gate_up),
        pairs_EC,
        counts_EW,
        hidden_NF,
        pairs_EC.shape[1],
        tiles,
        **sizes,
        K=slots,
        GROUP=w_gate_up.shape[3],
        ROWS=rows,
        DEPTH=form.depth,
        STAGES=form.up_stages,
        **options,
    )
    _down_kernel[(launched * (hidden // (2 * TILE)),)](
        TensorDescriptor.from_tensor(hidden_NF, [rows, w_down.shape[4]]),
        _descriptor(w_down),
        routes.weights_TK,
        pairs_EC,
        counts_EW,
        parts_TKD,
        pairs_EC.shape[1],
        tiles,
        **sizes,
        GROUP=w_down.shape[3],
        ROWS=rows,
        STAGES=form.down_stages,
        **options,
    )
    return parts_TKD


def _descriptor(weights_EGCPQ: torch.Tensor) -> TensorDescriptor:
    """For loading a tile."""
    return TensorDescriptor.from_tensor(stored_rows(weights_EGCPQ), [TILE, weights_EGCPQ.shape[4]])
