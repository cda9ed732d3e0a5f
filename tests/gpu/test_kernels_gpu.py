"""Every Triton kernel against its plain-torch reference in float64 or float32, on fresh random inputs.

bfloat16 results of float32 sums lie within 4e-3 of the reference (relative, over the whole tensor); twice that fails.
"""

import math

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nmoe.config_json import read_architecture
from nmoe.worker.inputs import Layout, locate, write_chunks, write_rows
from nmoe.worker.kernels import (
    experts,
    experts_fp8_gluon,
    experts_gluon,
    experts_triton,
    fp8_triton,
    linear_parts_gluon,
    linear_triton,
    norm,
    norm_triton,
    router,
    router_triton,
)
from nmoe.worker.kernels.copies_triton import copy_words, put_words
from nmoe.worker.kernels.fp8 import BlockFP8, dequantise_blocks, quantise_rows
from nmoe.worker.kernels.lists import Routes, lists_of
from nmoe.worker.kernels.mla import Up, absorbed_decode
from nmoe.worker.kernels.mla_decode_triton import absorbed_decode as absorbed_decode_gpu
from nmoe.worker.kernels.mla_decode_triton import page_prefix
from nmoe.worker.kernels.mla_inputs_triton import enter
from nmoe.worker.kernels.mla_prefill_triton import expanded_chunks
from nmoe.worker.kernels.mla_values_many_gluon import values_of_many
from nmoe.worker.kernels.rope import apply_rope, rope_table
from nmoe.worker.rows import Rows
from nmoe.worker.slots import DeviceSlots, SlotTable
from tests.gpu.experts import stored
from tests.gpu.ranks import listed_ids

GPU = torch.device("cuda")
BF16 = torch.bfloat16
MOONLIGHT = read_architecture("configs/models/moonlight.json")
V3 = read_architecture("configs/models/deepseek-v3.json")


def random(*shape, std=1.0, dtype=BF16):
    return (torch.randn(*shape, device=GPU) * std).to(dtype)


def close(actual, expected, tolerance=8e-3):
    actual, expected = actual.double(), expected.double()
    error = float((actual - expected).norm() / expected.norm())
    assert error < tolerance, f"relative error {error:.2e}"  # a NaN is not below anything


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 2048), (33, 7168), (300, 512)])
def test_norms(tokens, hidden):
    weight, x, delta = random(hidden), random(tokens, hidden), random(tokens, hidden)
    total, normed = norm_triton.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    close(normed, norm.rms_norm(total.double(), weight.double(), 1e-5))
    wide = random(tokens, hidden + 64)
    close(
        norm_triton.rms_norm(wide[:, :hidden], weight, 1e-6),
        norm.rms_norm(wide[:, :hidden].double(), weight.double(), 1e-6),
    )


def added(parts, shared):
    """The sum that the norm behind an expert layer takes of its terms."""
    weight, nothing = random(shared.shape[1]), torch.zeros_like(shared)
    return norm_triton.add_rms_norm(nothing, experts_triton.Terms(parts, shared), weight, 1e-6)[0]


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(3648, 2048), (2048, 2816), (40, 256), (100, 96)])
def test_linear(tokens, outputs, inputs):
    weight, x = random(outputs, inputs), random(tokens, inputs + 32)[:, :inputs]
    close(linear_triton.linear(x, weight), x.double() @ weight.double().t())


