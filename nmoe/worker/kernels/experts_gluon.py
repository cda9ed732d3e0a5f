"""The experts in bfloat16 on the GPU: the products of experts_triton.py with specialised warps, in Gluon; see
warps_gluon.py and experts_warps_gluon.py.

Each of the two warpgroups has half of a tile's outputs, 64 of either block. An element's inputs are added in order, 16
at a time, in one accumulator, so its bits are those of experts_triton.py, in a tile of any size.

Shape suffixes: T tokens, K experts per token, D hidden, F intermediate, E experts, G = 2F; of a tile N rows, C blocks
of 64 inputs; layout S of products, outputs times rows.
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

from nmoe.worker.kernels import experts_triton
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
from nmoe.worker.kernels.hopper_gluon import wait_for_kernel_before
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.kernels.warps_gluon import (
    OUTPUTS,
    WORKER_WARPS,
    Form,
    descriptor,
    make_ring,
    store,
    store_rows,
)

# benchmarks/LOG.md has timings of these and other forms. The registers they leave free are room for the shared experts'
# small kernel.
_FEWEST = Form(32, 6, 88, 104, 56, together=2, left=8)
_FEW = Form(32, 6, 88, 104, 56, together=2)
_SOME = Form(64, 5, 112, 136, 64, together=2)
_MANY = Form(128, 4, 168, 216, 56)


@gluon.jit
def _multiply(ring, at, C: gl.constexpr, STAGES: gl.constexpr, mine: gl.constexpr):
    """Warpgroup `mine`: its half of both blocks' outputs, as two float32 [64, N]. `at` as in `load_rows`."""
    ROWS: gl.constexpr = ring.x.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    # Many rows keep the tensor cores busy, so a stage is freed once the next one's products are in flight. Few rows
    # keep the memory busy, which waits for free stages.
    LATE: gl.constexpr = ROWS >= 128
    first = gl.zeros([64, ROWS], gl.float32, S)
    second = gl.zeros([64, ROWS], gl.float32, S)
    for c in range(C):
        stage = at % STAGES
        mbarrier.wait(ring.filled.index(stage), at // STAGES & 1)
        fence_async_shared()  # the loader's copies do not go through TMA
        x = ring.x.index(stage).permute((1, 0))
        adding = warpgroup_mma(ring.w.index(stage * 4 + mine), x, first, is_async=True)
        adding_too = warpgroup_mma(ring.w.index(stage * 4 + 2 + mine), x, second, is_async=True)
        if LATE:
            first, second = warpgroup_mma_wait(2, deps=[adding, adding_too])
            mbarrier.arrive(ring.free.index((at + STAGES - 1) % STAGES), count=1, pred=c > 0)
        else:
            first, second = warpgroup_mma_wait(0, deps=[adding, adding_too])
            mbarrier.arrive(ring.free.index(stage), count=1)
        at += 1
    if LATE:
        first, second = warpgroup_mma_wait(0, deps=[first, second])
        mbarrier.arrive(ring.free.index((at + STAGES - 1) % STAGES), count=1)
    return first, second, at


@gluon.jit
def _multiply_up(
    ring, items, out_ptr, C: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr, mine: gl.constexpr
):
    """Warpgroup `mine`, 0 or 1: silu(x @ gate) * (x @ up) for its half of a block's columns."""
    ROWS: gl.constexpr = ring.x.shape[1]
    nth = 0
    at = 0
    piece = told_piece(items, nth)
    while piece.number >= 0:
        work = up_work(piece, F // 128)
        gate, up, at = _multiply(ring, at, C, STAGES, mine)
        hidden = gate / (1.0 + gl.exp(-gate)) * up
        lane = store_rows(0, ROWS, 2)
        rows_ptr = out_ptr + (work.tile * ROWS + lane).to(gl.int64) * F
        store(rows_ptr, lane < piece.rows, work.block * 128 + mine * 64, F, hidden, KEPT)
        nth += 1
        piece = told_piece(items, nth)


@gluon.jit(do_not_specialize=["capacity", "most"])
def _gate_up_kernel(
    x_ptr,
    slots_ptr,
    w_desc,
    pairs_ptr,
    counts_ptr,
    out_ptr,
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
    """The tiles' rows: silu(x @ gate) * (x @ up). `slots_ptr`: each token's index in x, if not in order."""
    C: gl.constexpr = D // 64
    ring = make_ring(w_desc, ROWS, STAGES)
    items = make_pieces()
    wait_for_kernel_before()
    lists = ListPointers(pairs_ptr, counts_ptr, capacity, most)
    x = (x_ptr, None, slots_ptr, None)
    gl.warp_specialize(
        [
            (_multiply_up, (ring, items, out_ptr, C, F, STAGES, KEPT, 0)),
            (_multiply_up, (ring, items, out_ptr, C, F, STAGES, KEPT, 1)),
            (produce_pieces, (ring, items, w_desc, lists, E, C, F // 128, True, GROUP, STAGES, TOGETHER)),
            (load_up, (ring, None, items, x, pairs_ptr, C, K, STAGES)),
        ],
        WORKER_WARPS,
        [WORKER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )


@gluon.jit
def _multiply_down(
    ring,
    items,
    weights_ptr,
    pairs_ptr,
    out_ptr,
    C: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
    mine: gl.constexpr,
):
    """Warpgroup `mine`, 0 or 1: its half of both blocks' columns."""
    ROWS: gl.constexpr = ring.x.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    nth = 0
    at = 0
    piece = told_piece(items, nth)
    while piece.number >= 0:
        work = down_work(piece, D // 128)
        lane = gl.arange(0, ROWS, gl.SliceLayout(0, S))
        pair = load_now(pairs_ptr + piece.first + lane, lane < piece.rows, -1)
        factor = load_now(weights_ptr + pair, pair >= 0, 0.0)[None, :]
        lane = store_rows(0, ROWS, 2)
        pair = load_now(pairs_ptr + piece.first + lane, lane < piece.rows, -1)
        first, second, at = _multiply(ring, at, C, STAGES, mine)
        rows_ptr = out_ptr + pair.to(gl.int64) * D
        store(rows_ptr, pair >= 0, work.block * 128 + mine * 64, D, first * factor, KEPT)
        store(rows_ptr, pair >= 0, work.block * 128 + 128 + mine * 64, D, second * factor, KEPT)
        nth += 1
        piece = told_piece(items, nth)


@gluon.jit(do_not_specialize=["capacity", "most"])
def _down_kernel(
    hidden_ptr,
    w_desc,
    weights_ptr,
    pairs_ptr,
    counts_ptr,
    out_ptr,
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
    """hidden @ down times the router's weight, returned in pair order."""
    C: gl.constexpr = F // 64
    ring = make_ring(w_desc, ROWS, STAGES)
    items = make_pieces()
    lists = ListPointers(pairs_ptr, counts_ptr, capacity, most)
    gl.warp_specialize(
        [
            (_multiply_down, (ring, items, weights_ptr, pairs_ptr, out_ptr, C, D, STAGES, KEPT, 0)),
            (_multiply_down, (ring, items, weights_ptr, pairs_ptr, out_ptr, C, D, STAGES, KEPT, 1)),
            (produce_pieces, (ring, items, w_desc, lists, E, C, D // 128, False, GROUP, STAGES, TOGETHER)),
            (load_down, (ring, None, items, (hidden_ptr, None), None, C, D, STAGES)),
        ],
        WORKER_WARPS,
        [WORKER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )


def _form(rows_per_expert: float) -> Form | None:
    """Tiles of few rows usually hold all of an expert's, so that its weights are read once. None if not all experts are
    chosen: then the small tiles of experts_triton.py make for more programs."""
    if rows_per_expert < 1:
        return None
    if rows_per_expert <= 16:
        return _FEWEST if rows_per_expert <= 2 else _FEW
    return _SOME if rows_per_expert <= 64 else _MANY


def grouped_mlp(
    x: torch.Tensor | Arrived, routes: Routes, w_gate_up: torch.Tensor, w_down: torch.Tensor
) -> torch.Tensor:
    """See experts_triton.py, whose kernels handle sizes that are not in blocks of 128."""
    assert routes.lists is not None
    arrived, x_TD = (x, x.values_CD) if isinstance(x, Arrived) else (None, x)
    (tokens, slots), (num_experts, hidden, inter) = routes.weights_TK.shape, experts_sizes(w_down)
    form = _form(arrived.per_expert if arrived else tokens * slots / num_experts)
    if form is None or hidden % 128 or inter % 128 or not tokens:
        return experts_triton.grouped_mlp(x, routes, w_gate_up, w_down)
    parts_TKD = x_TD.new_empty(tokens, slots, hidden)
    pairs_EC, counts_EW = routes.lists.pairs_EC, routes.lists.counts_EW
    sizes = {"D": hidden, "F": inter, "E": num_experts}
    most = most_tiles(tokens * slots, num_experts, form.rows)
    hidden_NF = x_TD.new_empty(most * form.rows, inter)
    _gate_up_kernel[(form.programs(most * (inter // 128), x_TD.device),)](
        x_TD,
        arrived.slots_S if arrived else None,
        descriptor(w_gate_up),
        pairs_EC,
        counts_EW,
        hidden_NF,
        pairs_EC.shape[1],
        most,
        **sizes,
        K=slots,
        GROUP=w_gate_up.shape[3],
        **form.options(hidden // 64),
        KEPT=kept(tokens),
        launch_pdl=early(tokens),
    )
    _down_kernel[(form.programs(most * -(-hidden // OUTPUTS), x_TD.device),)](
        hidden_NF,
        descriptor(w_down),
        routes.weights_TK,
        pairs_EC,
        counts_EW,
        parts_TKD,
        pairs_EC.shape[1],
        most,
        **sizes,
        GROUP=w_down.shape[3],
        **form.options(inter // 64),
        KEPT=kept(tokens),
        launch_pdl=early(tokens),
    )
    return parts_TKD
