"""The experts in bfloat16 on the GPU: the products of experts_triton.py, and of the shared experts, by specialised
warps in one kernel, in Gluon; see warps_gluon.py and experts_warps_gluon.py.

Each of the two warpgroups has half of a tile's outputs, 64 of either block. An element's inputs are added in order, 16
at a time, in one accumulator, so its bits are those of experts_triton.py, in a tile of any size.

Shape suffixes: T tokens, K experts per token, D hidden, F intermediate, E experts, G = 2F; of a tile N rows, C blocks
of 64 inputs; layout S of products, outputs times rows.
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

from nmoe.worker.kernels import experts_triton
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
    is_shared,
    load_now,
    load_pieces,
    make_pieces,
    pairs_of,
    produce_pieces,
    rows_apart,
    told_piece,
)
from nmoe.worker.kernels.kept import kept
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.kernels.warps_gluon import (
    WORKER_WARPS,
    Form,
    descriptor,
    make_ring,
    store,
    store_rows,
)


class _Memory(NamedTuple):
    """What a program's warpgroups read and write."""

    ring: gl.tensor  # Ring
    items: gl.tensor  # Items
    lists: gl.tensor  # ListPointers
    weights_ptr: gl.tensor
    hidden_ptr: gl.tensor  # between the products
    out_ptr: gl.tensor
    tokens: gl.tensor


# benchmarks/LOG.md has timings of these and other forms. Where kernels of their own compute the shared experts, as
# between GPUs, the registers and multiprocessors that a form leaves free are room for them.
_FEWEST = Form(32, 6, 88, 104, 56, together=2, left=8)
_FEW = Form(32, 6, 88, 104, 56, together=2)
_SOME = Form(64, 5, 112, 136, 64, together=2)
_MANY = Form(128, 4, 168, 216, 56)


@gluon.jit
def _multiply(ring, at, C, STAGES: gl.constexpr, mine: gl.constexpr):
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
def _store_up(piece, gate, up, hidden_ptr, sizes: gl.constexpr, KEPT: gl.constexpr, mine: gl.constexpr):
    """Store silu(gate) * up, of warpgroup `mine`'s half of a block's columns."""
    ROWS: gl.constexpr = gate.shape[1]
    if sizes.shared > 0:
        # As where they are computed by kernels of their own, the shared experts' products are rounded first.
        gate = gl.where(is_shared(piece, sizes), gate.to(gl.bfloat16).to(gl.float32), gate)
        up = gl.where(is_shared(piece, sizes), up.to(gl.bfloat16).to(gl.float32), up)
    hidden = gate / (1.0 + gl.exp(-gate)) * up
    lane = store_rows(0, ROWS, 2)
    row = piece.between + lane * rows_apart(piece, sizes)
    rows_ptr = hidden_ptr + row.to(gl.int64) * sizes.intermediate
    column = piece.block * 128 + mine * 64
    store(rows_ptr, lane < piece.rows, column, column + 64, hidden, KEPT)