@pytest.mark.parametrize(("outputs", "inputs"), [(2048, 2048), (64, 512), (640, 1024)])
@pytest.mark.parametrize("tokens", [17, 32, 63, 128])
def test_a_products_parts_are_added_by_the_norm(tokens, outputs, inputs):
    weight, x, residual = random(outputs, inputs), random(tokens, inputs + 32)[:, :inputs], random(tokens, outputs)
    parts = linear_parts_gluon.parts_of(x, weight)
    assert parts.shape == (tokens, inputs // 512, outputs)
    product = x.double() @ weight.double().t()
    close(parts.double().sum(1), product)
    norm_weight = random(outputs)
    summed, normed = norm_triton.add_rms_norm(residual, experts_triton.Terms(parts), norm_weight, 1e-6)
    close(summed, residual.double() + product)
    close(normed, norm.rms_norm(summed, norm_weight, 1e-6))


def test_many_tokens_and_wide_products_have_no_parts():
    assert linear_parts_gluon.parts_of(random(129, 512), random(64, 512)) is None
    assert linear_parts_gluon.parts_of(random(16, 512), random(64, 512)) is None
    assert linear_parts_gluon.parts_of(random(64, 4096), random(2048, 4096)) is None


def same_choice(ids, weights, expected_ids, expected):
    """All tokens but one in a hundred have the same experts, as float32 cannot order what differs in the eighth digit;
    and those have the same weights."""
    same = (ids == expected_ids).all(1)
    assert int((~same).sum()) <= math.ceil((len(ids) - 1) / 100)
    close(weights[same], expected[same], 1e-5)


@pytest.mark.parametrize("architecture", [MOONLIGHT, V3], ids=["moonlight", "v3"])
@pytest.mark.parametrize("tokens", [1, 17, 256, 3000])
def test_router(architecture, tokens):
    a = architecture
    x, weight = random(tokens, a.hidden_size), random(a.num_experts, a.hidden_size, std=0.02, dtype=torch.float32)
    bias = random(a.num_experts, std=0.05, dtype=torch.float32)
    ids, weights, _ = router_triton.route(x, router_triton.split_gate(weight), bias, a)
    expected_ids, expected, _ = router.route(x, weight, bias, a)
    same_choice(ids, weights, expected_ids, expected)


def test_a_gate_is_the_sum_of_its_terms():
    """Any bits of a float32, but infinity, NaN and the last half step of bfloat16 below it."""
    bits = torch.randint(-(2**31), 2**31, (1000, 1024), device=GPU)
    weight = bits.to(torch.int32).view(torch.float32)
    weight = torch.where(weight.abs() < 3.38e38, weight, 0.0).contiguous()
    error = (router_triton.split_gate(weight).double().sum(0) - weight.double()).abs()
    assert not error[weight.abs() >= 2.0**-110].any() and float(error.max()) <= 2.0**-134


@pytest.mark.parametrize("tokens", [1, 600])
@pytest.mark.parametrize(("num_experts", "hidden"), [(8, 128), (48, 640), (160, 1280), (384, 7168)])
def test_router_of_uneven_shapes(num_experts, hidden, tokens):
    """Experts that fill no tile, spans of unlike lengths; weights of one, two and three terms."""
    a = msgspec.structs.replace(MOONLIGHT, num_experts=num_experts, num_experts_per_tok=4, hidden_size=hidden)
    x, bias = random(tokens, hidden), random(num_experts, std=0.05, dtype=torch.float32)
    exact = random(num_experts, hidden, std=0.02, dtype=torch.float32)
    one = exact.bfloat16().float()
    for terms, weight in ((1, one), (2, one + (exact - one).bfloat16().float()), (3, exact)):
        gate = router_triton.split_gate(weight)
        assert len(gate) == terms and torch.equal(gate.double().sum(0), weight.double())
        ids, weights, _ = router_triton.route(x, gate, bias, a)
        expected_ids, expected, _ = router.route(x, weight, bias, a)
        same_choice(ids, weights, expected_ids, expected)


@pytest.mark.parametrize("architecture", [MOONLIGHT, V3], ids=["moonlight", "v3"])
@pytest.mark.parametrize("tokens", [1, 17, 256, 513, 3000])
def test_router_lists(architecture, tokens):
    """Every pair is in its expert's list, also of tokens that are no numbers, which harm no others."""
    a = architecture
    x, weight = random(tokens, a.hidden_size), random(a.num_experts, a.hidden_size, std=0.02, dtype=torch.float32)
    gate, bias = router_triton.split_gate(weight), random(a.num_experts, std=0.05, dtype=torch.float32)
    sound = router_triton.route(x, gate, bias, a)
    x[1::3] = float("nan")
    routes = router_triton.route(x, gate, bias, a, listed=True)
    pairs_EC, counts_EW = routes.lists.pairs_EC, routes.lists.counts_EW
    assert torch.equal(counts_EW[:, 0], routes.ids_TK.flatten().bincount(minlength=a.num_experts + 1))
    assert torch.equal(listed_ids(routes), routes.ids_TK) and pairs_EC.shape == (a.num_experts, tokens)
    assert all(len(set(ids)) == len(ids) for ids in routes.ids_TK.tolist())
    same = torch.arange(tokens, device=GPU) % 3 != 1
    assert torch.equal(routes.ids_TK[same], sound.ids_TK[same])
    assert torch.equal(routes.weights_TK[same], sound.weights_TK[same])


def routing(tokens, num_experts, slots, skew=0.0):
    """What a router gives; with `skew`, all tokens prefer the low experts."""
    scores = torch.rand(tokens, num_experts, device=GPU) - skew * torch.arange(num_experts, device=GPU)
    ids = scores.topk(slots).indices.int()
    return Routes(ids, torch.rand(tokens, slots, device=GPU), lists_of(ids, num_experts))


@pytest.mark.parametrize(
    ("tokens", "num_experts", "hidden", "inter", "slots", "skew"),
    [
        (1, 64, 2048, 1408, 6, 0),
        (17, 64, 2048, 1408, 6, 0),
        (40, 64, 2048, 1408, 6, 0),
        (256, 64, 2048, 1408, 6, 0),
        (700, 64, 2048, 1408, 6, 0),
        (5000, 64, 2048, 1408, 6, 0),
        (256, 64, 2048, 1408, 6, 1.0),  # everybody wants the same experts
        (3000, 8, 256, 128, 2, 0),
        (65, 8, 128, 64, 3, 0),
        (700, 8, 256, 192, 3, 0),
    ],
)
def test_experts(tokens, num_experts, hidden, inter, slots, skew):
    x, shared = random(tokens, hidden), random(tokens, hidden)
    gate_up, down = random(num_experts, 2 * inter, hidden, std=0.05), random(num_experts, hidden, inter, std=0.05)
    routes = routing(tokens, num_experts, slots, skew)
    parts = experts_gluon.grouped_mlp(x, routes, *stored(gate_up, down))
    actual = added(parts, shared)
    routed = experts.grouped_mlp(x.float(), routes._replace(ids_TK=routes.ids_TK.long()), gate_up.float(), down.float())
    close(actual, experts.sum_experts(routed, shared.float()))


@pytest.mark.parametrize("skew", [0, 0.1])
@pytest.mark.parametrize("tokens", [1, 5, 17, 40, 64, 200, 700])
def test_experts_of_few_rows_have_the_bits_of_others(tokens, skew):
    x, routes = random(tokens, 640), routing(tokens, 16, 3, skew)
    gate_up, down = stored(random(16, 2 * 384, 640, std=0.05), random(16, 640, 384, std=0.05))
    results = []
    for module in (experts_gluon, experts_gluon, experts_triton):
        routes.lists.renew()
        results.append(module.grouped_mlp(x, routes, gate_up, down))
    few, again, others = results
    assert torch.equal(few, others) and torch.equal(few, again)


def test_silu_mul():
    gate_up = random(70, 2 * 1408)
    close(experts_triton.silu_mul(gate_up), experts.silu_mul(gate_up.double()))


def quantised(*shape, std):
    """A random FP8 weight [..., O, I], and what it stands for in float64."""
    *front, rows, columns = shape
    blocks = -(-rows // 128), -(-columns // 128)
    weight = BlockFP8(
        random(*shape, std=64.0).to(torch.float8_e4m3fn),
        random(*front, *blocks, dtype=torch.float32).abs().add(0.5) * (std / 64),
    )
    values, scales = weight.values.view(-1, rows, columns), weight.scales.view(-1, *blocks)
    pairs = zip(values, scales, strict=True)
    real = torch.stack([dequantise_blocks(*pair, (128, 128), torch.float64) for pair in pairs])
    return weight, real.view(shape)


def rounded(x):
    """What quantised activations stand for, float64."""
    values, scales = quantise_rows(x)
    return values.double() * scales.double().repeat_interleave(128, 1)


@pytest.mark.parametrize(("tokens", "columns"), [(1, 7168), (77, 1536), (3000, 256)])
def test_quantised_activations(tokens, columns):
    x = random(tokens, columns + 128)[:, :columns] * torch.logspace(-3, 3, tokens, device=GPU, dtype=BF16)[:, None]
    quantised = fp8_triton.quantise(x)
    expected_values, expected_scales = quantise_rows(x)
    torch.testing.assert_close(quantised.scales_CP.t()[:tokens], expected_scales, rtol=1e-6, atol=0)
    same = quantised.values_PI[:tokens].float() == expected_values.float()
    assert same.double().mean() > 0.999  # a division may round the other way


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 7168), (77, 1536), (300, 256)])
def test_what_norms_and_activations_quantise(tokens, hidden):
    """The bits that quantising their results gives."""
    x, delta, weight = random(tokens, hidden), random(tokens, hidden), random(hidden)
    parts = random(tokens, 8, hidden)
    for given in (None, delta, experts_triton.Terms(parts, delta)):
        plain = norm_triton.add_rms_norm(x, given, weight, 1e-6)
        both = norm_triton.add_rms_norm(x, given, weight, 1e-6, quantised=True)
        assert torch.equal(both[0], plain[0])
        same_quantised(both[1], plain[1])
    gate_up = random(tokens, 2 * hidden)
    same_quantised(experts_triton.silu_mul(gate_up, quantised=True), experts_triton.silu_mul(gate_up))


