"""RDEP between GPUs against the single-process reference, bit for bit: ranks in one process, then in processes."""

import itertools
import random
import time

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nmoe.errors import PeerSilent
from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL
from nmoe.worker.kernels import experts_fp8_gluon, experts_gluon, experts_triton, norm_triton
from nmoe.worker.kernels.experts import Arrived, Returned
from nmoe.worker.kernels.fp8 import BlockFP8
from nmoe.worker.kernels.fp8_triton import quantise
from nmoe.worker.kernels.lists import Routes, lists_of
from tests.gpu.experts import stored
from tests.gpu.ranks import BF16, GPU, Ranks, added, expected_sums, experts_of, make_layout, make_tokens

WORLD_SIZES = (1, 2, 4, 8)
DECODES, PREFILL = 24, 160


def go_through(ranks, tokens, channel):
    """One exchange of all ranks; nothing waits on the host. What each rank's tokens come to, float32 [T, D]."""
    most = max(len(x_TD) for x_TD, _ in tokens)
    combines = []
    for rank, (link, stream) in enumerate(zip(ranks.links, ranks.streams, strict=True)):
        link.begin(channel, most)
        with torch.cuda.stream(stream):
            combines.append(link.dispatch(experts_of(rank), *tokens[rank]))
    sums = []
    for combine, stream in zip(combines, ranks.streams, strict=True):
        with torch.cuda.stream(stream):
            sums.append(added(combine()))
    return sums


# ------------------------------------------------------------------------------------------------------------ equality

KINDS = [
    (channel, routing, shares)
    for channel in (CHANNEL_DECODE, CHANNEL_PREFILL)
    for routing in ("uniform", "skewed", "all to one")
    for shares in ((1.0,), (0.0,), (0.3, 0.0, 1.0, 0.1), (0.0, 0.0, 0.0, 0.0, 0.5))
]


@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sums_equal_the_reference_for_every_routing_and_token_count(world_size, quantised):
    layout = make_layout(world_size, decodes=DECODES, prefill=PREFILL, quantised=quantised)
    ranks = Ranks(layout)
    entries = []
    for number, (channel, routing, shares) in enumerate(KINDS):
        slots = DECODES + PREFILL * (channel == CHANNEL_PREFILL)
        counts = [int(shares[rank % len(shares)] * slots) for rank in range(world_size)]
        tokens = [
            make_tokens(count, routing, 100 * number + rank, layout, world_size) for rank, count in enumerate(counts)
        ]
        entries.append((channel, tokens, expected_sums(layout, tokens)))

    def run():
        return [go_through(ranks, tokens, channel) for channel, tokens, _ in entries]

    for link in ranks.links:
        link._tile_rows = 100  # so that there are several tiles, most of them without a row
    torch.cuda.synchronize()
    ranks.warm_up(run)
    results = run()
    torch.cuda.synchronize()
    assert all(link.check() for link in ranks.links)
    for (kind, (_, _, expected)), sums in zip(zip(KINDS, entries, strict=True), results, strict=True):
        for rank, (ours, theirs) in enumerate(zip(sums, expected, strict=True)):
            assert torch.equal(ours.cpu(), theirs), f"{kind}, rank {rank}"


def test_padding_is_pushed_nowhere():
    layout = make_layout(2, decodes=DECODES)
    ranks = Ranks(layout)
    tokens = [make_tokens(DECODES, "uniform", rank, layout, 2) for rank in range(2)]
    counts = [torch.tensor([count], device=GPU) for count in (3, 0)]
    owners = []

    def run():
        for rank, (link, stream) in enumerate(zip(ranks.links, ranks.streams, strict=True)):
            link.begin(CHANNEL_DECODE, DECODES, counts[rank])
            with torch.cuda.stream(stream):
                owners.append(link.dispatch(experts_of(rank), *tokens[rank])().owners_T)

    torch.cuda.synchronize()
    ranks.warm_up(run)
    run()
    torch.cuda.synchronize()
    assert not owners[2][3:].any() and not owners[3].any(), "nobody owns padding"
    owners_TK = tokens[0][1].ids_TK[:3] // layout.num_experts
    for rank, link in enumerate(ranks.links):
        assert int(link._num_rows) == int((owners_TK == rank).any(1).sum()) and link.check()


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_the_norm_adds_what_came_back_in_the_order_of_the_ranks(world_size):
    torch.manual_seed(world_size)
    tokens, slots, hidden = 37, 50, 512
    slab = torch.randn(world_size, slots, hidden, device=GPU).to(BF16)
    returned = Returned(
        slab.transpose(0, 1)[:tokens], torch.randint(0, 2**world_size, (tokens,), dtype=torch.int32, device=GPU)
    )
    nobodys_TN = (returned.owners_T[:, None] >> torch.arange(world_size, device=GPU)) & 1 == 0
    returned.sums_TND[nobodys_TN] = float("nan")  # what was not sent is not looked at
    weight, x, shared = (torch.randn(*shape, hidden, device=GPU).to(BF16) for shape in ((), (tokens,), (tokens,)))
    actual = norm_triton.add_rms_norm(x, experts_triton.Terms(returned, shared), weight, 1e-6)
    as_one_term = experts_triton.Terms(added(returned)[:, None], shared)
    expected = norm_triton.add_rms_norm(x, as_one_term, weight, 1e-6)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


