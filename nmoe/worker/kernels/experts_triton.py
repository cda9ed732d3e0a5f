"""The experts on the GPU; `experts.py` is the reference.

Pairs of (token, slot) are sorted by expert, each expert's padded to whole tiles of rows, on the device: nothing is read
back. For few rows per expert the product is taken transposed (weights times tokens), so that the tile of weights is
what the matrix unit streams and the rows are its narrow side; then every expert's weights are read once, at the speed
of memory. A token's results lie side by side until they are added in the order of its slots.

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
from nmoe.worker.kernels.experts import Arrived, Returned
from nmoe.worker.kernels.fp8 import Activations
from nmoe.worker.kernels.fp8_triton import room_for, store_quantised
from nmoe.worker.kernels.products_triton import add_product, by_rows, empty_tile

_SORT_BLOCK = 1024


class Terms(NamedTuple):
    """A token's expert results and its shared experts', to be added in float32 in this order and rounded once."""

    parts_TKD: torch.Tensor | Returned
    shared_TD: torch.Tensor


class _Tile(NamedTuple):
    columns: int  # of the weights' rows
    depth: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class _Shape:
    """How the two products are tiled for some number of rows per expert."""

    rows: int
    up: _Tile
    down: _Tile
    transposed: bool


# Measured on an H200 at 64 experts of 1408 x 2048; benchmarks/LOG.md has the table.
_FEW = _Shape(16, _Tile(64, 128, 4, 3), _Tile(128, 64, 4, 5), True)
_SOME = _Shape(32, _Tile(64, 64, 4, 5), _Tile(128, 64, 4, 5), True)
_MORE = _Shape(64, _Tile(64, 64, 4, 4), _Tile(128, 64, 4, 4), True)
_MANY = _Shape(128, _Tile(128, 64, 8, 3), _Tile(256, 64, 8, 4), False)


def _shape(rows_per_expert: float) -> _Shape:
    if rows_per_expert <= 16:
        return _FEW
    if rows_per_expert <= 32:
        return _SOME
    return _MORE if rows_per_expert <= 96 else _MANY


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _sort_kernel(
    ids_ptr,
    num_rows_ptr,
    sorted_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    num_pairs,
    first,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per expert: where its tiles begin follows from all counts, which every program takes for itself."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    if num_rows_ptr is not None:
        num_pairs = tl.minimum(num_pairs, tl.maximum(tl.load(num_rows_ptr) - first, 0) * K)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < num_pairs, other=EXPERTS)
        counts += tl.histogram(ids, BINS, mask=ids < EXPERTS)
    tiles = (counts + ROWS - 1) // ROWS
    first = tl.sum(tl.where(bins < expert, tiles, 0), 0)
    mine = tl.sum(tl.where(bins == expert, tiles, 0), 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    if expert == 0:
        word = tl.arange(0, 4)
        tl.store(num_tiles_ptr + word, tl.where(word == 0, tl.sum(tiles, 0), 0), mask=word < 3)
    out = sorted_ptr + first * ROWS
    seen = 0
    for start in range(0, num_pairs, BLOCK):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < num_pairs, other=EXPERTS)
        hit = (ids == expert).to(tl.int32)
        tl.store(out + seen + tl.cumsum(hit, 0) - 1, start + lane, mask=hit != 0)
        seen += tl.sum(hit, 0)
    padding = count + tl.arange(0, ROWS)
    tl.store(out + padding, -1, mask=padding < mine * ROWS)
    for start in range(0, mine, 64):
        tile = start + tl.arange(0, 64)
        tl.store(tile_expert_ptr + first + tile, expert, mask=tile < mine)


@triton.jit
def _gate_up_kernel(
    x_ptr,
    slots_ptr,
    weight_desc,
    sorted_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    out_ptr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Rows of the sorted order: silu(x @ gate) * (x @ up). `slots_ptr`: where each token lies in x, if not in order."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    PER_TILE: tl.constexpr = F // COLUMNS
    for work in range(tl.program_id(0), tl.load(num_tiles_ptr) * PER_TILE, tl.num_programs(0)):
        tile = work // PER_TILE
        column = (work % PER_TILE) * COLUMNS
        row = tile * ROWS + tl.arange(0, ROWS)
        pair = tl.load(sorted_ptr + row)
        exists = pair >= 0
        token = pair // K
        if slots_ptr is not None:
            token = tl.load(slots_ptr + token, mask=exists, other=0)
        x_row = x_ptr + token.to(tl.int64)[:, None] * D + tl.arange(0, DEPTH)[None, :]
        gate_at = tl.load(tile_expert_ptr + tile) * (2 * F) + column
        gate = empty_tile(ROWS, COLUMNS, TRANSPOSED)
        up = empty_tile(ROWS, COLUMNS, TRANSPOSED)
        for k in tl.range(0, D, DEPTH, num_stages=STAGES):
            x = tl.load(x_row + k, mask=exists[:, None], other=0.0)
            w_gate = weight_desc.load([gate_at, k])
            w_up = weight_desc.load([gate_at + F, k])
            gate = add_product(gate, x, w_gate, TRANSPOSED)
            up = add_product(up, x, w_up, TRANSPOSED)
        hidden = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
        hidden = by_rows(hidden, TRANSPOSED)
        tl.store(out_ptr + row.to(tl.int64)[:, None] * F + column + tl.arange(0, COLUMNS)[None, :], hidden)


@triton.jit
def _down_kernel(
    hidden_desc,
    weight_desc,
    weights_ptr,
    sorted_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    out_ptr,
    D: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """hidden @ down times the router's weight, back in the order of the pairs."""
    PER_TILE: tl.constexpr = D // COLUMNS
    works = tl.load(num_tiles_ptr, cache_modifier=".cg") * PER_TILE  # sorted before the kernel before this one
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    for work in range(tl.program_id(0), works, tl.num_programs(0)):
        tile = work // PER_TILE
        column = (work % PER_TILE) * COLUMNS
        pair = tl.load(sorted_ptr + tile * ROWS + tl.arange(0, ROWS))
        exists = pair >= 0
        weight_at = tl.load(tile_expert_ptr + tile) * D + column
        acc = empty_tile(ROWS, COLUMNS, TRANSPOSED)
        for k in tl.range(0, F, DEPTH, num_stages=STAGES):
            hidden = hidden_desc.load([tile * ROWS, k])
            w_down = weight_desc.load([weight_at, k])
            acc = add_product(acc, hidden, w_down, TRANSPOSED)
        factor = tl.load(weights_ptr + pair, mask=exists, other=0.0)
        if TRANSPOSED:
            value = tl.trans((acc * factor[None, :]).to(out_ptr.dtype.element_ty))
        else:
            value = (acc * factor[:, None]).to(out_ptr.dtype.element_ty)
        out = out_ptr + pair.to(tl.int64)[:, None] * D + column + tl.arange(0, COLUMNS)[None, :]
        tl.store(out, value, mask=exists[:, None])


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