def same_quantised(quantised, plain):
    """Whether it is what `quantise` makes of `plain`, which a sum in another order may give in other bits."""
    close(quantised.x_TI, plain, 1e-3)
    expected, tokens = fp8_triton.quantise(quantised.x_TI), len(plain)
    assert torch.equal(quantised.values_PI[:tokens].float(), expected.values_PI[:tokens].float())
    assert torch.equal(quantised.scales_CP[:, :tokens], expected.scales_CP[:, :tokens])


@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 64, 67, 200, 256, 701])
@pytest.mark.parametrize(("outputs", "inputs"), [(2112, 7168), (24576, 1536), (7168, 2048), (1024, 256), (576, 128)])
def test_fp8_linear(tokens, outputs, inputs):
    x = random(tokens, inputs)
    weight, real = quantised(outputs, inputs, std=0.02)
    close(fp8_triton.linear(x, weight), rounded(x) @ real.t())


@pytest.mark.parametrize(
    ("tokens", "num_experts", "hidden", "inter", "slots"),
    [
        (1, 32, 7168, 2048, 8),
        (40, 8, 384, 128, 3),
        (30, 32, 1024, 512, 8),
        (100, 32, 512, 256, 8),
        (256, 32, 512, 256, 8),
        (3000, 8, 512, 256, 3),
    ],
)
def test_fp8_experts(tokens, num_experts, hidden, inter, slots):
    x, shared = random(tokens, hidden), random(tokens, hidden)
    gate_up, real_gate_up = quantised(num_experts, 2 * inter, hidden, std=0.05)
    down, real_down = quantised(num_experts, hidden, inter, std=0.05)
    ids, weights, _ = routes = routing(tokens, num_experts, slots)
    actual = added(experts_fp8_gluon.grouped_mlp(x, routes, *stored(gate_up, down)), shared)
    expected, x = shared.double(), rounded(x)
    for expert in range(num_experts):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        between = rounded(experts.silu_mul(x[token] @ real_gate_up[expert].t()))
        expected.index_add_(0, token, (between @ real_down[expert].t()) * weights[token, slot, None].double())
    close(actual, expected, 1.5e-2)  # values between the products may round to a neighbour