def test_more_tokens_than_the_step_was_begun_with_are_refused():
    layout = make_layout(2, decodes=DECODES)
    link = Ranks(layout).links[0]
    with pytest.raises(ValueError, match=f"{DECODES + 1} tokens"):
        link.begin(CHANNEL_DECODE, DECODES + 1)
    link.begin(CHANNEL_DECODE, 3)
    with pytest.raises(ValueError, match="4 tokens"):
        link.dispatch(experts_of(0), *make_tokens(4, "uniform", 0, layout, 2))


# -------------------------------------------------------------------------------------------------------------- stress

LAYERS, VARIANTS = 3, 16
STEPS = {2: 3000, 4: 2000, 8: 1000}


@triton.jit
def _delay_kernel(table_ptr, step_ptr, column, WIDTH: tl.constexpr):
    """Spins for so many ns as the table says for this step."""
    ns = tl.load(table_ptr + tl.load(step_ptr) * WIDTH + column)
    end = tl.extra.cuda.globaltimer() + ns
    while tl.extra.cuda.globaltimer() < end:
        pass


class CapturedRank:
    """A step of several layers of one rank as a graph. Each replay takes other tokens and other delays by itself."""

    def __init__(self, ranks, rank, entries, plan):
        """`entries` hold every rank's tokens of each variant; `plan` int64 [steps, layers] says which comes when."""
        chance = torch.Generator().manual_seed(100 + rank)
        self.link, self.stream, self.rank = ranks.links[rank], ranks.streams[rank], rank
        parts = [(tokens[rank][0], *tokens[rank][1][:2]) for tokens, _, _ in entries]
        self.xs, self.ids, self.weights = (torch.stack(part) for part in zip(*parts, strict=True))
        self.expected = torch.stack([sums[rank] for _, sums, _ in entries]).to(GPU)
        self.real = torch.stack([real[rank] for _, _, real in entries]).to(GPU)
        self.count = torch.zeros(1, dtype=torch.int32, device=GPU)
        self.plan = plan.to(GPU)
        shape = (len(plan), 2 * LAYERS)
        late = torch.rand(shape, generator=chance) < 0.2
        self.delays = (torch.rand(shape, generator=chance) * 50_000 * late).long().to(GPU)
        self.step = torch.zeros(1, dtype=torch.int64, device=GPU)
        self.wrong = torch.zeros(1, dtype=torch.int64, device=GPU)
        self.graph = torch.cuda.CUDAGraph()

    def delay(self, column):
        _delay_kernel[(1,)](self.delays, self.step, column, WIDTH=2 * LAYERS, num_warps=1)

    def run(self):
        self.link.begin(CHANNEL_DECODE, DECODES, self.count)
        for layer in range(LAYERS):
            variant = self.plan.index_select(0, self.step)[0, layer : layer + 1]
            x_TD, ids_TK, weights_TK = (part.index_select(0, variant)[0] for part in (self.xs, self.ids, self.weights))
            self.count.copy_(self.real.index_select(0, variant).sum())
            self.delay(2 * layer)
            combine = self.link.dispatch(experts_of(self.rank), x_TD, Routes(ids_TK, weights_TK))
            self.delay(2 * layer + 1)
            differs_T = (added(combine()) != self.expected.index_select(0, variant)[0]).any(-1)
            self.wrong += (differs_T & self.real.index_select(0, variant)[0]).sum()
        self.step += 1

    def capture(self):
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.run()