@gluon.jit
def _compute_down(memory, piece, at, sizes: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr, mine: gl.constexpr):
    """A piece of the second product, times the router's weights; warpgroup `mine`'s half of both blocks' columns."""
    ROWS: gl.constexpr = memory.ring.x.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    pair = pairs_of(piece, gl.arange(0, ROWS, gl.SliceLayout(0, S)), memory.lists, memory.tokens, sizes)
    factor = load_now(memory.weights_ptr + pair, (pair >= 0) & (piece.expert < sizes.experts), 1.0)[None, :]
    pair = pairs_of(piece, store_rows(0, ROWS, 2), memory.lists, memory.tokens, sizes)
    c = rows_apart(piece, sizes) * (sizes.intermediate // 64)
    first, second, at = _multiply(memory.ring, at, c, STAGES, mine)
    rows_ptr = memory.out_ptr + pair.to(gl.int64) * sizes.hidden
    column = piece.block * 128 + mine * 64
    store(rows_ptr, pair >= 0, column, sizes.hidden, first * factor, KEPT)
    store(rows_ptr, pair >= 0, column + 128, sizes.hidden, second * factor, KEPT)
    return at


@gluon.jit
def _compute(memory, sizes: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr, mine: gl.constexpr):
    """Warpgroup `mine`, 0 or 1: its half of every piece's columns."""
    C: gl.constexpr = sizes.hidden // 64
    nth = 0
    at = 0
    piece = told_piece(memory.items, nth)
    if sizes.shared > 0:
        while (piece.kind == UP) & is_shared(piece, sizes):
            gate, up, at = _multiply(memory.ring, at, C, STAGES, mine)
            _store_up(piece, gate, up, memory.hidden_ptr, sizes, KEPT, mine)
            nth += 1
            piece = told_piece(memory.items, nth)
        count_stored(memory.lists, sizes.experts)
    while piece.kind == UP:
        gate, up, at = _multiply(memory.ring, at, C, STAGES, mine)
        _store_up(piece, gate, up, memory.hidden_ptr, sizes, KEPT, mine)
        count_stored(memory.lists, piece.expert)
        nth += 1
        piece = told_piece(memory.items, nth)
    while piece.kind == DOWN:
        at = _compute_down(memory, piece, at, sizes, STAGES, KEPT, mine)
        nth += 1
        piece = told_piece(memory.items, nth)


@gluon.jit(do_not_specialize=["capacity", "most", "tokens"])
def _mlp_kernel(
    x_ptr,
    slots_ptr,
    up_desc,
    down_desc,
    shared_up_desc,
    shared_down_desc,
    weights_ptr,
    pairs_ptr,
    counts_ptr,
    hidden_ptr,
    out_ptr,
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
    """Both products of all experts. `slots_ptr`: each token's index in x, if not in order."""
    ring = make_ring(up_desc, ROWS, STAGES)
    items = make_pieces()
    lists = ListPointers(pairs_ptr, counts_ptr, capacity, most)
    descs = (up_desc, down_desc, shared_up_desc, shared_down_desc)
    x = (x_ptr, None, None, slots_ptr)
    hidden = (hidden_ptr, None, None)
    memory = _Memory(ring, items, lists, weights_ptr, hidden_ptr, out_ptr, tokens)
    gl.warp_specialize(
        [
            (_compute, (memory, SIZES, STAGES, KEPT, 0)),
            (_compute, (memory, SIZES, STAGES, KEPT, 1)),
            (produce_pieces, (ring, items, descs, lists, tokens, SIZES, STAGES, TOGETHER)),
            (load_pieces, (ring, None, items, x, hidden, lists, SIZES, STAGES)),
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
    """See experts_triton.py, whose kernels handle sizes that are not in blocks of 128. Uses up the lists' counts."""
    num_experts, hidden, inter = experts_sizes(w_down)
    form = _form(rows_per_expert(x, routes, num_experts))
    if form is None or hidden % 128 or inter % 128 or not len(routes.weights_TK):
        return experts_triton.grouped_mlp(x, routes, w_gate_up, w_down)
    parts_TKD = _launch(form, x, routes, w_gate_up, w_down).parts_TKD
    assert isinstance(parts_TKD, torch.Tensor)
    return parts_TKD


def mlp_with_shared(
    x_TD: torch.Tensor,
    routes: Routes,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor],
) -> Terms:
    """Each token's weighted expert results and its shared experts', whose weights are [2SF, D] and [D, SF], with the
    bits of `grouped_mlp` and of kernels of their own. For steps of which `takes_shared` says so."""
    form = _form(rows_per_expert(x_TD, routes, len(w_down)))
    assert form is not None
    return _launch(form._replace(left=0), x_TD, routes, w_gate_up, w_down, *shared)


def _launch(
    form: Form,
    x: torch.Tensor | Arrived,
    routes: Routes,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    w_shared_up: torch.Tensor | None = None,
    w_shared_down: torch.Tensor | None = None,
) -> Terms:
    assert routes.lists is not None
    arrived, x_TD = (x, x.values_CD) if isinstance(x, Arrived) else (None, x)
    (tokens, slots), (num_experts, hidden, inter) = routes.weights_TK.shape, experts_sizes(w_down)
    shared = 0 if w_shared_down is None else w_shared_down.shape[1] // inter
    room = Room.of(form, routes, num_experts, hidden, inter, shared)
    out = x_TD.new_empty(room.out, hidden)
    _mlp_kernel[(form.programs(room.pieces, x_TD.device),)](
        x_TD,
        arrived.slots_S if arrived else None,
        descriptor(stored_rows(w_gate_up)),
        descriptor(stored_rows(w_down)),
        None if w_shared_up is None else descriptor(w_shared_up),
        None if w_shared_down is None else descriptor(w_shared_down),
        routes.weights_TK,
        routes.lists.pairs_EC,
        routes.lists.counts_EW,
        x_TD.new_empty(room.between, inter),
        out,
        routes.lists.pairs_EC.shape[1],
        room.most,
        tokens,
        SIZES=Sizes(hidden, inter, slots, num_experts, shared, w_gate_up.shape[3], w_down.shape[3]),
        KEPT=kept(tokens),
        **form.options(),
        launch_pdl=early(tokens),
    )
    return terms_of(out, routes)
