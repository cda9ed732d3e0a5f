"""The exact class on the GPU: a row's bits are the same in any company, any chunks, on any prefix, captured or not."""

import functools
import itertools
import math

import msgspec
import numpy as np
import pytest
import torch

from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Engine, Model, Parallel
from nmoe.messages import Sampling
from nmoe.profiles import Numerics
from nmoe.worker.batch import Batch
from nmoe.worker.cache import make_cache
from nmoe.worker.kernels import (
    experts_fp8_gluon,
    experts_gluon,
    experts_triton,
    fp8_triton,
    linear_exact_triton,
    norm_triton,
    ops_for,
    router_triton,
)
from nmoe.worker.kernels.fp8 import unquantised
from nmoe.worker.kernels.lists import Routes, lists_of
from nmoe.worker.kernels.mla_exact_prefill_gluon import exact_prefill
from nmoe.worker.kernels.mla_exact_triton import exact_decode, span_prefix
from nmoe.worker.kernels.mla_inputs_triton import enter
from nmoe.worker.kernels.mla_values_triton import values_of_latents
from nmoe.worker.kernels.rope import rope_table
from nmoe.worker.model import load_model
from nmoe.worker.model.mla_gpu import chunks_of
from nmoe.worker.runner import Runner
from tests.checkpoints import make_checkpoint
from tests.gpu.experts import stored
from tests.gpu.stepper import Requests
from tests.gpu.test_kernels_gpu import BF16, GPU, MOONLIGHT, V3, close, quantised, random, rounded, routing

COUNTS = (1, 2, 15, 16, 17, 33, 64, 65, 128, 129, 200, 256, 257, 600, 1100)  # across every tile's bounds


def same_rows(product, total=1100):
    """`product(rows)` over any rows gives the bits that it gives over all of them."""
    everything = product(slice(0, total))
    for count in COUNTS:
        for first in {0, 1, (total - count) // 2}:
            rows = slice(first, min(first + count, total))
            assert torch.equal(product(rows), everything[rows]), f"{count} rows from {first}"


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(3648, 2048), (2048, 2816), (5632, 2048), (20480, 2048), (40, 256), (104, 96)]
)
def test_linear(outputs, inputs):
    x, weight = random(1100, inputs + 32)[:, :inputs], random(outputs, inputs)
    close(linear_exact_triton.linear(x, weight), x.double() @ weight.double().t())
    same_rows(lambda rows: linear_exact_triton.linear(x[rows], weight))


@pytest.mark.parametrize(("outputs", "inputs"), [(2112, 7168), (7168, 2048), (24576, 1536), (576, 128)])
def test_fp8_linear(outputs, inputs):
    x, (weight, real) = random(1100, inputs), quantised(outputs, inputs, std=0.02)
    close(fp8_triton.linear_exact(x, weight), rounded(x) @ real.t())
    same_rows(lambda rows: fp8_triton.linear_exact(x[rows], weight))


@pytest.mark.parametrize("heads", [16, 128])
def test_heads(heads):
    q, w = random(1100, heads, 192), random(heads, 256, 512)
    w_uk, w_uv = w[:, :128], w[:, 128:]
    kv, norm, table = random(1100, 576), random(512), rope_table(V3, 4096, torch.bfloat16, GPU)
    positions = torch.randint(0, 4096, (1100,), device=GPU)

    def absorbed(rows):
        roped, places = q[rows].clone(), torch.arange(len(q[rows]), device=GPU)
        cache, out = random(len(roped), 576), random(len(roped), heads, 512)
        enter(roped, kv[rows], positions[rows], places, table, norm, cache, 1e-6, w_uk, out)
        return torch.cat((out.flatten(1), roped.flatten(1), cache), 1)

    def values(rows):
        out = random(len(q[rows]), heads, 128)
        values_of_latents(latent[rows], w_uv, out)
        return out

    latent = absorbed(slice(None))[:, : heads * 512].unflatten(1, (heads, 512))
    close(latent, torch.einsum("thn,hnl->thl", q[..., :128].double(), w_uk.double()))
    close(values(slice(None)), torch.einsum("thl,hvl->thv", latent.double(), w_uv.double()))
    same_rows(absorbed)
    same_rows(values)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("num_experts", "skew"), [(64, 0), (8, 0), (64, 1.0)])
