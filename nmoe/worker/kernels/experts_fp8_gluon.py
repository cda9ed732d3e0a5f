"""The experts in FP8 on the GPU: the products of experts_triton.py with block-quantised weights and activations, by
warps with roles of their own, in Gluon; see fp8_warps_gluon.py.

As many programs as multiprocessors take the tiles that exist in turn. The first product quantises what it gives as it
stores it: a program's 128 columns are one block. A value has the same bits in a tile of any size.

Shape suffixes: T tokens, K experts per token, D hidden, F intermediate, E experts, G = 2F.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nmoe.worker.kernels.device import multiprocessors
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.experts import Arrived
from nmoe.worker.kernels.experts_triton import sort_pairs
from nmoe.worker.kernels.fp8 import BLOCK, BlockFP8
from nmoe.worker.kernels.fp8_triton import quantise
from nmoe.worker.kernels.fp8_warps_gluon import (
    OUTPUTS,
    WORKER_REGISTERS,
    WORKER_WARPS,
    Work,
    descriptor,
    load_rows,
    make_ring,
    multiply,
    produce,
    row_lanes,
    stages_of,
    store,
    store_rows,
    wait_for_kernel_before,
)


@gluon.jit
def _up_items(num_tiles_ptr, F: gl.constexpr):
    """How many pieces of work the first product has."""
    return gl.load(num_tiles_ptr) * (F // 128)


@gluon.jit
def _up_work(item, tile_expert_ptr, F: gl.constexpr):
    """Piece of work `item`: a block of the gate and the same of up."""
    BLOCKS: gl.constexpr = F // 128
    tile = item // BLOCKS
    block = item % BLOCKS
    gate = gl.load(tile_expert_ptr + tile) * (2 * BLOCKS) + block
    return Work(tile, block, gate, gate + BLOCKS)


@gluon.jit
def _produce_up(ring, w_desc, tiles, C: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr):
    tile_expert_ptr, num_tiles_ptr = tiles[1], tiles[2]
    at = 0
    for item in range(gl.program_id(0), _up_items(num_tiles_ptr, F), gl.num_programs(0)):
        work = _up_work(item, tile_expert_ptr, F)
        at = produce(ring, w_desc, work, at, C, STAGES)


@gluon.jit
def _token_of(pair, slots_ptr, K: gl.constexpr):
    token = pair // K
    if slots_ptr is not None:
        token = gl.load(slots_ptr + token, mask=pair >= 0, other=0)
    return token.to(gl.int64)


@gluon.jit
def _load_up(ring, x, tiles, C: gl.constexpr, F: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr):
    x_ptr, x_scales_ptr, slots_ptr, block_stride = x
    sorted_ptr, tile_expert_ptr, num_tiles_ptr = tiles
    ROWS: gl.constexpr = ring.x.shape[1]
    lane, scale_lane = row_lanes(ROWS)
    at = 0
    for item in range(gl.program_id(0), _up_items(num_tiles_ptr, F), gl.num_programs(0)):
        work = _up_work(item, tile_expert_ptr, F)
        pair = gl.load(sorted_ptr + work.tile * ROWS + lane)
        rows = (x_ptr + _token_of(pair, slots_ptr, K) * (C * 128), pair >= 0)
        pair = gl.load(sorted_ptr + work.tile * ROWS + scale_lane)
        scale = _token_of(pair, slots_ptr, K)
        if slots_ptr is not None:
            scale = scale * C
        at = load_rows(ring, rows, (x_scales_ptr + scale, pair >= 0), block_stride, at, C, STAGES)


@gluon.jit
def _multiply_up(
    ring,
    w_scales_ptr,
    tiles,
    out,
    num_rows,
    C: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1: silu(x @ gate) * (x @ up), quantised, of its half of a tile's rows."""
    tile_expert_ptr, num_tiles_ptr = tiles[1], tiles[2]
    out_ptr, out_scales_ptr = out
    ROWS: gl.constexpr = ring.x.shape[1]
    at = 0
    for item in range(gl.program_id(0), _up_items(num_tiles_ptr, F), gl.num_programs(0)):
        work = _up_work(item, tile_expert_ptr, F)
        gate_0, gate_1, up_0, up_1, at = multiply(ring, w_scales_ptr, work, at, C, STAGES, mine)
        hidden_0 = gate_0 / (1.0 + gl.exp(-gate_0)) * up_0
        hidden_1 = gate_1 / (1.0 + gl.exp(-gate_1)) * up_1
        peak = gl.maximum(gl.max(gl.abs(hidden_0), 0), gl.max(gl.abs(hidden_1), 0))
        scale = gl.maximum(peak, 1e-12) / 448.0  # `scales_of` in fp8_triton.py
        row = store_rows(ring, work.tile, mine, 1)
        rows_ptr = out_ptr + row.to(gl.int64) * F
        hidden_0 = (hidden_0 / scale[None, :]).to(gl.float8e4nv)
        store(rows_ptr, row >= 0, work.block * 128, F, hidden_0)
        hidden_1 = (hidden_1 / scale[None, :]).to(gl.float8e4nv)
        store(rows_ptr, row >= 0, work.block * 128 + 64, F, hidden_1)
        row = work.tile * ROWS + mine * (ROWS // 2) + gl.arange(0, ROWS // 2, scale.type.layout)
        gl.store(out_scales_ptr + work.block * num_rows + row, scale)


@gluon.jit(do_not_specialize=["block_stride", "num_rows"])
def _gate_up_kernel(
    x_ptr,
    x_scales_ptr,
    slots_ptr,
    w_desc,
    w_scales_ptr,
    sorted_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    out_ptr,
    out_scales_ptr,
    block_stride,
    num_rows,
    D: gl.constexpr,
    F: gl.constexpr,
    K: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Rows of the sorted order: silu(x @ gate) * (x @ up), quantised. `slots_ptr`: where each token lies in x and its
    scales, which then lie side by side; without it tokens are in order, and a block's scales lie side by side."""
    wait_for_kernel_before()
    C: gl.constexpr = D // 128
    ring = make_ring(w_desc, ROWS, STAGES)
    tiles = (sorted_ptr, tile_expert_ptr, num_tiles_ptr)
    out = (out_ptr, out_scales_ptr)
    x = (x_ptr, x_scales_ptr, slots_ptr, block_stride)
    gl.warp_specialize(
        [
            (_multiply_up, (ring, w_scales_ptr, tiles, out, num_rows, C, F, STAGES, 0)),
            (_multiply_up, (ring, w_scales_ptr, tiles, out, num_rows, C, F, STAGES, 1)),
            (_produce_up, (ring, w_desc, tiles, C, F, STAGES)),
            (_load_up, (ring, x, tiles, C, F, K, STAGES)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )


@gluon.jit
def _load_now(ptr):
    """What a kernel before the last one has written, in warps that have not waited for the last one: it is there, but
    the multiprocessor's own cache may hold what was there before."""
    return gl.load(ptr, cache_modifier=".cg")


@gluon.jit
def _down_items(num_tiles_ptr, D: gl.constexpr):
    """How many pieces of work the second product has."""
    return _load_now(num_tiles_ptr) * ((D // 128 + 1) // 2)


@gluon.jit
def _down_work(item, tile_expert_ptr, D: gl.constexpr):
    """Piece of work `item` of the second product; a last block without a neighbour is computed twice, stored once."""
    BLOCKS: gl.constexpr = D // 128
    PER_TILE: gl.constexpr = (BLOCKS + 1) // 2
    tile = item // PER_TILE
    block = item % PER_TILE * 2
    first = _load_now(tile_expert_ptr + tile) * BLOCKS
    second = gl.minimum(block + 1, BLOCKS - 1)
    return Work(tile, block, first + block, first + second)


@gluon.jit
def _produce_down(ring, w_desc, tiles, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    tile_expert_ptr, num_tiles_ptr = tiles[1], tiles[2]
    at = 0
    for item in range(gl.program_id(0), _down_items(num_tiles_ptr, D), gl.num_programs(0)):
        work = _down_work(item, tile_expert_ptr, D)
        at = produce(ring, w_desc, work, at, C, STAGES)


@gluon.jit
def _load_down(ring, hidden, tiles, num_rows, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    wait_for_kernel_before()
    hidden_ptr, hidden_scales_ptr = hidden
    sorted_ptr, tile_expert_ptr, num_tiles_ptr = tiles
    ROWS: gl.constexpr = ring.x.shape[1]
    lane, scale_lane = row_lanes(ROWS)
    at = 0
    for item in range(gl.program_id(0), _down_items(num_tiles_ptr, D), gl.num_programs(0)):
        work = _down_work(item, tile_expert_ptr, D)
        row = work.tile * ROWS + lane
        rows = (hidden_ptr + row.to(gl.int64) * (C * 128), gl.load(sorted_ptr + row) >= 0)
        row = work.tile * ROWS + scale_lane
        row_scales = (hidden_scales_ptr + row, row >= 0)
        at = load_rows(ring, rows, row_scales, num_rows, at, C, STAGES)


@gluon.jit
def _multiply_down(
    ring,
    w_scales_ptr,
    weights_ptr,
    tiles,
    out_ptr,
    C: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1: its half of a tile's rows."""
    sorted_ptr, tile_expert_ptr, num_tiles_ptr = tiles
    ROWS: gl.constexpr = ring.x.shape[1]
    at = 0
    for item in range(gl.program_id(0), _down_items(num_tiles_ptr, D), gl.num_programs(0)):
        work = _down_work(item, tile_expert_ptr, D)
        first_0, first_1, second_0, second_1, at = multiply(ring, w_scales_ptr, work, at, C, STAGES, mine)
        row = work.tile * ROWS + mine * (ROWS // 2) + gl.arange(0, ROWS // 2, gl.SliceLayout(0, first_0.type.layout))
        pair = _load_now(sorted_ptr + row)
        weight = gl.load(weights_ptr + pair, mask=pair >= 0, other=0.0, cache_modifier=".cg")[None, :]
        pair = _load_now(sorted_ptr + store_rows(ring, work.tile, mine, 2))
        rows_ptr = out_ptr + pair.to(gl.int64) * D
        store(rows_ptr, pair >= 0, work.block * 128, D, first_0 * weight)
        store(rows_ptr, pair >= 0, work.block * 128 + 64, D, first_1 * weight)
        store(rows_ptr, pair >= 0, work.block * 128 + 128, D, second_0 * weight)
        store(rows_ptr, pair >= 0, work.block * 128 + 192, D, second_1 * weight)


@gluon.jit(do_not_specialize=["num_rows"])
def _down_kernel(
    hidden_ptr,
    hidden_scales_ptr,
    w_desc,
    w_scales_ptr,
    weights_ptr,
    sorted_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    out_ptr,
    num_rows,
    D: gl.constexpr,
    F: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """hidden @ down times the router's weight, back in the order of the pairs. Weights begin to come while the first
    product ends, which had waited for the tiles to be known; for what it computes the loader waits."""
    C: gl.constexpr = F // 128
    ring = make_ring(w_desc, ROWS, STAGES)
    tiles = (sorted_ptr, tile_expert_ptr, num_tiles_ptr)
    hidden = (hidden_ptr, hidden_scales_ptr)
    gl.warp_specialize(
        [
            (_multiply_down, (ring, w_scales_ptr, weights_ptr, tiles, out_ptr, C, D, STAGES, 0)),
            (_multiply_down, (ring, w_scales_ptr, weights_ptr, tiles, out_ptr, C, D, STAGES, 1)),
            (_produce_down, (ring, w_desc, tiles, C, D, STAGES)),
            (_load_down, (ring, hidden, tiles, num_rows, C, D, STAGES)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )


def _rows(rows_per_expert: float) -> int:
    """Rows of a tile: as a rule all of an expert's, whose weights are then read once."""
    if rows_per_expert <= 22:
        return 32
    return 64 if rows_per_expert <= 48 else 128


def grouped_mlp(
    x: torch.Tensor | Arrived,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    w_gate_up_EGD: BlockFP8,
    w_down_EDF: BlockFP8,
) -> torch.Tensor:
    """See experts_triton.py; D and F are multiples of 128, and arrived rows are quantised."""
    (tokens, slots), (num_experts, hidden, inter) = ids_TK.shape, w_down_EDF.values.shape
    parts_TKD = torch.empty(tokens, slots, hidden, dtype=torch.bfloat16, device=ids_TK.device)
    pairs = tokens * slots
    if not pairs:
        return parts_TKD
    arrived, (values_TD, scales) = (x, (x.values_CD, x.scales_CG)) if isinstance(x, Arrived) else (None, quantise(x))
    rows = _rows(arrived.per_expert if arrived else pairs / num_experts)
    order, tile_expert, num_tiles = sort_pairs(ids_TK, num_experts, rows, arrived)
    most, programs = len(tile_expert), multiprocessors(ids_TK.device)
    hidden_NF = torch.empty(most * rows, inter, dtype=torch.float8_e4m3fn, device=ids_TK.device)
    hidden_scales = torch.empty(inter // BLOCK, most * rows, dtype=torch.float32, device=ids_TK.device)
    _gate_up_kernel[(min(programs, most * (inter // BLOCK)),)](
        values_TD,
        scales,
        arrived.slots_S if arrived else None,
        descriptor(w_gate_up_EGD.values.flatten(0, 1)),
        w_gate_up_EGD.scales,
        order,
        tile_expert,
        num_tiles,
        hidden_NF,
        hidden_scales,
        1 if arrived else tokens,
        most * rows,
        D=hidden,
        F=inter,
        K=slots,
        ROWS=rows,
        STAGES=stages_of(rows),
        num_warps=4,
        launch_pdl=early(tokens),
    )
    _down_kernel[(min(programs, most * -(-hidden // OUTPUTS)),)](
        hidden_NF,
        hidden_scales,
        descriptor(w_down_EDF.values.flatten(0, 1)),
        w_down_EDF.scales,
        weights_TK,
        order,
        tile_expert,
        num_tiles,
        parts_TKD,
        most * rows,
        D=hidden,
        F=inter,
        ROWS=rows,
        STAGES=stages_of(rows),
        num_warps=4,
        launch_pdl=early(tokens),
    )
    return parts_TKD
