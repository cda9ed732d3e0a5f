"""Every path through the attention against attention written out, head by head and query by query, in float64."""

import cmath
import math

import msgspec
import pytest
import torch

from nmoe.architecture import Architecture, Rope, Yarn, expected_tensors
from nmoe.profiles import Numerics
from nmoe.worker.kernels import ops_for
from nmoe.worker.kernels.mla import absorbed_is_cheaper
from nmoe.worker.kernels.rope import rope_table
from nmoe.worker.model import mla
from nmoe.worker.model.mla import Attention, AttentionPlan
from tests.stepping import Stepper

OPS = ops_for(torch.device("cpu"), Numerics.FAST)

BASE = Architecture(
    model_type="deepseek_v3",
    vocab_size=32,
    hidden_size=40,
    num_layers=1,
    num_heads=4,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=2,
    num_shared_experts=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    first_k_dense=1,
    rms_norm_eps=1e-3,
    rope=Rope(),
    tie_word_embeddings=False,
    max_position_embeddings=256,
    dtype="float32",
    quant_block=None,
    eos_token_ids=(1,),
)
YARN = Yarn(factor=8.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.8)
VARIANTS = {
    "default": {},
    "full query projection": {"q_lora_rank": None},
    "odd dimensions": {
        "num_heads": 3,
        "q_lora_rank": 13,
        "kv_lora_rank": 29,
        "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 6,
        "v_head_dim": 9,
    },
    "one head": {"num_heads": 1},
    "halves on disk": {"rope": Rope(interleave=False)},
    "another theta": {"rope": Rope(theta=500.0)},
    "yarn": {"rope": Rope(yarn=YARN)},
    "yarn, halves, full query": {"rope": Rope(interleave=False, yarn=YARN), "q_lora_rank": None},
    "yarn without mscale": {"rope": Rope(yarn=Yarn(factor=4.0, original_max_position_embeddings=64))},
    "yarn, attention factor": {"rope": Rope(yarn=msgspec.structs.replace(YARN, attention_factor=1.3))},
    "yarn, not truncated": {
        "rope": Rope(yarn=msgspec.structs.replace(YARN, truncate=False, beta_fast=16.0, beta_slow=2.0))
    },
}


@pytest.fixture(params=list(VARIANTS))
def architecture(request):
    return msgspec.structs.replace(BASE, **VARIANTS[request.param])


class Tensors:
    """A source of random weights that the direct implementation reads too."""

    def __init__(self, architecture):
        generator = torch.Generator().manual_seed(3)
        self.by_name = {
            name: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5) * 1.5
            if len(shape) == 2
            else torch.rand(shape, generator=generator) + 0.5
            for name, shape in expected_tensors(architecture)
        }

    def fill(self, out, name):
        out.copy_(self.by_name[name])


def angle_of(architecture, pair, position) -> float:
    """The rotation of one pair at one position; YaRN as in section 3.2 of its paper."""
    rope, dim = architecture.rope, architecture.qk_rope_head_dim
    frequency = rope.theta ** (-2 * pair / dim)
    if rope.yarn:

        def pair_with(rotations):
            trained = rope.yarn.original_max_position_embeddings
            return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = pair_with(rope.yarn.beta_fast), pair_with(rope.yarn.beta_slow)
        if rope.yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        interpolated = min(max((pair - low) / (high - low), 0.0), 1.0)
        frequency *= interpolated / rope.yarn.factor + 1 - interpolated
    return frequency * position


def rotated(architecture, vector, position):
    """A roped vector, its pairs as neighbours or halves; any fixed order serves, since only dot products matter."""
    half = len(vector) // 2
    scale = architecture.rope.yarn.cos_sin_scale() if architecture.rope.yarn else 1.0
    out = []
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if architecture.rope.interleave else (pair, pair + half)
        z = complex(vector[a], vector[b]) * cmath.rect(scale, angle_of(architecture, pair, position))
        out += [z.real, z.imag]
    return torch.tensor(out, dtype=torch.float64)