def test_experts(num_experts, skew, fp8):
    """Rows per expert from almost none to thousands, so every shape of the tiles."""
    hidden, inter = 2048, 1408
    x, (ids, weights, _) = random(1100, hidden), routing(1100, num_experts, 6, skew)
    if fp8:
        gate_up, down = (
            quantised(num_experts, *shape, std=0.05)[0] for shape in ((2 * inter, hidden), (hidden, inter))
        )
        grouped_mlp = experts_fp8_gluon.grouped_mlp
    else:
        gate_up, down = random(num_experts, 2 * inter, hidden, std=0.05), random(num_experts, hidden, inter, std=0.05)
        grouped_mlp = experts_gluon.grouped_mlp

    weights_of_experts = stored(gate_up, down)

    def mlp(rows):
        routes = Routes(ids[rows], weights[rows].contiguous(), lists_of(ids[rows], num_experts))
        return grouped_mlp(x[rows], routes, *weights_of_experts)

    same_rows(mlp)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("shared", "tokens"), [(2, 16), (1, 64), (2, 100), (3, 256), (2, 300), (1, 512)])
def test_shared_experts_beside_routed_ones(tokens, shared, fp8):
    """The bits of kernels of their own, whatever the number of tokens, and again when they run anew."""
    hidden, inter, num_experts, slots = 1024, 384, 16, 4
    shapes = (2 * shared * inter, hidden), (hidden, shared * inter)
    x, routes = random(tokens, hidden), routing(tokens, num_experts, slots)
    if fp8:
        weights, module = [quantised(*shape, std=0.05)[0] for shape in shapes], experts_fp8_gluon
        experts = [quantised(num_experts, *shape, std=0.05)[0] for shape in ((2 * inter, hidden), (hidden, inter))]
    else:
        weights, module = [random(*shape, std=0.05) for shape in shapes], experts_gluon
        experts = [random(num_experts, *shape, std=0.05) for shape in ((2 * inter, hidden), (hidden, inter))]
    experts = stored(*experts)
    parts = module.grouped_mlp(x, routes, *experts)
    ops = ops_for(GPU, Numerics.EXACT, fp8=fp8)
    given = fp8_triton.quantise(x) if fp8 else x
    alone = ops.linear(ops.silu_mul(ops.linear(given, weights[0])), weights[1])
    for _ in range(3):
        routes.lists.renew()
        terms = module.mlp_with_shared(given, routes, *experts, weights)
        assert torch.equal(terms.parts_TKD, parts) and torch.equal(terms.shared_TD, alone)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [16, 64, 300])
def test_shared_experts_that_begin_while_the_router_chooses(tokens, fp8):
    """Captured as in a step, where each kernel is launched early: the bits of one kernel after the other."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 384, "num_experts": 16, "num_experts_per_tok": 4}
    a, hidden, inter = msgspec.structs.replace(MOONLIGHT, **sizes), 1024, 384
    ops = ops_for(GPU, Numerics.EXACT, fp8=fp8)
    assert ops.takes_shared(tokens, a)
    shapes = (16, 2 * inter, hidden), (16, hidden, inter), (4 * inter, hidden), (hidden, 2 * inter)
    weights = [quantised(*shape, std=0.05)[0] if fp8 else random(*shape, std=0.05) for shape in shapes]
    experts, shared = stored(*weights[:2]), weights[2:]
    gate, bias = router_triton.split_gate(random(16, hidden, std=0.05).float()), torch.zeros(16, device=GPU)
    xs, norm = [random(tokens, hidden) for _ in range(3)], random(hidden)
    x = xs[0].clone()

    def layer():
        given = ops.rms_norm(x, norm, 1e-6)
        routes = ops.route(unquantised(given), gate, bias, a, listed=True)
        return given, routes, lambda: ops.mlp_with_shared(given, routes, *experts, shared)

    layer()[2]()  # compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms = layer()[2]()
    for turn in range(30):
        x.copy_(xs[turn % 3])
        given, routes, _ = layer()
        torch.cuda.synchronize()
        parts = ops.grouped_mlp(given, routes, *experts)
        alone = ops.linear(ops.silu_mul(ops.linear(given, shared[0])), shared[1])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(terms.parts_TKD, parts) and torch.equal(terms.shared_TD, alone)


def logits(x, gate):
    """The router's, added as its kernels say."""
    parts, span = router_triton.logits_in_parts(x, gate)
    return functools.reduce(torch.add, [functools.reduce(torch.add, group) for group in parts.split(span)])


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        (MOONLIGHT, {}),
        (V3, {}),
        (V3, {"num_experts": 32, "n_group": 1, "topk_group": 1}),
        (MOONLIGHT, {"num_experts": 48, "hidden_size": 640}),  # masked columns, and a last span that is short
    ],
    ids=["moonlight", "v3", "v3shard", "uneven"],
)
def test_router(architecture, change, terms):
    """Few tokens by the piece, many by the span, and every tile: the same logits and the same choice to the bit."""
    a, total = msgspec.structs.replace(architecture, **change), 16_384
    x, weight = random(total, a.hidden_size), random(a.num_experts, a.hidden_size, std=0.02, dtype=torch.float32)
    weight = weight.bfloat16().float() if terms == 1 else weight
    gate, bias = router_triton.split_gate(weight), random(a.num_experts, std=0.05, dtype=torch.float32)
    assert len(gate) == terms
    everything = logits(x, gate)
    close(everything, x.double() @ weight.double().t(), 2e-6)  # 16 truncated sums of a piece lose half as much
    ids, weights, _ = router_triton.route(x, gate, bias, a)
    for count in (*COUNTS, 512, 513, 7424, 7425):
        for first in {0, 1, total - count}:
            rows = slice(first, first + count)
            assert torch.equal(logits(x[rows], gate), everything[rows]), f"{count} rows from {first}"
            some_ids, some_weights, _ = router_triton.route(x[rows], gate, bias, a)
            assert torch.equal(some_ids, ids[rows]) and torch.equal(some_weights, weights[rows])


