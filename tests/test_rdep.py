"""RDEP between real processes against the single-process reference, bit for bit."""

import contextlib
import functools
import itertools
import mmap
import os
import random
import signal
import sys
import time
import traceback

import msgspec
import pytest
import torch

from nmoe.config import Config, Engine, Parallel
from nmoe.config_json import read_architecture
from nmoe.errors import PeerSilent
from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL
from nmoe.slab import DISPATCH, LINE, NUM_CHANNELS, NUM_PHASES, RETURN, ControlLayout, SlabLayout, make_slabs
from nmoe.worker.kernels.experts import grouped_mlp
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.rdep import TILE_ROWS, OneRank
from nmoe.worker.rdep.reference import exchange
from nmoe.worker.rdep.shared_memory import SharedMemory
from nmoe.worker.rdep.signals import Signals
from tests.forking import fork_call

HIDDEN, INTERMEDIATE, TOP_K, EXPERTS = 24, 16, 4, 32
DECODES, PREFILL = 12, 160  # tokens per rank: max_batch_size, and the share of max_prefill_tokens
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WORLD_SIZES = (2, 4, 8)


def make_layout(world_size, dtype="float32"):
    architecture = msgspec.structs.replace(
        read_architecture("configs/models/moonlight.json"),
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    engine = Engine(max_batch_size=DECODES, max_prefill_tokens=PREFILL * world_size)
    return SlabLayout.of(architecture, dtype, Config(parallel=Parallel(world_size=world_size), engine=engine))


def make_experts(world_size, dtype=torch.float32):
    """Each rank's experts."""
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator, dtype=dtype) * 0.3
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator, dtype=dtype) * 0.3
    return [
        functools.partial(grouped_mlp, w_gate_up_EGD=its_gate_up, w_down_EDF=its_down)
        for its_gate_up, its_down in zip(gate_up.chunk(world_size), down.chunk(world_size), strict=True)
    ]