def direct_attention(architecture, tensors, x_TD):
    """Causal attention over the whole of `x_TD` from position 0, one head and one query at a time."""
    a, prefix = architecture, "model.layers.0.self_attn"

    def weight(name):
        return tensors.by_name[f"{prefix}.{name}.weight"].double()

    def normed(x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight(name)

    x_TD = x_TD.double()
    if a.q_lora_rank is None:
        queries = x_TD @ weight("q_proj").T
    else:
        queries = normed(x_TD @ weight("q_a_proj").T, "q_a_layernorm") @ weight("q_b_proj").T
    compressed = x_TD @ weight("kv_a_proj_with_mqa").T
    latents = normed(compressed[:, : a.kv_lora_rank], "kv_a_layernorm")
    ropes = [rotated(a, key, t) for t, key in enumerate(compressed[:, a.kv_lora_rank :].tolist())]
    expanded = (latents @ weight("kv_b_proj").T).view(len(x_TD), a.num_heads, -1)
    scale = a.qk_head_dim**-0.5
    if a.rope.yarn and a.rope.yarn.mscale_all_dim:
        scale *= (0.1 * a.rope.yarn.mscale_all_dim * math.log(a.rope.yarn.factor) + 1.0) ** 2
    out = torch.empty(len(x_TD), a.num_heads, a.v_head_dim, dtype=torch.float64)
    for head in range(a.num_heads):
        keys = torch.stack(
            [torch.cat((kv[head, : a.qk_nope_head_dim], k)) for kv, k in zip(expanded, ropes, strict=True)]
        )
        values = expanded[:, head, a.qk_nope_head_dim :]
        for t, query in enumerate(queries.view(len(x_TD), a.num_heads, -1)[:, head]):
            roped = rotated(a, query[a.qk_nope_head_dim :].tolist(), t)
            scores = keys[: t + 1] @ torch.cat((query[: a.qk_nope_head_dim], roped)) * scale
            out[t, head] = torch.softmax(scores, 0) @ values[: t + 1]
    return (out.flatten(1) @ weight("o_proj").T).float()


class Layer:
    """One attention layer over a paged cache, fed hidden states by position."""

    def __init__(self, architecture):
        self.architecture = architecture
        self.tensors = Tensors(architecture)
        like = torch.empty(architecture.hidden_size)
        self.attention = Attention(architecture, self.tensors, "model.layers.0.self_attn", like, fp8=False)
        self.rope = rope_table(architecture, 256, torch.float32, torch.device("cpu"))
        self.stepper = Stepper(architecture)
        self.inputs = torch.randn(4, 60, architecture.hidden_size, generator=torch.Generator().manual_seed(5))

    def add(self, which, length):
        """A request whose hidden states are `inputs[which]`; its token ids are positions in them."""
        return self.stepper.add(torch.arange(length) + which * 60)

    def step(self, rows, decodes=0):
        """The outputs of each row."""
        batch = self.stepper.batch(rows, decodes=decodes)
        plan = AttentionPlan.of(batch, self.stepper.cache, self.rope, self.architecture, torch.float32)
        x_TD = self.inputs.flatten(0, 1)[batch.ids_T]
        out = self.attention.forward(x_TD, plan, self.stepper.cache.rows_LNSC[0].flatten(0, 1), OPS)
        return out.split([count for _, count in rows])

    def direct(self, which, length):
        return direct_attention(self.architecture, self.tensors, self.inputs[which, :length])


@pytest.fixture
def layer(architecture):
    return Layer(architecture)


@pytest.fixture(params=["absorbed", "expanded"])
def form(request, monkeypatch):
    """Chunks take this form, whatever is cheaper."""
    monkeypatch.setattr(mla, "absorbed_is_cheaper", lambda *_: request.param == "absorbed")
    return request.param


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_full_prefill(layer, form):
    (out,) = layer.step([(layer.add(0, 23), 23)])
    close(out, layer.direct(0, 23))


def test_chunks_on_a_cached_prefix(layer, form):
    sequence = layer.add(0, 29)
    out = [layer.step([(sequence, count)])[0] for count in (5, 11, 1, 12)]
    close(torch.cat(out), layer.direct(0, 29))


def test_absorbed_decode(layer):
    sequences = [layer.add(which, length) for which, length in enumerate((7, 30, 18))]
    layer.step([(sequences[0], 1), (sequences[1], 24), (sequences[2], 12)])
    outs = [layer.step([(sequence, 1) for sequence in sequences], decodes=3) for _ in range(6)]
    for which, (length, before) in enumerate(((7, 1), (30, 24), (18, 12))):
        close(torch.cat([out[which] for out in outs]), layer.direct(which, length)[before:])


def test_mixed_step(layer, form):
    """Decodes, a full prefill and a chunk on a prefix in one step."""
    first, second, third, fourth = (layer.add(which, length) for which, length in enumerate((10, 26, 17, 21)))
    layer.step([(first, 9), (second, 25), (third, 6)])
    outs = layer.step([(first, 1), (second, 1), (third, 11), (fourth, 21)], decodes=2)
    for which, (out, length) in enumerate(zip(outs, (10, 26, 17, 21), strict=True)):
        close(out, layer.direct(which, length)[-len(out) :])


def test_a_long_prefill_crosses_query_tiles(layer, form, monkeypatch):
    monkeypatch.setattr("nmoe.worker.kernels.mla._TILE", 8)
    sequence = layer.add(0, 43)
    outs = [layer.step([(sequence, count)])[0] for count in (17, 26)]
    close(torch.cat(outs), layer.direct(0, 43))


def test_a_recomputed_last_token_is_not_written():
    """A fully cached prompt recomputes its last token; its pages are shared and must keep their bits."""
    layer = Layer(BASE)
    sequence = layer.add(0, 12)
    (whole,) = layer.step([(sequence, 12)])
    before = layer.stepper.cache.rows_LNSC.clone()
    sequence.computed = 11
    batch = layer.stepper.batch([(sequence, 1)], write=False)
    plan = AttentionPlan.of(batch, layer.stepper.cache, layer.rope, BASE, torch.float32)
    rows = layer.stepper.cache.rows_LNSC[0].flatten(0, 1)
    close(layer.attention.forward(layer.inputs[0, 11:12], plan, rows, OPS), whole[11:])
    assert torch.equal(before[:, :-1].nan_to_num(7.0), layer.stepper.cache.rows_LNSC[:, :-1].nan_to_num(7.0))


def test_the_cheaper_form_for_deepseek_v3():
    """Short chunks on a long prefix are absorbed; long chunks and full prefills expand (3.4 times per pair)."""
    real = msgspec.structs.replace(
        BASE, num_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    assert not absorbed_is_cheaper(4096, 4096, real)
    assert not absorbed_is_cheaper(1024, 8192, real)
    assert absorbed_is_cheaper(64, 8192, real)
    assert absorbed_is_cheaper(1, 100_000, real)
    assert not absorbed_is_cheaper(400, 100_000, real)
