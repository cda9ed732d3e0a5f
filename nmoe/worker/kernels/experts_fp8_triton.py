"""The experts in FP8 on the GPU: the products of experts_triton.py with block-quantised weights and activations.

The first product quantises what it gives as it stores it: a program's 128 columns are one block.

Shape suffixes: T tokens, K experts per token, D hidden, F intermediate, E experts, G = 2F.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.experts import Arrived
from nmoe.worker.kernels.experts_triton import launched_tiles, sort_pairs
from nmoe.worker.kernels.fp8 import BLOCK, BlockFP8
from nmoe.worker.kernels.fp8_triton import quantise, scales_of
from nmoe.worker.kernels.products_triton import by_rows, empty_tile, scaled_product


@triton.jit(do_not_specialize=["block_stride", "num_rows"])
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
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Rows of the sorted order: silu(x @ gate) * (x @ up), quantised. `slots_ptr`: where each token lies in x and its
    scales, which then lie side by side; without it tokens are in order, and a block's scales lie side by side."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    C: tl.constexpr = D // 128
    PER_TILE: tl.constexpr = F // 128
    for work in range(tl.program_id(0), tl.load(num_tiles_ptr) * PER_TILE, tl.num_programs(0)):
        tile = work // PER_TILE
        block = work % PER_TILE
        row = tile * ROWS + tl.arange(0, ROWS)
        pair = tl.load(sorted_ptr + row)
        token = (pair // K).to(tl.int64)
        exists = pair >= 0
        x_scale_ptr = x_scales_ptr + token
        if slots_ptr is not None:
            token = tl.load(slots_ptr + token, mask=exists, other=0).to(tl.int64)
            x_scale_ptr = x_scales_ptr + token * C
        x_row = x_ptr + token[:, None] * D + tl.arange(0, 128)[None, :]
        gate_block = tl.load(tile_expert_ptr + tile) * (2 * PER_TILE) + block
        gate_scales = w_scales_ptr + gate_block * C
        gate = empty_tile(ROWS, 128, TRANSPOSED)
        up = empty_tile(ROWS, 128, TRANSPOSED)
        for c in tl.range(0, C, num_stages=STAGES):
            x = tl.load(x_row + c * 128, mask=exists[:, None], other=0.0)
            x_scale = tl.load(x_scale_ptr + c * block_stride, mask=exists, other=0.0)
            w_gate = w_desc.load([gate_block * 128, c * 128])
            w_up = w_desc.load([(gate_block + PER_TILE) * 128, c * 128])
            gate_scale = x_scale * tl.load(gate_scales + c)
            up_scale = x_scale * tl.load(gate_scales + PER_TILE * C + c)
            gate += scaled_product(x, w_gate, gate_scale, TRANSPOSED)
            up += scaled_product(x, w_up, up_scale, TRANSPOSED)
        hidden = by_rows(gate / (1.0 + tl.exp(-gate)) * up, TRANSPOSED)
        scale = scales_of(hidden)
        out = out_ptr + row.to(tl.int64)[:, None] * F + block * 128 + tl.arange(0, 128)[None, :]
        tl.store(out, (hidden / scale[:, None]).to(tl.float8e4nv))
        tl.store(out_scales_ptr + block * num_rows + row, scale)


@triton.jit(do_not_specialize=["num_rows"])
def _down_kernel(
    hidden_desc,
    hidden_scales_ptr,
    w_desc,
    w_scales_ptr,
    weights_ptr,
    sorted_ptr,
    tile_expert_ptr,
    num_tiles_ptr,
    out_ptr,
    num_rows,
    D: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """hidden @ down times the router's weight, back in the order of the pairs."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    C: tl.constexpr = F // 128
    PER_TILE: tl.constexpr = D // 128
    for work in range(tl.program_id(0), tl.load(num_tiles_ptr) * PER_TILE, tl.num_programs(0)):
        tile = work // PER_TILE
        block = work % PER_TILE
        row = tile * ROWS + tl.arange(0, ROWS)
        pair = tl.load(sorted_ptr + row)
        exists = pair >= 0
        w_block = tl.load(tile_expert_ptr + tile) * PER_TILE + block
        acc = empty_tile(ROWS, 128, TRANSPOSED)
        for c in tl.range(0, C, num_stages=STAGES):
            hidden = hidden_desc.load([tile * ROWS, c * 128])
            w_down = w_desc.load([w_block * 128, c * 128])
            scale = tl.load(hidden_scales_ptr + c * num_rows + row) * tl.load(w_scales_ptr + w_block * C + c)
            acc += scaled_product(hidden, w_down, scale, TRANSPOSED)
        acc = by_rows(acc, TRANSPOSED)
        acc *= tl.load(weights_ptr + pair, mask=exists, other=0.0)[:, None]
        out = out_ptr + pair.to(tl.int64)[:, None] * D + block * 128 + tl.arange(0, 128)[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None])


def _rows(rows_per_expert: float) -> int:
    """Rows of a tile."""
    if rows_per_expert <= 12:
        return 16
    if rows_per_expert <= 80:
        return 32
    return 64 if rows_per_expert <= 160 else 128


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
    arrived = x if isinstance(x, Arrived) else None
    rows = _rows(arrived.per_expert if arrived else pairs / num_experts)
    few, transposed = rows <= 32, rows < 128
    values_TD, scales = (x.values_CD, x.scales_CG) if isinstance(x, Arrived) else quantise(x)
    order, tile_expert, num_tiles = sort_pairs(ids_TK, num_experts, rows, arrived)
    tiles = len(tile_expert)
    launched = launched_tiles(tiles, rows, num_experts, arrived)
    hidden_NF = torch.empty(tiles * rows, inter, dtype=torch.float8_e4m3fn, device=ids_TK.device)
    hidden_scales = torch.empty(inter // BLOCK, tiles * rows, dtype=torch.float32, device=ids_TK.device)
    _gate_up_kernel[(launched * (inter // BLOCK),)](
        values_TD,
        scales,
        arrived.slots_S if arrived else None,
        TensorDescriptor.from_tensor(w_gate_up_EGD.values.flatten(0, 1), [BLOCK, BLOCK]),
        w_gate_up_EGD.scales,
        order,
        tile_expert,
        num_tiles,
        hidden_NF,
        hidden_scales,
        1 if arrived else tokens,
        tiles * rows,
        D=hidden,
        F=inter,
        K=slots,
        ROWS=rows,
        STAGES=3,
        TRANSPOSED=transposed,
        num_warps=4 if few else 8,
        launch_pdl=early(tokens),
    )
    _down_kernel[(launched * (hidden // BLOCK),)](
        TensorDescriptor.from_tensor(hidden_NF, [rows, BLOCK]),
        hidden_scales,
        TensorDescriptor.from_tensor(w_down_EDF.values.flatten(0, 1), [BLOCK, BLOCK]),
        w_down_EDF.scales,
        weights_TK,
        order,
        tile_expert,
        num_tiles,
        parts_TKD,
        tiles * rows,
        D=hidden,
        F=inter,
        ROWS=rows,
        STAGES=4,
        TRANSPOSED=transposed,
        num_warps=4 if few else 8,
        launch_pdl=early(tokens),
    )
    return parts_TKD
