"""The experts in FP8 on the GPU: the products of experts_triton.py, and of the shared experts, with block-quantised
weights and activations, by specialised warps in one kernel, in Gluon; see warps_gluon.py and experts_warps_gluon.py.

Each of the two warpgroups has half of a tile's rows, 64 outputs at a time: while one applies scales, the other
multiplies. The arithmetic is that of scaled_product in products_triton.py: 128 inputs summed from zero, times the
scales, added in float32 in input order. The first product quantises its results as it stores them: a program's 128
columns are one block. A value has the same bits in a tile of any size.

Shape suffixes: T tokens, K experts per token, D hidden, F intermediate, E experts, G = 2F; of a tile N rows, C blocks
of 128 inputs; layout S of products, outputs times rows.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.expert_weights import experts_sizes, stored_rows
from nmoe.worker.kernels.experts import Arrived
from nmoe.worker.kernels.experts_launch import Room, rows_per_expert, terms_of
from nmoe.worker.kernels.experts_triton import Terms
from nmoe.worker.kernels.experts_warps_gluon import (
    DOWN,
    UP,
    ListPointers,
    Sizes,
    count_stored,
    down_blocks,
    is_shared,
    load_now,
    load_pieces,
    make_pieces,
    pairs_of,
    produce_pieces,
    rows_apart,
    told_piece,
    up_blocks,
)
from nmoe.worker.kernels.fp8 import BLOCK, Activations, BlockFP8
from nmoe.worker.kernels.fp8_triton import quantise
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.kernels.warps_gluon import (
    WORKER_WARPS,
    Form,
    descriptor,
    make_ring,
    make_scales,
    store,
    store_rows,
)


class _Memory(NamedTuple):
    """What a program's warpgroups read and write."""

    ring: gl.tensor  # Ring
    scales: gl.shared_memory_descriptor
    items: gl.tensor  # Items
    w_scales: gl.tensor  # pointers: first product, second; the shared experts' first, second
    lists: gl.tensor  # ListPointers
    weights_ptr: gl.tensor
    hidden: gl.tensor  # between the products: pointers to values and scales, number of rows
    out_ptr: gl.tensor
    tokens: gl.tensor


# benchmarks/LOG.md has timings of these and other forms.
_FEW = Form(32, 6, 88, 104, 56, together=2)
_SOME = Form(64, 5, 112, 136, 64, together=2, left=8)
_MANY = Form(128, 4, 168, 216, 56)


@gluon.jit
def _add(ring, stage, part: gl.constexpr, x, scale, acc, product):
    """`acc` [64, N / 2] plus `scale` times the product of 128 inputs of 64 outputs, `part` of the stage's four, and the
    rows `x`. `product` is the register space for the product, passed in and returned."""
    w = ring.w.index(stage * 4 + part)
    product = warpgroup_mma_wait(0, deps=[warpgroup_mma(w, x, product, use_acc=False, is_async=True)])
    # The second wait never blocks: it keeps the addition ahead of the next product, which reuses these registers.
    return warpgroup_mma_wait(0, deps=[acc + product * scale[None, :], product])