def stress_entries(layout, world_size, chance):
    """Every rank's tokens, as many as there can be; which of them are no padding; the sums of these."""
    entries = []
    for variant in range(VARIANTS):
        routing = chance.choice(("uniform", "skewed", "all to one"))
        counts = [chance.choice((0, 1, chance.randint(0, DECODES), DECODES)) for _ in range(world_size)]
        tokens = [
            make_tokens(DECODES, routing, 1000 * variant + rank, layout, world_size) for rank in range(world_size)
        ]
        some = [
            (x_TD[:n], Routes(*(part[:n] for part in routes[:2])))
            for (x_TD, routes), n in zip(tokens, counts, strict=True)
        ]
        sums = expected_sums(layout, some)
        sums = [F.pad(sum_TD, (0, 0, 0, DECODES - len(sum_TD))) for sum_TD in sums]
        entries.append((tokens, sums, [torch.arange(DECODES) < count for count in counts]))
    return entries


@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_delays_and_replays_never_change_a_bit(world_size, quantised):
    chance = random.Random(7)
    layout = make_layout(world_size, decodes=DECODES, quantised=quantised)
    ranks = Ranks(layout)
    entries = stress_entries(layout, world_size, chance)
    assert sum(int(real.sum()) for _, _, reals in entries for real in reals) > VARIANTS
    steps = STEPS[world_size]
    plan = torch.tensor([[chance.randrange(VARIANTS) for _ in range(LAYERS)] for _ in range(steps + 8)])
    captured = [CapturedRank(ranks, rank, entries, plan) for rank in range(world_size)]

    def run():
        for one in captured:
            with torch.cuda.stream(one.stream):
                one.run()

    torch.cuda.synchronize()
    ranks.warm_up(run)
    for one in captured:
        one.capture()
        one.step.zero_()
        one.wrong.zero_()
    torch.cuda.synchronize()
    for step in range(steps):
        for one in captured:
            with torch.cuda.stream(one.stream):
                one.graph.replay()
        if step % 100 == 99:
            torch.cuda.synchronize()
            assert all(link.check() for link in ranks.links), f"step {step}"
    torch.cuda.synchronize()
    assert [int(one.step) for one in captured] == [steps] * world_size
    assert [int(one.wrong) for one in captured] == [0] * world_size


# ------------------------------------------------------------------------------------------------------------- silence

BOUND_S = 0.3
DEEP = 20  # layers of a step


def prepared(world_size, seed=0):
    layout = make_layout(world_size, decodes=DECODES)
    ranks = Ranks(layout, bound_s=BOUND_S)
    tokens = [make_tokens(DECODES, "uniform", seed + rank, layout, world_size) for rank in range(world_size)]
    expected = expected_sums(layout, tokens)
    torch.cuda.synchronize()
    ranks.warm_up(lambda: go_through(ranks, tokens, CHANNEL_DECODE))
    return ranks, tokens, expected


def right(ranks, tokens, expected):
    sums = go_through(ranks, tokens, CHANNEL_DECODE)
    torch.cuda.synchronize()
    return all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(sums, expected, strict=True))


@pytest.mark.parametrize("how", ["before the dispatch", "before the return"])
def test_a_silent_rank_costs_one_bound_and_is_named(how):
    ranks, tokens, expected = prepared(4)
    assert right(ranks, tokens, expected)
    silent = ranks.links[2]
    if how == "before the return":
        with torch.cuda.stream(ranks.streams[2]):
            silent._push(*tokens[2], silent._empty_lists())
    others = [rank for rank in range(4) if rank != 2]

    def step():
        started = time.monotonic()
        for rank, _ in itertools.product(others, range(DEEP)):
            with torch.cuda.stream(ranks.streams[rank]):
                ranks.links[rank].dispatch(experts_of(rank), *tokens[rank])()
        torch.cuda.synchronize()
        return time.monotonic() - started

    seconds = step()
    assert BOUND_S <= seconds < 3 * BOUND_S, f"{seconds} s for {2 * DEEP} waits"
    for rank in range(4):  # the silent one finds itself poisoned, too
        with pytest.raises(PeerSilent, match=f"worker {rank}: nothing came from worker 2 within") as caught:
            ranks.links[rank].check()
        assert caught.value.silent == [2]
    assert step() < BOUND_S, "a poisoned rank waits for nobody"
    ranks.meet(3)
    assert right(ranks, tokens, expected) and all(link.check() for link in ranks.links)