@pytest.mark.parametrize("architecture", [MOONLIGHT, V3], ids=["moonlight", "v3"])
def test_what_is_per_row(architecture):
    """Norms and activations have one shape for any number of rows."""
    a = architecture
    x, norm = random(1100, a.hidden_size), random(a.hidden_size)
    parts, shared = random(1100, 8, a.hidden_size), random(1100, a.hidden_size)
    for index in (0, 1):
        same_rows(
            lambda rows, index=index: norm_triton.add_rms_norm(
                x[rows], experts_triton.Terms(parts[rows], shared[rows]), norm, 1e-6
            )[index]
        )
    same_rows(lambda rows: experts_triton.silu_mul(x[rows]))


# ----------------------------------------------------------------------------------------------------------- attention


def attention_case(heads, page, contexts):
    latent, rope = 512, 64
    needed = [-(-context // page) for context in contexts]
    pages = torch.randperm(sum(needed), device=GPU)
    table = torch.full((len(contexts), max(needed) + 1), sum(needed), device=GPU)
    for row, own in enumerate(torch.split(pages, needed)):
        table[row, : len(own)] = own
    cache = random((sum(needed) + 1) * page, latent + rope)
    return cache, table


def rows_of(cache, own_pages, page):
    return cache.view(-1, page, 576)[own_pages].flatten(0, 1)


def expected_latent(q_latent, q, held):
    scores = torch.cat((q_latent, q[:, 128:]), -1).double() @ held.double().t() * 0.07
    return scores.softmax(-1) @ held[:, :512].double()


@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("page", [32, 64])
def test_decode_and_prefill_give_a_query_the_same_bits(heads, page):
    contexts = [1, 4, 32, 511, 512, 513, 1500, 8192, 8193, 9000]
    cache, table = attention_case(heads, page, contexts)
    rows = len(contexts)
    q_latent, q = random(rows, heads, 512), random(rows, heads, 192)

    def decode(chosen):
        out = torch.full((len(chosen), heads, 512), torch.nan, dtype=BF16, device=GPU)
        prefix = span_prefix(torch.tensor([contexts[row] - 1 for row in chosen], device=GPU))
        exact_decode(q_latent[chosen], q[chosen], cache, table[chosen], *prefix, page, 0.07, out)
        return out

    together = decode(list(range(rows)))
    for row in range(rows):
        held = rows_of(cache, table[row], page)[: contexts[row]]
        close(together[row], expected_latent(q_latent[row], q[row], held))
        assert torch.equal(decode([row])[0], together[row])
    for chosen in ([9, 0], [2, 4, 6], [1, 2, 3, 4, 5, 7, 8, 9]):
        assert torch.equal(decode(chosen), together[chosen])

    for count in (1, 3, 70, 200):  # each row's last queries as a chunk, of which the last is the decode's
        counts = [min(count, context) for context in contexts]
        starts = [0, *itertools.accumulate(counts)]
        nothing = torch.empty(0, device=GPU)
        batch = Batch(nothing, nothing, nothing, starts, contexts, table, 0)
        tokens, ends = starts[-1], [start - 1 for start in starts[1:]]
        many_latent, many = random(tokens, heads, 512), random(tokens, heads, 192)
        many_latent[ends], many[ends] = q_latent, q
        out = torch.full((tokens, heads, 512), torch.nan, dtype=BF16, device=GPU)
        for chunks in chunks_of(batch, 10_000):
            exact_prefill(many_latent, many, cache, table, chunks, page, 0.07, out)
        assert not out.isnan().any()
        assert torch.equal(out[ends], together)


# ----------------------------------------------------------------------------------------------------------- the model

SHAPE = {
    "hidden_size": 256,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
    "dtype": BF16,
}
VARIANTS = {
    "moonlight-like": {"num_attention_heads": 16, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "v3-like": {"num_attention_heads": 64, "q_lora_rank": 128},
    "v3-like, fp8": {"num_attention_heads": 64, "q_lora_rank": 128, "fp8": True},
}
PAGE, PAGES, LENGTHS = 64, 300, (1200, 5, 64, 700, 1, 33, 515, 90, 12, 300)


class Forward:
    """A model and a cache; prompts computed in chunks, at the same time as any others."""

    def __init__(self, folder):
        config = Config(
            Model(path=str(folder), dtype="bfloat16"),
            Parallel(1, "cuda"),
            Engine(num_pages=PAGES, page_size=PAGE, max_batch_size=16),
        )
        checkpoint = open_checkpoint(config)
        self.model = load_model(checkpoint, config, 0, GPU, lambda *_: None)
        self.cache = make_cache(config, checkpoint, GPU)
        rng = np.random.default_rng(4)
        self.prompts = [torch.from_numpy(rng.integers(6, 500, length)) for length in LENGTHS]

    def begin(self, seed):
        """Forget everything; pages are scattered anew."""
        self.cache.rows_LNSC.normal_()
        free = np.random.default_rng(seed).permutation(PAGES).tolist()
        self.pages = [[free.pop() for _ in range(-(-length // PAGE))] for length in LENGTHS]

    def step(self, rows, decodes=0):
        """Hidden states of the rows' tokens; a row is (prompt, first position, count)."""
        width = max(-(-(first + count) // PAGE) for _, first, count in rows)
        table = np.full((len(rows), width), PAGES)
        positions, places, ids, starts = [], [], [], [0]
        for row, (prompt, first, count) in enumerate(rows):
            own = np.array(self.pages[prompt])
            held = own[: -(-(first + count) // PAGE)]
            table[row, : len(held)] = held
            at = np.arange(first, first + count)
            positions.append(at)
            places.append(own[at // PAGE] * PAGE + at % PAGE)
            ids.append(self.prompts[prompt][first : first + count])
            starts.append(starts[-1] + count)
        batch = Batch(
            ids_T=torch.cat(ids).to(GPU),
            positions_T=torch.from_numpy(np.concatenate(positions)).to(GPU),
            write_T=torch.from_numpy(np.concatenate(places)).to(GPU),
            starts=starts,
            contexts=[first + count for _, first, count in rows],
            pages_RP=torch.from_numpy(table).to(GPU),
            num_decodes=decodes,
        )
        return batch, self.forward(batch)

    def forward(self, batch):
        hidden = self.model.forward(batch, self.cache, Numerics.EXACT)
        return torch.cat((hidden.float(), self.model.logits(hidden, Numerics.EXACT)), -1)

    def alone(self, prompt):
        """Every prompt by itself, all at once."""
        self.begin(99)
        return self.step([(prompt, 0, LENGTHS[prompt])])[1]


@pytest.fixture(scope="module", params=list(VARIANTS))
def forward(request, tmp_path_factory):
    torch.manual_seed(7)
    return Forward(make_checkpoint(tmp_path_factory.mktemp("exact") / "tiny", **SHAPE, **VARIANTS[request.param]))


@pytest.fixture(scope="module")
def alone(forward):
    return [forward.alone(prompt) for prompt in range(len(LENGTHS))]


@pytest.mark.parametrize("seed", range(4))
def test_any_company_and_any_chunks(forward, alone, seed):
    """Random steps: some prompts go on by one token as decode rows, others by chunks of any size."""
    rng = np.random.default_rng(seed)
    forward.begin(seed)
    computed = [0] * len(LENGTHS)
    while any(map(lambda done, length: done < length, computed, LENGTHS)):
        going = [i for i in rng.permutation(len(LENGTHS)) if computed[i] < LENGTHS[i] and rng.random() < 0.7]
        single = [i for i in going if computed[i] and (rng.random() < 0.3 or LENGTHS[i] - computed[i] < 3)]
        rows = [(i, computed[i], 1) for i in single]
        for i in going:
            if i not in single:
                count = min(int(rng.integers(1, 2 ** int(rng.integers(1, 11)))), LENGTHS[i] - computed[i])
                rows.append((i, computed[i], count))
        if not rows:
            continue
        out = forward.step(rows, decodes=len(single))[1]
        parts = out.split([count for _, _, count in rows])
        for (i, first, count), part in zip(rows, parts, strict=True):
            assert torch.equal(part, alone[i][first : first + count]), f"prompt {i}, {count} from {first}"
            computed[i] = first + count


def test_captured_decodes_of_any_size(forward, alone):
    forward.begin(5)
    last = [(i, length - 1, 1) for i, length in enumerate(LENGTHS)]
    forward.step([(i, 0, first) for i, first, _ in last if first])
    for count in (1, 4, 10):
        rows = last[:count]
        batch, eager = forward.step(rows, decodes=count)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward.forward(batch)
        graph.replay()
        expected = torch.stack([alone[i][-1] for i, _, _ in rows])
        assert torch.equal(eager, expected) and torch.equal(captured, expected)


@pytest.mark.parametrize("captured", [False, True])
def test_requests_through_the_runner(forward, captured):
    """All of them in turn, chunk by chunk beside decodes, against each alone."""
    output, prompts = 12, [forward.prompts[i].numpy() for i in (3, 1, 4, 6, 9)]
    runner = Runner(forward.model, forward.cache, num_slots=16, max_seq_len=2048)

    def generate(prompts, chunk):
        runner.reset()
        sampling = [Sampling(temperature=1.0, seed=len(prompt)) for prompt in prompts]
        requests = Requests(
            runner, prompts, output, page_size=PAGE, num_pages=PAGES, sampling=sampling, numerics=Numerics.EXACT
        )
        return requests.generate(output, chunk)

    alone = [generate([prompt], 10_000)[0] for prompt in prompts]
    if captured:
        runner.capture(16, 128)
    for chunk in (64, 100, 10_000):
        assert generate(prompts, chunk) == alone


def test_the_fast_class_is_close_and_is_not_exact(forward, alone):
    """The classes compute the same function; the suite would prove nothing if fast steps passed it too."""
    forward.begin(6)
    batch, _ = forward.step([(0, 0, LENGTHS[0])])
    fast = forward.model.logits(forward.model.forward(batch, forward.cache, Numerics.FAST), Numerics.FAST)
    exact = alone[0][:, -fast.shape[1] :]
    assert not torch.equal(fast, exact)
    agree = (fast.argmax(-1) == exact.argmax(-1)).double().mean()
    assert agree > 0.7 and math.isfinite(float(exact.sum()))


def test_ops_of_the_classes_share_what_is_exact():
    fast, exact = (ops_for(GPU, numerics) for numerics in Numerics)
    shared = ("rms_norm", "add_rms_norm", "route", "silu_mul", "sum_experts")
    assert all(getattr(fast, name) is getattr(exact, name) for name in shared)
    assert fast.linear is not exact.linear


@pytest.mark.parametrize("numerics", Numerics)
def test_what_goes_into_quantised_weights_is_quantised(numerics):
    ops, x, weight = ops_for(GPU, numerics, fp8=True), random(5, 256), random(256)
    given = ops.rms_norm(x, weight, 1e-6), ops.add_rms_norm(x, x, weight, 1e-6)[1], ops.silu_mul(x)
    for one in given:
        expected = fp8_triton.quantise(one.x_TI)
        assert torch.equal(one.values_PI[:5].float(), expected.values_PI[:5].float())
        assert torch.equal(one.scales_CP[:, :5], expected.scales_CP[:, :5])