@gluon.jit
def _multiply(memory, w_scales_ptr, blocks, at, C, STAGES: gl.constexpr, mine: gl.constexpr):
    """Warpgroup `mine`: both blocks' outputs for its half of the rows, as four float32 [64, N / 2]. `w_scales_ptr`: the
    scales [blocks, C] in which these two are. `at` as in `load_rows`."""
    ring = memory.ring
    HALF: gl.constexpr = ring.x.shape[1] // 2
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    first, second = blocks
    first_ptr = w_scales_ptr + first * C
    second_ptr = w_scales_ptr + second * C
    first_0 = gl.zeros([64, HALF], gl.float32, S)
    first_1 = gl.zeros([64, HALF], gl.float32, S)
    second_0 = gl.zeros([64, HALF], gl.float32, S)
    second_1 = gl.zeros([64, HALF], gl.float32, S)
    product = gl.zeros([64, HALF], gl.float32, S)
    next_first = gl.load(first_ptr)
    next_second = gl.load(second_ptr)
    for c in range(C):
        stage = at % STAGES
        first_scale = next_first
        second_scale = next_second
        ahead = gl.minimum(c + 1, C - 1)
        next_first = gl.load(first_ptr + ahead)
        next_second = gl.load(second_ptr + ahead)
        mbarrier.wait(ring.filled.index(stage), at // STAGES & 1)
        fence_async_shared()  # the loader's copies do not go through TMA
        x = ring.x.index(stage).slice(mine * HALF, HALF).permute((1, 0))
        row_scale = memory.scales.index(stage).slice(mine * HALF, HALF).load(gl.SliceLayout(0, S))
        scale = row_scale * first_scale
        first_0, product = _add(ring, stage, 0, x, scale, first_0, product)
        first_1, product = _add(ring, stage, 1, x, scale, first_1, product)
        scale = row_scale * second_scale
        second_0, product = _add(ring, stage, 2, x, scale, second_0, product)
        second_1, product = _add(ring, stage, 3, x, scale, second_1, product)
        mbarrier.arrive(ring.free.index(stage), count=1)
        at += 1
    return first_0, first_1, second_0, second_1, at


@gluon.jit
def _rounded(shared, values):
    """Values of the shared experts as their own kernels, of longer steps, round them in between."""
    return gl.where(shared, values.to(gl.bfloat16).to(gl.float32), values)


@gluon.jit
def _store_up(piece, gates, ups, hidden, sizes: gl.constexpr, KEPT: gl.constexpr, mine: gl.constexpr):
    """Store silu(gate) * up, quantised, of warpgroup `mine`'s half of a tile's rows, in two halves of a block's
    columns."""
    hidden_ptr, hidden_scales_ptr, num_rows = hidden
    gate_0, gate_1 = gates
    up_0, up_1 = ups
    BLOCKS: gl.constexpr = sizes.intermediate // 128
    HALF: gl.constexpr = gate_0.shape[1]
    shared = is_shared(piece, sizes)
    if sizes.shared > 0:
        gate_0 = _rounded(shared, gate_0)
        gate_1 = _rounded(shared, gate_1)
        up_0 = _rounded(shared, up_0)
        up_1 = _rounded(shared, up_1)
    hidden_0 = gate_0 / (1.0 + gl.exp(-gate_0)) * up_0
    hidden_1 = gate_1 / (1.0 + gl.exp(-gate_1)) * up_1
    if sizes.shared > 0:
        hidden_0 = _rounded(shared, hidden_0)
        hidden_1 = _rounded(shared, hidden_1)
    peak = gl.maximum(gl.max(gl.abs(hidden_0), 0), gl.max(gl.abs(hidden_1), 0))
    scale = gl.maximum(peak, 1e-12) / 448.0  # `scales_of` in fp8_triton.py
    first = piece.between + piece.block // BLOCKS
    column = piece.block % BLOCKS * 128
    row = first + store_rows(mine * HALF, HALF, 1) * rows_apart(piece, sizes)
    rows_ptr = hidden_ptr + row.to(gl.int64) * sizes.intermediate
    store(rows_ptr, row >= 0, column, sizes.intermediate, (hidden_0 / scale[None, :]).to(gl.float8e4nv), KEPT)
    store(rows_ptr, row >= 0, column + 64, sizes.intermediate, (hidden_1 / scale[None, :]).to(gl.float8e4nv), KEPT)
    row = first + (mine * HALF + gl.arange(0, HALF, scale.type.layout)) * rows_apart(piece, sizes)
    gl.store(hidden_scales_ptr + piece.block % BLOCKS * num_rows + row, scale)


@gluon.jit
def _compute_down(memory, piece, at, sizes: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr, mine: gl.constexpr):
    """A piece of the second product, times the router's weights; warpgroup `mine`'s half of the tile's rows."""
    HALF: gl.constexpr = memory.ring.x.shape[1] // 2
    C: gl.constexpr = sizes.intermediate // 128
    w_scales_ptr = memory.w_scales[1]
    expert = piece.expert
    if sizes.shared > 0:
        if is_shared(piece, sizes):
            w_scales_ptr = memory.w_scales[3]
            expert = piece.expert * 0
    blocks = down_blocks(expert, piece.block, sizes)
    c = rows_apart(piece, sizes) * C
    first_0, first_1, second_0, second_1, at = _multiply(memory, w_scales_ptr, blocks, at, c, STAGES, mine)
    lane = mine * HALF + gl.arange(0, HALF, gl.SliceLayout(0, first_0.type.layout))
    pair = pairs_of(piece, lane, memory.lists, memory.tokens, sizes)
    factor = load_now(memory.weights_ptr + pair, (pair >= 0) & (piece.expert < sizes.experts), 1.0)[None, :]
    pair = pairs_of(piece, store_rows(mine * HALF, HALF, 2), memory.lists, memory.tokens, sizes)
    rows_ptr = memory.out_ptr + pair.to(gl.int64) * sizes.hidden
    column = piece.block * 128
    store(rows_ptr, pair >= 0, column, sizes.hidden, first_0 * factor, KEPT)
    store(rows_ptr, pair >= 0, column + 64, sizes.hidden, first_1 * factor, KEPT)
    store(rows_ptr, pair >= 0, column + 128, sizes.hidden, second_0 * factor, KEPT)
    store(rows_ptr, pair >= 0, column + 192, sizes.hidden, second_1 * factor, KEPT)
    return at


@gluon.jit
def _compute(memory, sizes: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr, mine: gl.constexpr):
    """Warpgroup `mine`, 0 or 1: its half of every piece's rows."""
    C: gl.constexpr = sizes.hidden // 128
    SHARED_BLOCKS: gl.constexpr = sizes.shared * sizes.intermediate // 128
    nth = 0
    at = 0
    piece = told_piece(memory.items, nth)
    if sizes.shared > 0:
        while (piece.kind == UP) & is_shared(piece, sizes):
            blocks = (piece.block, piece.block + SHARED_BLOCKS)
            gate_0, gate_1, up_0, up_1, at = _multiply(memory, memory.w_scales[2], blocks, at, C, STAGES, mine)
            _store_up(piece, (gate_0, gate_1), (up_0, up_1), memory.hidden, sizes, KEPT, mine)
            nth += 1
            piece = told_piece(memory.items, nth)
        count_stored(memory.lists, sizes.experts)
    while piece.kind == UP:
        blocks = up_blocks(piece.expert, piece.block, sizes)
        gate_0, gate_1, up_0, up_1, at = _multiply(memory, memory.w_scales[0], blocks, at, C, STAGES, mine)
        _store_up(piece, (gate_0, gate_1), (up_0, up_1), memory.hidden, sizes, KEPT, mine)
        count_stored(memory.lists, piece.expert)
        nth += 1
        piece = told_piece(memory.items, nth)
    while piece.kind == DOWN:
        at = _compute_down(memory, piece, at, sizes, STAGES, KEPT, mine)
        nth += 1
        piece = told_piece(memory.items, nth)


@gluon.jit(do_not_specialize=["block_stride", "num_rows", "capacity", "most", "tokens"])
def _mlp_kernel(
    x_ptr,
    x_scales_ptr,
    slots_ptr,
    up_desc,
    down_desc,
    shared_up_desc,
    shared_down_desc,
    up_scales_ptr,
    down_scales_ptr,
    shared_up_scales_ptr,
    shared_down_scales_ptr,
    weights_ptr,
    pairs_ptr,
    counts_ptr,
    hidden_ptr,
    hidden_scales_ptr,
    out_ptr,
    block_stride,
    num_rows,
    capacity,
    most,
    tokens,
    SIZES: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    KEPT: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    """Both products of all experts. `slots_ptr`: each token's index in x and its scales, with a token's scales
    contiguous; without it tokens are in order, and a block's scales are contiguous."""
    ring = make_ring(up_desc, ROWS, STAGES)
    scales = make_scales(ROWS, STAGES)
    items = make_pieces()
    lists = ListPointers(pairs_ptr, counts_ptr, capacity, most)
    descs = (up_desc, down_desc, shared_up_desc, shared_down_desc)
    w_scales = (up_scales_ptr, down_scales_ptr, shared_up_scales_ptr, shared_down_scales_ptr)
    x = (x_ptr, x_scales_ptr, block_stride, slots_ptr)
    hidden = (hidden_ptr, hidden_scales_ptr, num_rows)
    memory = _Memory(ring, scales, items, w_scales, lists, weights_ptr, hidden, out_ptr, tokens)
    gl.warp_specialize(
        [
            (_compute, (memory, SIZES, STAGES, KEPT, 0)),
            (_compute, (memory, SIZES, STAGES, KEPT, 1)),
            (produce_pieces, (ring, items, descs, lists, tokens, SIZES, STAGES, TOGETHER)),
            (load_pieces, (ring, scales, items, x, hidden, lists, SIZES, STAGES)),
        ],
        WORKER_WARPS,
        [WORKER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )


def _form(rows_per_expert: float) -> Form:
    """Tiles usually hold all of an expert's rows, so that its weights are read once."""
    if rows_per_expert <= 22:
        return _FEW
    return _SOME if rows_per_expert <= 48 else _MANY


def grouped_mlp(x: Activations | Arrived, routes: Routes, w_gate_up: BlockFP8, w_down: BlockFP8) -> torch.Tensor:
    """See experts_triton.py; D and F are multiples of 128, arrived rows are quantised. Uses up the lists' counts."""
    num_experts, hidden, _ = experts_sizes(w_down.values)
    (tokens, slots), device = routes.weights_TK.shape, routes.weights_TK.device
    if not tokens * slots:
        return torch.empty(tokens, slots, hidden, dtype=torch.bfloat16, device=device)
    form = _form(rows_per_expert(x, routes, num_experts))
    parts_TKD = _launch(form, x, routes, w_gate_up, w_down).parts_TKD
    assert isinstance(parts_TKD, torch.Tensor)
    return parts_TKD


def mlp_with_shared(
    x: Activations, routes: Routes, w_gate_up: BlockFP8, w_down: BlockFP8, shared: tuple[BlockFP8, BlockFP8]
) -> Terms:
    """See experts_gluon.py."""
    form = _form(rows_per_expert(x, routes, len(w_down.values)))
    return _launch(form._replace(left=0), x, routes, w_gate_up, w_down, *shared)


def _launch(
    form: Form,
    x: Activations | Arrived,
    routes: Routes,
    w_gate_up: BlockFP8,
    w_down: BlockFP8,
    w_shared_up: BlockFP8 | None = None,
    w_shared_down: BlockFP8 | None = None,
) -> Terms:
    assert routes.lists is not None
    (tokens, slots), (num_experts, hidden, inter) = routes.weights_TK.shape, experts_sizes(w_down.values)
    if isinstance(x, Arrived):
        arrived, values, scales, block_stride = x, x.values_CD, x.scales_CG, 1
    else:
        quantised = quantise(x)
        arrived, values, scales = None, quantised.values_PI, quantised.scales_CP
        block_stride = scales.stride(0)
    shared = 0 if w_shared_down is None else w_shared_down.values.shape[1] // inter
    room = Room.of(form, routes, num_experts, hidden, inter, shared)
    out = torch.empty(room.out, hidden, dtype=torch.bfloat16, device=values.device)
    _mlp_kernel[(form.programs(room.pieces, values.device),)](
        values,
        scales,
        arrived.slots_S if arrived else None,
        descriptor(stored_rows(w_gate_up.values)),
        descriptor(stored_rows(w_down.values)),
        w_shared_up and descriptor(w_shared_up.values),
        w_shared_down and descriptor(w_shared_down.values),
        w_gate_up.scales,
        w_down.scales,
        w_shared_up and w_shared_up.scales,
        w_shared_down and w_shared_down.scales,
        routes.weights_TK,
        routes.lists.pairs_EC,
        routes.lists.counts_EW,
        values.new_empty(room.between, inter),
        torch.empty(inter // BLOCK, room.between, dtype=torch.float32, device=values.device),
        out,
        block_stride,
        room.between,
        routes.lists.pairs_EC.shape[1],
        room.most,
        tokens,
        SIZES=Sizes(hidden, inter, slots, num_experts, shared, w_gate_up.values.shape[3], w_down.values.shape[3]),
        KEPT=kept(tokens),
        **form.options(),
        launch_pdl=early(tokens),
    )
    return terms_of(out, routes)