def test_a_rank_that_compiles_is_waited_for():
    ranks, tokens, expected = prepared(2)
    ranks.links[1]._control.compiles(1, True)
    with torch.cuda.stream(ranks.streams[0]):
        first = added(ranks.links[0].dispatch(experts_of(0), *tokens[0])())
    time.sleep(2.5 * BOUND_S)
    assert not ranks.streams[0].query() and ranks.links[0].check()
    with torch.cuda.stream(ranks.streams[1]):
        second = added(ranks.links[1].dispatch(experts_of(1), *tokens[1])())
    torch.cuda.synchronize()
    ranks.links[1]._control.compiles(1, False)
    assert all(link.check() for link in ranks.links)
    assert torch.equal(first.cpu(), expected[0]) and torch.equal(second.cpu(), expected[1])


def test_a_life_can_be_ended_for_all():
    ranks, tokens, expected = prepared(2)
    with torch.cuda.stream(ranks.streams[1]):
        ranks.links[1].dispatch(experts_of(1), *tokens[1])()
    assert not ranks.streams[1].query()
    started = time.monotonic()
    ranks.links[0].leave()
    torch.cuda.synchronize()
    assert time.monotonic() - started < BOUND_S / 3
    assert [link.check() for link in ranks.links] == [False, False]
    ranks.meet(3)
    assert right(ranks, tokens, expected) and all(link.check() for link in ranks.links)


def test_a_rank_that_does_not_come_to_a_meeting_is_named():
    ranks = Ranks(make_layout(2), bound_s=BOUND_S)
    asked = []
    assert not ranks.links[0].meet(1, lambda: asked.append(True) or len(asked) == 3, bounded=False)
    assert ranks.links[0].meet(2, lambda: False, bounded=True)
    with pytest.raises(PeerSilent) as caught:
        ranks.links[0].check()
    assert caught.value.silent == [1]


# ------------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("num_rows", "per_expert"), [(0, 64), (1, 64), (37, 0.5), (37, 10), (200, 64), (200, 200)])
def test_experts_of_arrived_rows(num_rows, per_expert, quantised):
    """The terms of rows that lie anywhere, some of whose experts are elsewhere, have the bits of a dense call."""
    torch.manual_seed(num_rows)
    hidden, inter, experts, slots, top_k, most = 512, 256, 16, 700, 4, 256
    x = torch.randn(slots, hidden, device=GPU).to(BF16)
    gate_up = torch.randn(experts, 2 * inter, hidden, device=GPU) * 0.05
    down = torch.randn(experts, hidden, inter, device=GPU) * 0.05
    where = torch.randperm(slots, device=GPU)[:most].int()
    ids = torch.rand(most, experts, device=GPU).topk(top_k).indices.int()
    weights = torch.rand(most, top_k, device=GPU)
    elsewhere = torch.rand(most, top_k, device=GPU) < 0.4
    elsewhere[num_rows:] = True  # of rows that did not come no list has a pair
    given = Routes(ids, weights, lists_of(torch.where(elsewhere, experts, ids), experts))
    if quantised:
        gate_up, down = (
            BlockFP8(w.to(torch.float8_e4m3fn), torch.rand(experts, w.shape[1] // 128, w.shape[2] // 128, device=GPU))
            for w in (gate_up, down)
        )
        sent = quantise(x)
        arrived = Arrived(sent.values_PI, sent.scales_CP.t().contiguous(), where, per_expert)
        mlp = experts_fp8_gluon.grouped_mlp
    else:
        gate_up, down = gate_up.to(BF16), down.to(BF16)
        arrived = Arrived(x, None, where, per_expert)
        mlp = experts_gluon.grouped_mlp
    gate_up, down = stored(gate_up, down)
    parts = mlp(arrived, given, gate_up, down)
    dense = mlp(x[where.long()], Routes(ids, weights, lists_of(ids, experts)), gate_up, down)
    assert torch.equal(parts[~elsewhere], dense[~elsewhere])