def decode_step(heads, page, contexts, latent=512, value=128):
    """A step's decode rows over pages in any order: what `absorbed_decode_gpu` takes, and its output's room."""
    rows, needed = len(contexts), [-(-context // page) for context in contexts]
    pages = torch.randperm(sum(needed), device=GPU)
    table = torch.full((rows, max(needed) + 1), sum(needed), device=GPU)
    for row, own in enumerate(torch.split(pages, needed)):
        table[row, : len(own)] = own
    plan = page_prefix(torch.tensor(contexts, device=GPU) - 1, page)
    cache = random((sum(needed) + 1) * page, latent + 64)
    q_latent, q = random(heads, rows, latent), random(rows, heads, 128 + 64)
    w_uv = random(heads, 128 + value, latent, std=0.05)[:, 128:]
    return q_latent, q, cache, table, *plan, page, 0.07, w_uv, random(rows, heads, value)


def check_absorbed_decode(heads, page, contexts, *sizes):
    step = decode_step(heads, page, contexts, *sizes)
    q_latent, q, cache, table, *_, w_uv, out = step
    absorbed_decode_gpu(*step)
    up = Up(w_uv.new_empty(heads, 256, w_uv.shape[2]).double(), *(w_uv.new_empty(0).double(),) * 2, 0.07)
    for row, context in enumerate(contexts):
        held = cache.view(-1, page, cache.shape[1])[table[row]].flatten(0, 1)[None, :context].double()
        query = torch.cat((q_latent[:, row], q[row, :, 128:]), -1)[None].double()
        hidden = torch.zeros(1, 1, context, device=GPU, dtype=torch.float64)
        latent = absorbed_decode(query, held, hidden, up)[0]
        close(out[row], torch.einsum("hl,hvl->hv", latent, w_uv.double()))


@pytest.mark.parametrize(("heads", "page"), [(16, 32), (16, 64), (16, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize(
    "contexts",
    [
        [1],
        [2000],
        [3, 700, 64, 65, 1, 129, 2048] * 5,
        [9000] + [100] * 40,
        [2000, 50] * 150,
        [20000] + [64] * 250,
    ],
    ids=["one", "long", "some", "uneven", "many", "many and one in many parts"],
)
def test_absorbed_decode(heads, page, contexts):
    check_absorbed_decode(heads, page, contexts)


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize(("latent", "value"), [(128, 32), (256, 64), (512, 256)])
def test_absorbed_decode_of_other_sizes(heads, latent, value):
    check_absorbed_decode(heads, 64, [1000, 300, 65], latent, value)


@pytest.mark.parametrize("rows", [1, 64, 200, 300])
@pytest.mark.parametrize(("heads", "latent", "value"), [(128, 512, 128), (64, 512, 256), (64, 128, 128)])
def test_values_of_many_rows(rows, heads, latent, value):
    attended, w_uv = random(heads, rows, latent), random(heads, 64 + value, latent, std=0.05)[:, 64:]
    out = torch.full((rows + 1, heads, value), torch.nan, dtype=BF16, device=GPU)
    values_of_many(attended, w_uv, out[:rows])
    close(out[:rows], torch.einsum("hrl,hvl->rhv", attended.double(), w_uv.double()))
    assert out[rows:].isnan().all()


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("contexts", [[2500], [3, 700, 64, 65, 129, 193, 2048] * 5, [2000, 50] * 100])
def test_absorbed_decode_always_gives_the_same_bits(heads, contexts):
    step = decode_step(heads, 64, contexts)
    absorbed_decode_gpu(*step)
    first = step[-1].clone()
    for _ in range(20):
        absorbed_decode_gpu(*step)
        assert torch.equal(step[-1], first)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("padding", [0, 150])
def test_expanded_chunks(heads, padding):
    """Full prefills and chunks on prefixes of every alignment, behind decode rows, before padding."""
    rows, page, decodes = [(200, 200), (1, 77), (130, 400), (64, 64), (129, 1000), (2, 2)], 64, 3
    counts = np.array([1] * decodes + [count for count, _ in rows])
    contexts = np.array([50] * decodes + [context for _, context in rows])
    total = int(counts.sum())
    given = Rows.of(np.array([(r, 0, n, 3) for r, n in enumerate(counts)]), SlotTable(len(counts), 1, page, 0))
    layout = Layout(len(counts) + 5, total + padding, tiles=40, blocks=30)
    words = np.zeros(layout.size, np.int32)
    parts = layout.parts(words)
    write_rows(parts, given, contexts - counts, np.zeros(total, np.int64), nobody=99)
    write_chunks(parts, given, contexts)
    chunks = layout.chunks(layout.parts(torch.from_numpy(words).to(GPU)), 30 * 128)
    pages = torch.randperm(len(counts) * 20, device=GPU, dtype=torch.int32).view(len(counts), 20)
    cache = random(len(counts) * 20 * page, 576)
    q, weight = random(total + padding, heads, 192), random(heads, 256, 512, std=0.05)
    out = torch.full((total + padding, heads, 128), torch.nan, dtype=BF16, device=GPU)
    expanded_chunks(q, cache, pages, weight, chunks, page, 0.07, out)
    assert out[:decodes].isnan().all() and not out[total:].any()
    for row in range(decodes, len(counts)):
        count, context = int(counts[row]), int(contexts[row])
        own_q = slice(int(given.starts[row]), int(given.starts[row]) + count)
        held = cache.view(-1, page, 576)[pages[row].long()].flatten(0, 1)[:context]
        kv = (held[:, :512].double() @ weight.flatten(0, 1).double().t()).to(BF16).double().view(context, heads, 256)
        keys = torch.cat((kv[..., :128], held[:, None, 512:].double().expand(-1, heads, -1)), -1)
        scores = torch.einsum("qhd,khd->hqk", q[own_q].double(), keys) * 0.07
        hidden = torch.arange(context, device=GPU) > torch.arange(context - count, context, device=GPU)[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        close(out[own_q], torch.einsum("hqk,khd->qhd", weights, kv[..., 128:]))


@pytest.mark.parametrize("size", [0, 1, 1023, 5000])
def test_words_reach_the_device_and_come_back(size):
    """By kernels, also once the pinned memory has been written again."""
    host, back = (torch.empty(size + 1, dtype=torch.int32, pin_memory=True)[1:] for _ in range(2))
    for first in range(3):
        host.copy_(torch.arange(first, first + size))
        there = torch.empty(size, dtype=torch.int32, device=GPU)
        copy_words(host, there)
        copy_words(there, back)
        torch.cuda.synchronize()
        assert torch.equal(there.cpu(), host) and torch.equal(back, host)


@pytest.mark.parametrize("size", [1, 2500])
def test_put_words(size):
    table = torch.zeros(5000, dtype=torch.int32, device=GPU)
    places = torch.randperm(5000, device=GPU)[:size].int()
    words = torch.randint(1, 1 << 30, (size,), dtype=torch.int32, device=GPU)
    put_words(table, torch.stack((places, words)))
    assert torch.equal(table[places.long()], words) and int((table != 0).sum()) == size


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (256, 256), (7, 500), (0, 16)])
def test_where_tokens_are(rows, tokens):
    """The kernel against the reference, bit for bit: decode rows, chunks of a shared prefix, and padding."""
    rng = np.random.default_rng(rows)
    slots = rng.permutation(300)[:rows]
    counts = np.ones(rows, np.int64) if rows == tokens else rng.integers(1, 70, rows)
    continued = rows // 2
    counts[:continued] = 1
    firsts = rng.integers(0, 2000, rows)
    table = SlotTable(300, 40, 64, 12000)
    table.floors[slots[continued:]] = firsts[continued:] + 5
    table.sampled[:] = True
    flags = np.where(np.arange(rows) < continued, 1, 3)
    given = Rows.of(np.stack((slots, firsts, counts, flags), 1), table)
    layout = Layout(rows + 3, tokens)
    words = np.zeros(layout.size, np.int32)
    write_rows(layout.parts(words), given, firsts, rng.integers(0, 999, given.num_ids), nobody=300)
    results = []
    for device in (torch.device("cpu"), GPU):
        slots_there = DeviceSlots(300, 40, 12000, device)
        slots_there.pages_SP[:-1] = torch.arange(12000, dtype=torch.int32, device=device).view(300, 40)
        slots_there.last_S[:] = torch.arange(301, dtype=torch.int32, device=device) * 7
        results.append(locate(layout.parts(torch.from_numpy(words).to(device)), slots_there, 64))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize(
    ("heads", "tokens", "absorbed"),
    [
        (16, 75, 60),
        (16, 1, 1),
        (48, 75, 75),
        (128, 300, 300),
        (128, 200, 130),
        (128, 600, 65),
        (64, 400, 300),
        (16, 900, 800),
    ],
)
def test_enter(heads, tokens, absorbed):
    buffer, weight = random(tokens, heads * 192 + 576), random(512)
    q_TA, kv = buffer.split([heads * 192, 576], -1)
    q, before = q_TA.view(tokens, heads, 192), q_TA.clone().view(tokens, heads, 192).double()
    table = rope_table(V3, 4096, BF16, GPU)
    positions, places = torch.randint(0, 4096, (tokens,), device=GPU), torch.randperm(2 * tokens, device=GPU)[:tokens]
    rows = torch.full((2 * tokens, 576), torch.nan, dtype=BF16, device=GPU)
    w_uk, out = random(heads, 256, 512, std=0.05)[:, :128], random(heads, absorbed, 512)
    enter(q, kv, positions, places, table, weight, rows, 1e-6, w_uk, out.transpose(0, 1))
    cos, sin = table[positions].double().unbind(1)
    close(q[..., 128:], apply_rope(before[..., 128:], cos[:, None], sin[:, None]))
    assert torch.equal(q[..., :128].double(), before[..., :128])
    close(out, torch.bmm(before[:absorbed, :, :128].transpose(0, 1), w_uk.double()))
    close(rows[places, :512], F.rms_norm(kv[:, :512].double(), (512,), weight.double(), 1e-6))
    close(rows[places, 512:], apply_rope(kv[:, 512:].double(), cos, sin))
    assert rows.isnan().any(1).sum() == tokens  # nothing else was written


def test_what_is_not_finite_stays_out_of_the_cache():
    """A page's next owner reads what lies behind its context and weighs it with zero."""
    q, kv, rows = random(4, 16, 192), random(4, 576), random(4, 576)
    kv[0], kv[1, 0], kv[2, 575] = torch.nan, torch.inf, -torch.inf
    places = torch.arange(4, device=GPU)
    table = rope_table(V3, 4096, BF16, GPU)
    weight = torch.ones(512, dtype=BF16, device=GPU)
    w_uk = random(16, 128, 512)
    enter(q, kv, places, places, table, weight, rows, 1e-6, w_uk, random(0, 16, 512))
    assert rows.isfinite().all() and not rows[0].any() and not rows[1, :512].any()
    close(rows[2, :512], F.rms_norm(kv[2, :512].double(), (512,), weight.double(), 1e-6))


def test_a_rank_with_no_tokens():
    """An idle rank goes through the layers too."""
    nothing = random(0, 512)
    assert norm_triton.add_rms_norm(nothing, nothing, random(512), 1e-6)[1].shape == (0, 512)
    a = msgspec.structs.replace(MOONLIGHT, hidden_size=512)
    gate = router_triton.split_gate(random(64, 512, dtype=torch.float32))
    routes = router_triton.route(nothing, gate, random(64, dtype=torch.float32), a, listed=True)
    parts = experts_gluon.grouped_mlp(nothing, routes, *stored(random(64, 256, 512), random(64, 512, 128)))
    assert added(parts, nothing).shape == (0, 512)
    assert experts_triton.silu_mul(nothing).shape == (0, 256)
    assert fp8_triton.linear(nothing, quantised(256, 512, std=0.02)[0]).shape == (0, 256)