def make_tokens(num_tokens, routing, seed, dtype=torch.float32):
    """One rank's tokens: x_TD and their routes."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator)
    if routing == "skewed":
        scores /= torch.arange(1, EXPERTS + 1)
    elif routing == "all to one":  # the last rank, at every world size
        scores[:, : EXPERTS - TOP_K] -= 1
    x_TD = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=dtype)
    return x_TD, Routes(scores.topk(TOP_K).indices, torch.rand(num_tokens, TOP_K, generator=generator))


class Layers:
    """Some exchanges with what they must give: one entry per layer, (channel, every rank's tokens, their sums)."""

    def __init__(self, world_size, dtype_name, kinds):
        dtype = DTYPES[dtype_name]
        self.experts = make_experts(world_size, dtype)
        self.entries = []
        for number, (channel, routing, counts) in enumerate(kinds):
            ranks = [make_tokens(count, routing, 100 * number + rank, dtype) for rank, count in enumerate(counts)]
            self.entries.append((channel, ranks, exchange(self.experts, EXPERTS // world_size, ranks)))

    def check(self, number, rank, link, pause=lambda: None):
        """Go through one of them as `rank`."""
        _, ranks, sums = self.entries[number]
        pause()
        combine = link.dispatch(self.experts[rank], *ranks[rank])
        pause()
        assert torch.equal(combine(), sums[rank]), f"exchange {number}, rank {rank}"
        assert link.check()


def never():
    return False


@torch.inference_mode()
def run_node(world_size, dtype, prepare, rank_main, *args):
    """Fork one process per rank; each runs `rank_main(rank, link, prepared, *args)`. Gives how many failed."""
    torch.set_num_threads(1)
    layout = make_layout(world_size, dtype)
    memory, prepared = make_slabs(layout), prepare(world_size, dtype)
    pids = []
    for rank in range(world_size):
        if pid := os.fork():
            pids.append(pid)
            continue
        status = 1
        with contextlib.suppress(BaseException):
            try:
                link = SharedMemory(layout, memory, rank, DTYPES[dtype], bound_s=args[0] if args else 20.0)
                assert link.meet(1, never, bounded=False)
                rank_main(rank, link, prepared, *args)
                status = 0
            except BaseException:
                traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


def run(tmp_path, world_size, dtype, prepare, rank_main, *args, failed=0):
    child = fork_call(run_node, world_size, dtype, prepare, rank_main, *args, output=tmp_path / "output")
    try:
        status = child.wait(60)
    finally:
        child.end()
    assert status == failed, (tmp_path / "output").read_text()


# ---------------------------------------------------------------------------------------------------------- the layout


@pytest.mark.parametrize("world_size", [1, *WORLD_SIZES])
def test_nothing_overlaps_in_a_slab_and_slabs_are_apart(world_size):
    layout = make_layout(world_size, "bfloat16")
    spans = [(layout.awaited(0), LINE), (layout.poison(0), LINE)]
    spans += [
        (layout.flag(0, channel, phase, peer), LINE)
        for channel in range(NUM_CHANNELS)
        for phase in (DISPATCH, RETURN)
        for peer in range(world_size)
    ]
    assert len(spans) == 2 + NUM_CHANNELS * NUM_PHASES * world_size
    for channel, max_tokens in enumerate((DECODES, DECODES + PREFILL)):
        at = layout.channels[channel]
        assert at.max_tokens == max_tokens
        slots = world_size * max_tokens
        spans += [(at.counts, slots * 4), (at.routes, slots * TOP_K * 8)]
        spans += [(at.hidden, slots * HIDDEN * 2), (at.returned, slots * HIDDEN * 2)]
    spans.sort()
    assert all(start % LINE == 0 for start, _ in spans)
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))
    assert sum(spans[-1]) <= layout.slab_bytes and layout.slab_bytes % mmap.PAGESIZE == 0
    assert layout.flag(1, 0, 0, 0) - layout.flag(0, 0, 0, 0) == layout.slab_bytes
    assert layout.total_bytes == world_size * layout.slab_bytes


def test_rows_of_quantised_models_travel_quantised_between_gpus():
    v3, config = read_architecture("configs/models/deepseek-v3.json"), Config(parallel=Parallel(world_size=8))
    layout = SlabLayout.of(v3, "bfloat16", config)
    assert config.parallel.device == "cuda" and layout.quantised
    for at in layout.channels:
        slots = 8 * at.max_tokens
        assert at.returned - at.hidden >= slots * 7168 and at.returned - at.hidden < slots * 7168 + mmap.PAGESIZE
        assert at.scales - at.returned >= slots * 2 * 7168
        assert layout.slab_bytes - at.scales >= slots * 56 * 4
    on_cpu = msgspec.structs.replace(config, parallel=Parallel(world_size=8, device="cpu"))
    assert not SlabLayout.of(v3, "bfloat16", on_cpu).quantised


def test_nothing_overlaps_in_the_control_page():
    layout = ControlLayout(8)
    words = [place(rank) for rank in range(8) for place in (layout.life, layout.compiling, layout.awaited)]
    words += [layout.poison(rank) + 8 * by for rank in range(8) for by in range(8)]
    with layout.make() as page:
        assert len(set(words)) == len(words) and max(words) + 8 <= len(page)


def test_untouched_memory_costs_nothing():
    layout = make_layout(8)
    huge = msgspec.structs.replace(layout, slab_bytes=1 << 36)
    with make_slabs(huge) as memory:
        assert len(memory) == 8 << 36


# ------------------------------------------------------------------------------------------------------------ equality

EVERY_KIND = [
    (channel, routing, shares)
    for channel in (CHANNEL_DECODE, CHANNEL_PREFILL)
    for routing in ("uniform", "skewed", "all to one")
    for shares in ((1.0,), (0.0,), (0.3, 0.0, 1.0, 0.1), (0.0, 0.0, 0.0, 0.0, 0.5))
]


def counts_of(shares, channel, world_size):
    """Tokens per rank: `shares` of the channel's slots, repeated over the ranks."""
    slots = DECODES + PREFILL * (channel == CHANNEL_PREFILL)
    return [int(shares[rank % len(shares)] * slots) for rank in range(world_size)]


def prepare_every_kind(world_size, dtype):
    kinds = [(channel, routing, counts_of(shares, channel, world_size)) for channel, routing, shares in EVERY_KIND]
    return Layers(world_size, dtype, kinds)


def check_every_kind(rank, link, layers):
    for number, (channel, ranks, _) in enumerate(layers.entries):
        link.begin(channel, max(len(x_TD) for x_TD, _ in ranks))
        layers.check(number, rank, link)


@pytest.mark.parametrize(("world_size", "dtype"), [(2, "float32"), (4, "bfloat16"), (8, "float32")])
def test_sums_equal_the_reference_for_every_routing_and_token_count(tmp_path, world_size, dtype):
    run(tmp_path, world_size, dtype, prepare_every_kind, check_every_kind)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_rank_gives_the_bits_of_an_exchange_with_oneself(dtype):
    layout, tokens = make_layout(1, dtype), make_tokens(DECODES + PREFILL, "uniform", 3, DTYPES[dtype])
    [experts] = make_experts(1, DTYPES[dtype])
    pushing = SharedMemory(layout, mmap.mmap(-1, layout.total_bytes), 0, DTYPES[dtype])
    results = []
    for link in (OneRank(), pushing):
        assert link.meet(1, never, bounded=False) and link.check()
        link.begin(CHANNEL_PREFILL, DECODES + PREFILL)
        results.append(link.dispatch(experts, *tokens)())
        assert link.check()
        link.leave()
    assert torch.equal(*results)
    assert torch.equal(results[0], exchange([experts], EXPERTS, [tokens])[0])


def prepare_all_to_one(world_size, dtype):
    return Layers(world_size, dtype, [(CHANNEL_PREFILL, "all to one", [DECODES + PREFILL] * world_size)])


def check_tiles(rank, link, layers):
    sizes = []
    experts = layers.experts[rank]
    layers.experts[rank] = lambda x, routes: sizes.append(len(x)) or experts(x, routes)
    link.begin(CHANNEL_PREFILL, DECODES + PREFILL)
    layers.check(0, rank, link)
    arrived = (DECODES + PREFILL) * len(layers.experts) * (rank == len(layers.experts) - 1)
    assert sum(sizes) == arrived and all(size == TILE_ROWS for size in sizes[:-1])
    assert len(sizes) == -(-arrived // TILE_ROWS)


def test_when_all_want_one_rank_its_experts_get_tiles(tmp_path):
    assert 8 * (DECODES + PREFILL) > TILE_ROWS
    run(tmp_path, 8, "float32", prepare_all_to_one, check_tiles)


def test_a_token_goes_once_to_each_rank_that_wants_it():
    layout = make_layout(4)
    memory = mmap.mmap(-1, layout.total_bytes)
    link = SharedMemory(layout, memory, 1, torch.float32)
    each = EXPERTS // 4
    ids_TK = torch.tensor([[0, 3 * each, 1, 2], [3 * each + 2, 3 * each, 3 * each + 1, 3 * each + 3]])
    x_TD, weights_TK = torch.randn(2, HIDDEN), torch.rand(2, TOP_K)
    link.begin(CHANNEL_DECODE, 2)
    link.dispatch(None, x_TD, Routes(ids_TK, weights_TK))
    at = layout.channels[CHANNEL_DECODE]

    def read(rank, offset, token, dtype, size):
        start = rank * layout.slab_bytes + offset + (1 * DECODES + token) * size * dtype.itemsize
        return torch.frombuffer(memory, dtype=dtype, count=size, offset=start)

    counts = [[read(rank, at.counts, token, torch.int32, 1).item() for token in (0, 1)] for rank in range(4)]
    assert counts == [[3, 0], [0, 0], [0, 0], [1, 4]]
    assert torch.equal(read(0, at.hidden, 0, torch.float32, HIDDEN), x_TD[0])
    assert torch.equal(read(3, at.hidden, 1, torch.float32, HIDDEN), x_TD[1])
    assert not read(1, at.hidden, 0, torch.float32, HIDDEN).any()
    assert read(0, at.routes, 0, torch.int32, 2 * TOP_K)[:TOP_K].tolist() == [0, 1, 2, each]
    assert torch.equal(read(0, at.routes, 0, torch.float32, 2 * TOP_K)[TOP_K:], weights_TK[0, [0, 2, 3, 1]])
    assert read(3, at.routes, 1, torch.int32, 2 * TOP_K)[:TOP_K].tolist() == [2, 0, 1, 3]


def test_more_tokens_than_slots_are_refused_before_anything_is_written():
    layout = make_layout(2)
    link = SharedMemory(layout, mmap.mmap(-1, layout.total_bytes), 0, torch.float32)
    with pytest.raises(ValueError, match=f"{DECODES + 1} tokens"):
        link.begin(CHANNEL_DECODE, DECODES + 1)


# -------------------------------------------------------------------------------------------------------------- stress

STEPS, LAYERS = {2: 300, 4: 300, 8: 200}, 3


def prepare_stress(world_size, dtype):
    chance = random.Random(7)
    kinds = []
    for _ in range(24):
        channel = chance.choice((CHANNEL_DECODE, CHANNEL_PREFILL))
        most = 3 * DECODES if channel == CHANNEL_PREFILL else DECODES
        counts = [chance.choice((0, 1, chance.randint(0, most), most)) for _ in range(world_size)]
        kinds.append((channel, chance.choice(("uniform", "skewed", "all to one")), counts))
    return Layers(world_size, dtype, kinds)


def check_stress(rank, link, layers):
    """Each rank dawdles as it likes, at the start of an exchange and between its halves."""
    common, own = random.Random(11), random.Random(100 + rank)

    def pause():
        if own.random() < 0.2:
            time.sleep(own.random() * 1e-3)

    by_channel = [[i for i, entry in enumerate(layers.entries) if entry[0] == channel] for channel in (0, 1)]
    for _ in range(STEPS[len(layers.experts)]):
        channel = common.randint(0, 1)
        link.begin(channel, DECODES)
        for _ in range(LAYERS):
            layers.check(common.choice(by_channel[channel]), rank, link, pause)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_delays_never_change_a_bit(tmp_path, world_size):
    run(tmp_path, world_size, "float32", prepare_stress, check_stress)


# ------------------------------------------------------------------------------------------------------------- silence

BOUND_S = 0.8
DEEP = 20  # layers of a step


def prepare_uniform(world_size, dtype):
    return Layers(world_size, dtype, [(CHANNEL_DECODE, "uniform", [DECODES] * world_size)])


def go_through(rank, link, layers):
    """A step's layers without looking at the results; gives the seconds it took."""
    _, ranks, _ = layers.entries[0]
    started = time.monotonic()
    for _ in range(DEEP):
        link.dispatch(layers.experts[rank], *ranks[rank])()
    return time.monotonic() - started


def die_in_a_step(rank, link, layers, bound_s, how):
    """Rank 2 dies in the midst of a step; everybody else leaves after one bound and knows who it was."""
    link.begin(CHANNEL_DECODE, 0)
    for _ in range(3):
        layers.check(0, rank, link)
    if rank == 2:
        signals = link._signals
        if how == "between flags":  # one rank has heard of its last dispatch, the others have not
            signals._hearers = [0]
        if how != "before the dispatch":
            link.dispatch(layers.experts[rank], *layers.entries[0][1][rank])
        if how == "before the return":
            signals.wait(CHANNEL_DECODE, DISPATCH, signals._epochs[CHANNEL_DECODE])
        os.kill(os.getpid(), signal.SIGKILL)
    seconds = go_through(rank, link, layers)
    with pytest.raises(PeerSilent, match=f"worker {rank}: nothing came from worker 2 within") as caught:
        link.check()
    assert caught.value.silent == [2]
    assert bound_s <= seconds < 3 * bound_s, f"{seconds} s for {2 * DEEP} waits"
    assert go_through(rank, link, layers) < bound_s, "a poisoned rank waits for nobody"


@pytest.mark.parametrize("how", ["before the dispatch", "between flags", "before the return"])
def test_a_dead_rank_costs_one_bound_and_is_named(tmp_path, how):
    run(tmp_path, 4, "float32", prepare_uniform, die_in_a_step, BOUND_S, how, failed=1)


def come_late(rank, link, layers, bound_s):
    """Rank 1 sleeps through the bound. It finds itself poisoned too, and all can begin a new life."""
    link.begin(CHANNEL_DECODE, 0)
    layers.check(0, rank, link)
    if rank == 1:
        time.sleep(1.5 * bound_s)
    go_through(rank, link, layers)
    with pytest.raises(PeerSilent) as caught:
        link.check()
    assert caught.value.silent == [1]
    assert link.meet(2, never, bounded=False)
    link.begin(CHANNEL_DECODE, 0)
    for _ in range(10):
        layers.check(0, rank, link)


def test_a_late_rank_is_poisoned_too_and_a_new_life_starts_clean(tmp_path):
    run(tmp_path, 4, "float32", prepare_uniform, come_late, 0.6)


def test_time_in_which_a_waiting_rank_was_stopped_does_not_count(monkeypatch):
    """Whatever stopped it may have stopped its peers as well."""
    layout = make_layout(2)
    memory = mmap.mmap(-1, layout.total_bytes)
    waiting, late = (Signals(layout, memory, rank) for rank in (0, 1))
    waiting.set_bound(5.0)
    looks = []

    def stopped_for_a_minute_between_looks():
        looks.append(60.0 * len(looks))
        if len(looks) == 4:
            assert late.meet(1, never)
        return looks[-1]

    monkeypatch.setattr(time, "monotonic", stopped_for_a_minute_between_looks)
    assert waiting.meet(1, never) and waiting.check()
    assert len(looks) == 4


def leave(rank, link, layers, bound_s):
    """Rank 0 never enters the exchange that the others wait in; it ends their life. Its own silence is not to blame."""
    link.begin(CHANNEL_DECODE, 0)
    layers.check(0, rank, link)
    started = time.monotonic()
    if rank == 0:
        time.sleep(0.2)
        link.leave()
    else:
        go_through(rank, link, layers)
    assert not link.check()
    assert time.monotonic() - started < bound_s / 2
    assert link.meet(2, never, bounded=True) and link.check()
    link.begin(CHANNEL_PREFILL, 0)
    layers.check(0, rank, link)


def test_a_life_can_be_ended_for_all(tmp_path):
    run(tmp_path, 4, "float32", prepare_uniform, leave, 20.0)


def test_meeting_ends_when_told_to_stop():
    layout = make_layout(2)
    link = SharedMemory(layout, mmap.mmap(-1, layout.total_bytes), 0, torch.float32)
    asked = []
    assert not link.meet(1, lambda: asked.append(True) or len(asked) == 3, bounded=False)
    assert len(asked) == 3


def wait_idly(rank, link, layers, bound_s):
    """The others wait a second for rank 0, and sleep while they do."""
    link.begin(CHANNEL_DECODE, 0)
    layers.check(0, rank, link)
    if rank == 0:
        time.sleep(1.0)
    used = time.process_time()
    layers.check(0, rank, link)
    assert time.process_time() - used < 0.03


def test_waiting_ranks_sleep(tmp_path):
    run(tmp_path, 8, "float32", prepare_uniform, wait_idly, 20.0)
