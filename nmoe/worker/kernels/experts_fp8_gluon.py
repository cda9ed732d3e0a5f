"""The experts in FP8 on the GPU: the products of experts_triton.py with block-quantised weights and activations, with
specialised warps, in Gluon; see warps_gluon.py and experts_warps_gluon.py.

Each of the two warpgroups has half of a tile's rows, 64 outputs at a time: while one applies scales, the other
multiplies. The arithmetic is that of scaled_product in products_triton.py: 128 inputs summed from zero, times the
scales, added in float32 in input order. The first product quantises its results as it stores them: a program's 128
columns are one block. A value has the same bits in a tile of any size.

Shape suffixes: T tokens, K experts per token, D hidden, F intermediate, E experts, G = 2F; of a tile N rows, C blocks
of 128 inputs; layout S of products, outputs times rows.
"""

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
from nmoe.worker.kernels.expert_weights import experts_sizes
from nmoe.worker.kernels.experts import Arrived
from nmoe.worker.kernels.experts_triton import most_tiles
from nmoe.worker.kernels.experts_warps_gluon import (
    ListPointers,
    down_work,
    load_down,
    load_now,
    load_up,
    make_pieces,
    produce_pieces,
    told_piece,
    up_work,
)
from nmoe.worker.kernels.fp8 import BLOCK, Activations, BlockFP8
from nmoe.worker.kernels.fp8_triton import quantise
from nmoe.worker.kernels.hopper_gluon import wait_for_kernel_before
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.kernels.warps_gluon import (
    OUTPUTS,
    WORKER_WARPS,
    Form,
    descriptor,
    make_ring,
    make_scales,
    store,
    store_rows,
)

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
def _multiply(ring, scales, w_scales_ptr, work, at, C: gl.constexpr, STAGES: gl.constexpr, mine: gl.constexpr):
    """Warpgroup `mine`: both blocks' outputs for its half of the rows, as four float32 [64, N / 2]. `at` as in
    `load_rows`."""
    HALF: gl.constexpr = ring.x.shape[1] // 2
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    first_ptr = w_scales_ptr + work.first * C
    second_ptr = w_scales_ptr + work.second * C
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
        row_scale = scales.index(stage).slice(mine * HALF, HALF).load(gl.SliceLayout(0, S))
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
def _multiply_up(
    ring,
    scales,
    items,
    w_scales_ptr,
    out,
    num_rows,
    C: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1: silu(x @ gate) * (x @ up), quantised, for its half of a tile's rows."""
    out_ptr, out_scales_ptr = out
    ROWS: gl.constexpr = ring.x.shape[1]
    nth = 0
    at = 0
    piece = told_piece(items, nth)
    while piece.number >= 0:
        work = up_work(piece, F // 128)
        gate_0, gate_1, up_0, up_1, at = _multiply(ring, scales, w_scales_ptr, work, at, C, STAGES, mine)
        hidden_0 = gate_0 / (1.0 + gl.exp(-gate_0)) * up_0
        hidden_1 = gate_1 / (1.0 + gl.exp(-gate_1)) * up_1
        peak = gl.maximum(gl.max(gl.abs(hidden_0), 0), gl.max(gl.abs(hidden_1), 0))
        scale = gl.maximum(peak, 1e-12) / 448.0  # `scales_of` in fp8_triton.py
        row = store_rows(work.tile * ROWS + mine * (ROWS // 2), ROWS // 2, 1)
        rows_ptr = out_ptr + row.to(gl.int64) * F
        hidden_0 = (hidden_0 / scale[None, :]).to(gl.float8e4nv)
        store(rows_ptr, row >= 0, work.block * 128, F, hidden_0, KEPT)
        hidden_1 = (hidden_1 / scale[None, :]).to(gl.float8e4nv)
        store(rows_ptr, row >= 0, work.block * 128 + 64, F, hidden_1, KEPT)
        row = work.tile * ROWS + mine * (ROWS // 2) + gl.arange(0, ROWS // 2, scale.type.layout)
        gl.store(out_scales_ptr + work.block * num_rows + row, scale)
        nth += 1
        piece = told_piece(items, nth)


@gluon.jit(do_not_specialize=["block_stride", "num_rows", "capacity", "most"])
def _gate_up_kernel(
    x_ptr,
    x_scales_ptr,
    slots_ptr,
    w_desc,
    w_scales_ptr,
    pairs_ptr,
    counts_ptr,
    out_ptr,
    out_scales_ptr,
    block_stride,
    num_rows,
    capacity,
    most,
    D: gl.constexpr,
    F: gl.constexpr,
    K: gl.constexpr,
    E: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    KEPT: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    """The tiles' rows: silu(x @ gate) * (x @ up), quantised. `slots_ptr`: each token's index in x and its scales, with
    a token's scales contiguous; without it tokens are in order, and a block's scales are contiguous."""
    C: gl.constexpr = D // 128
    ring = make_ring(w_desc, ROWS, STAGES)
    scales = make_scales(ROWS, STAGES)
    items = make_pieces()
    wait_for_kernel_before()
    lists = ListPointers(pairs_ptr, counts_ptr, capacity, most)
    out = (out_ptr, out_scales_ptr)
    x = (x_ptr, x_scales_ptr, slots_ptr, block_stride)
    gl.warp_specialize(
        [
            (_multiply_up, (ring, scales, items, w_scales_ptr, out, num_rows, C, F, STAGES, KEPT, 0)),
            (_multiply_up, (ring, scales, items, w_scales_ptr, out, num_rows, C, F, STAGES, KEPT, 1)),
            (produce_pieces, (ring, items, w_desc, lists, E, C, F // 128, True, GROUP, STAGES, TOGETHER)),
            (load_up, (ring, scales, items, x, pairs_ptr, C, K, STAGES)),
        ],
        WORKER_WARPS,
        [WORKER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )


@gluon.jit
def _multiply_down(
    ring,
    scales,
    items,
    w_scales_ptr,
    weights_ptr,
    pairs_ptr,
    out_ptr,
    C: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1: its half of a tile's rows."""
    HALF: gl.constexpr = ring.x.shape[1] // 2
    nth = 0
    at = 0
    piece = told_piece(items, nth)
    while piece.number >= 0:
        work = down_work(piece, D // 128)
        first_0, first_1, second_0, second_1, at = _multiply(ring, scales, w_scales_ptr, work, at, C, STAGES, mine)
        lane = mine * HALF + gl.arange(0, HALF, gl.SliceLayout(0, first_0.type.layout))
        pair = load_now(pairs_ptr + piece.first + lane, lane < piece.rows, -1)
        weight = load_now(weights_ptr + pair, pair >= 0, 0.0)[None, :]
        lane = store_rows(mine * HALF, HALF, 2)
        pair = load_now(pairs_ptr + piece.first + lane, lane < piece.rows, -1)
        rows_ptr = out_ptr + pair.to(gl.int64) * D
        store(rows_ptr, pair >= 0, work.block * 128, D, first_0 * weight, KEPT)
        store(rows_ptr, pair >= 0, work.block * 128 + 64, D, first_1 * weight, KEPT)
        store(rows_ptr, pair >= 0, work.block * 128 + 128, D, second_0 * weight, KEPT)
        store(rows_ptr, pair >= 0, work.block * 128 + 192, D, second_1 * weight, KEPT)
        nth += 1
        piece = told_piece(items, nth)


@gluon.jit(do_not_specialize=["num_rows", "capacity", "most"])
def _down_kernel(
    hidden_ptr,
    hidden_scales_ptr,
    w_desc,
    w_scales_ptr,
    weights_ptr,
    pairs_ptr,
    counts_ptr,
    out_ptr,
    num_rows,
    capacity,
    most,
    D: gl.constexpr,
    F: gl.constexpr,
    E: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    KEPT: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    """hidden @ down times the router's weight, returned in pair order. Weights may start loading while the first
    product is finishing, as that has waited for the lists; the loader waits for its results."""
    C: gl.constexpr = F // 128
    ring = make_ring(w_desc, ROWS, STAGES)
    scales = make_scales(ROWS, STAGES)
    items = make_pieces()
    lists = ListPointers(pairs_ptr, counts_ptr, capacity, most)
    hidden = (hidden_ptr, hidden_scales_ptr)
    gl.warp_specialize(
        [
            (
                _multiply_down,
                (ring, scales, items, w_scales_ptr, weights_ptr, pairs_ptr, out_ptr, C, D, STAGES, KEPT, 0),
            ),
            (
                _multiply_down,
                (ring, scales, items, w_scales_ptr, weights_ptr, pairs_ptr, out_ptr, C, D, STAGES, KEPT, 1),
            ),
            (produce_pieces, (ring, items, w_desc, lists, E, C, D // 128, False, GROUP, STAGES, TOGETHER)),
            (load_down, (ring, scales, items, hidden, num_rows, C, D, STAGES)),
        ],
        WORKER_WARPS,
        [WORKER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )


def _form(rows_per_expert: float) -> Form:
    """Tiles usually hold all of an expert's rows, so that its weights are read once."""
    if rows_per_expert <= 22:
        return _FEW
    return _SOME if rows_per_expert <= 80 else _MANY


def grouped_mlp(x: Activations | Arrived, routes: Routes, w_gate_up: BlockFP8, w_down: BlockFP8) -> torch.Tensor:
    """See experts_triton.py; D and F are multiples of 128, and arrived rows are quantised."""
    assert routes.lists is not None
    (tokens, slots), (num_experts, hidden, inter) = routes.weights_TK.shape, experts_sizes(w_down.values)
    device = routes.weights_TK.device
    parts_TKD = torch.empty(tokens, slots, hidden, dtype=torch.bfloat16, device=device)
    pairs = tokens * slots
    if not pairs:
        return parts_TKD
    if isinstance(x, Arrived):
        arrived, values, scales, block_stride = x, x.values_CD, x.scales_CG, 1
    else:
        quantised = quantise(x)
        arrived, values, scales = None, quantised.values_PI, quantised.scales_CP
        block_stride = scales.stride(0)
    form = _form(arrived.per_expert if arrived else pairs / num_experts)
    pairs_EC, counts_EW = routes.lists.pairs_EC, routes.lists.counts_EW
    sizes = {"D": hidden, "F": inter, "E": num_experts}
    most = most_tiles(pairs, num_experts, form.rows)
    num_rows = most * form.rows
    hidden_NF = torch.empty(num_rows, inter, dtype=torch.float8_e4m3fn, device=device)
    hidden_scales = torch.empty(inter // BLOCK, num_rows, dtype=torch.float32, device=device)
    _gate_up_kernel[(form.programs(most * (inter // BLOCK), device),)](
        values,
        scales,
        arrived.slots_S if arrived else None,
        descriptor(w_gate_up.values),
        w_gate_up.scales,
        pairs_EC,
        counts_EW,
        hidden_NF,
        hidden_scales,
        block_stride,
        num_rows,
        pairs_EC.shape[1],
        most,
        **sizes,
        K=slots,
        GROUP=w_gate_up.values.shape[3],
        **form.options(hidden // BLOCK),
        KEPT=kept(tokens),
        launch_pdl=early(tokens),
    )
    _down_kernel[(form.programs(most * -(-hidden // OUTPUTS), device),)](
        hidden_NF,
        hidden_scales,
        descriptor(w_down.values),
        w_down.scales,
        routes.weights_TK,
        pairs_EC,
        counts_EW,
        parts_TKD,
        num_rows,
        pairs_EC.shape[1],
        most,
        **sizes,
        GROUP=w_down.values.shape[3],
        **form.options(inter // BLOCK),
        KEPT=kept(tokens),
        launch_pdl=early(tokens),
    )
    return parts_TKD