def sort_pairs(
    ids_TK: torch.Tensor, num_experts: int, rows: int, arrived: Arrived | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs by expert, each expert's filled up with -1 to whole tiles of `rows`; the expert of each tile; how many
    tiles there are, and a counter for each of the two products, at zero. All int32, as long as any ids could need.
    `ids_TK` int32; of `arrived`, only rows that exist."""
    pairs = ids_TK.numel()
    most = (pairs + min(num_experts, pairs) * (rows - 1)) // rows
    order, tile_expert, num_tiles = (ids_TK.new_empty(size) for size in (most * rows, most, 3))
    bins = triton.next_power_of_2(num_experts)
    _sort_kernel[(num_experts,)](
        ids_TK,
        None if arrived is None else arrived.num_rows,
        order,
        tile_expert,
        num_tiles,
        pairs,
        0 if arrived is None else arrived.first,
        K=ids_TK.shape[1],
        EXPERTS=num_experts,
        BINS=bins,
        BLOCK=_SORT_BLOCK,
        ROWS=rows,
        launch_pdl=early(len(ids_TK)),
    )
    return order, tile_expert, num_tiles


def launched_tiles(tiles: int, rows: int, num_experts: int, arrived: Arrived | None) -> int:
    """For how many of at most so many tiles to launch programs. Of arrived rows few are there as a rule, and a program
    without work takes its time to start and end; so there are programs for twice what is expected, which loop."""
    if arrived is None:
        return tiles
    return min(tiles, 2 * num_experts * math.ceil(arrived.per_expert / rows))


def silu_mul(gate_up_TG: torch.Tensor, *, quantised: bool = False) -> Activations:
    """See experts.py. `quantised`: what products in FP8 take, besides."""
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
    x: torch.Tensor | Arrived,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    w_gate_up_EGD: torch.Tensor,
    w_down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Each token's weighted expert results, in the model's dtype, [T, K, D]: the terms of experts.py's sum.

    `ids_TK` int32, all below E, but for `Arrived` rows; terms of experts that live elsewhere are left as they are. D is
    a multiple of 128 and F of 64.
    """
    arrived, x_TD = (x, x.values_CD) if isinstance(x, Arrived) else (None, x)
    (tokens, slots), (num_experts, hidden, inter) = ids_TK.shape, w_down_EDF.shape
    parts_TKD = x_TD.new_empty(tokens, slots, hidden)
    pairs = tokens * slots
    if not pairs:
        return parts_TKD
    shape = _shape(arrived.per_expert if arrived else pairs / num_experts)
    rows, up, down = shape.rows, shape.up, shape.down
    order, tile_expert, num_tiles = sort_pairs(ids_TK, num_experts, rows, arrived)
    tiles = len(tile_expert)
    launched = launched_tiles(tiles, rows, num_experts, arrived)
    up = up._replace(columns=up.columns if inter % up.columns == 0 else 64)
    down = down._replace(columns=down.columns if hidden % down.columns == 0 else 128)
    hidden_NF = x_TD.new_empty(tiles * rows, inter)
    _gate_up_kernel[(launched * (inter // up.columns),)](
        x_TD,
        arrived.slots_S if arrived else None,
        TensorDescriptor.from_tensor(w_gate_up_EGD.flatten(0, 1), [up.columns, up.depth]),
        order,
        tile_expert,
        num_tiles,
        hidden_NF,
        D=hidden,
        F=inter,
        K=slots,
        ROWS=rows,
        COLUMNS=up.columns,
        DEPTH=up.depth,
        STAGES=up.stages,
        TRANSPOSED=shape.transposed,
        num_warps=up.warps,
        launch_pdl=early(tokens),
    )
    _down_kernel[(launched * (hidden // down.columns),)](
        TensorDescriptor.from_tensor(hidden_NF, [rows, down.depth]),
        TensorDescriptor.from_tensor(w_down_EDF.flatten(0, 1), [down.columns, down.depth]),
        weights_TK,
        order,
        tile_expert,
        num_tiles,
        parts_TKD,
        D=hidden,
        F=inter,
        ROWS=rows,
        COLUMNS=down.columns,
        DEPTH=down.depth,
        STAGES=down.stages,
        TRANSPOSED=shape.transposed,
        num_warps=down.warps,
        launch_pdl=early(tokens),
    )
    return parts_TKD
