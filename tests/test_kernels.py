"""The router and the experts against the definition, token by token."""

import math

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.gpu_limits import refusals
from nmoe.worker.kernels.expert_weights import experts_sizes, in_groups, put_expert
from nmoe.worker.kernels.experts import grouped_mlp
from nmoe.worker.kernels.lists import Routes, lists_of
from nmoe.worker.kernels.norm import rms_norm
from nmoe.worker.kernels.router import route
from tests.test_mla_correctness import BASE

ROUTING = msgspec.structs.replace(
    BASE, num_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5
)


def direct_route(x, weight, bias, a):
    """The chosen experts of one token, best first, and their weights."""
    scores = [1 / (1 + math.exp(-float(weight[e].double() @ x.double()))) for e in range(a.num_experts)]
    biased = [score + float(bias[e]) for e, score in enumerate(scores)]
    size = a.num_experts // a.n_group
    groups = [biased[g * size : (g + 1) * size] for g in range(a.n_group)]
    best = sorted(range(a.n_group), key=lambda g: (-sum(sorted(groups[g])[-2:]), g))[: a.topk_group]
    allowed = [e for e in range(a.num_experts) if e // size in best]
    chosen = sorted(allowed, key=lambda e: (-biased[e], e))[: a.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if a.norm_topk_prob else 1.0
    return chosen, [scores[e] / total * a.routed_scaling_factor for e in chosen]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (2, 2)]),
    slots=st.integers(1, 4),
    normalise=st.booleans(),
)
def test_the_router_chooses_as_defined(seed, groups, slots, normalise):
    a = msgspec.structs.replace(
        ROUTING, n_group=groups[0], topk_group=groups[1], num_experts_per_tok=slots, norm_topk_prob=normalise
    )
    generator = torch.Generator().manual_seed(seed)
    x_TD, weight_ED = torch.randn(5, 12, generator=generator), torch.randn(8, 12, generator=generator) * 0.5
    bias_E = torch.randn(8, generator=generator) * 0.3
    ids_TK, weights_TK, _ = route(x_TD, weight_ED, bias_E, a)
    for token in range(5):
        ids, weights = direct_route(x_TD[token], weight_ED, bias_E, a)
        assert ids_TK[token].tolist() == ids
        torch.testing.assert_close(weights_TK[token].tolist(), weights, rtol=1e-5, atol=1e-6)


def test_equal_scores_go_to_the_lower_id():
    ids_TK, *_ = route(torch.randn(3, 12), torch.zeros(8, 12), torch.zeros(8), ROUTING)
    assert ids_TK.tolist() == [[0, 1, 2]] * 3


def test_the_router_computes_in_float32():
    """A bias step that bfloat16 could not see decides."""
    bias_E = torch.zeros(8)
    bias_E[5] = 1e-5
    ids_TK, weights_TK, _ = route(torch.zeros(1, 12, dtype=torch.bfloat16), torch.ones(8, 12), bias_E, ROUTING)
    assert ids_TK[0, 0] == 5 and weights_TK.dtype == torch.float32


def direct_experts(x_TD, ids_TK, weights_TK, w_gate_up, w_down):
    out = torch.zeros_like(x_TD, dtype=torch.float64)
    for token, (ids, weights) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if expert < len(w_down):
                gate, up = (w_gate_up[expert].double() @ x_TD[token].double()).chunk(2)
                out[token] += weight * (w_down[expert].double() @ (gate / (1 + torch.exp(-gate)) * up))
    return out.float()


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17])
@pytest.mark.parametrize("num_experts", [8, 2, 1])
def test_experts_add_up_in_whatever_subset_lives_here(num_tokens, num_experts):
    """Ids at or past the local experts stand for experts of other ranks."""
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, 12, generator=generator)
    w_gate_up, w_down = torch.randn(num_experts, 10, 12, generator=generator), torch.randn(num_experts, 12, 5)
    ids_TK = torch.rand(num_tokens, 8, generator=generator).argsort(-1)[:, :3].clamp(max=num_experts)
    weights_TK = torch.rand(num_tokens, 3, generator=generator)
    out = grouped_mlp(x_TD, Routes(ids_TK, weights_TK), w_gate_up, w_down)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, direct_experts(x_TD, ids_TK, weights_TK, w_gate_up, w_down), rtol=1e-4, atol=1e-4)


def test_a_token_nobody_here_serves_gets_zero():
    ids_TK = torch.tensor([[2, 2], [0, 2]])
    out = grouped_mlp(torch.ones(2, 4), Routes(ids_TK, torch.ones(2, 2)), torch.ones(2, 6, 4), torch.ones(2, 4, 3))
    assert out[0].tolist() == [0.0] * 4 and (out[1] > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])  # bytes stand for FP8
@pytest.mark.parametrize(("outputs", "group"), [(768, 256), (640, 128)])
def test_groups_of_expert_weights(dtype, outputs, group):
    weight_OI = torch.randint(0, 251, (outputs, 512)).to(dtype)
    inputs = 128 // weight_OI.itemsize
    weights = in_groups(torch.zeros(3, outputs, 512, dtype=dtype))
    assert weights.shape == (3, outputs // group, 512 // inputs, group, inputs)
    put_expert(weights, 2, weight_OI, halves=False)
    assert torch.equal(weights[2, 1, 3], weight_OI[group : 2 * group, 3 * inputs : 4 * inputs])
    assert experts_sizes(weights) == (3, outputs, 512)
    put_expert(weights, 1, weight_OI, halves=True)
    half, gate_OI, up_OI = group // 2, weight_OI[: outputs // 2], weight_OI[outputs // 2 :]
    assert torch.equal(weights[1, 1, 2, :half], gate_OI[half:group, 2 * inputs : 3 * inputs])
    assert torch.equal(weights[1, 1, 2, half:], up_OI[half:group, 2 * inputs : 3 * inputs])
    assert not weights[0].any()


def test_lists_have_every_pair_once():
    ids_TK = torch.tensor([[2, 0], [3, 2], [1, 2], [3, 3]])  # 3 stands for an expert elsewhere
    lists = lists_of(ids_TK, 3)
    assert lists.counts_EW[:, 0].tolist() == [1, 1, 3, 0] and not lists.counts_EW[:, 1:].any()
    assert [lists.pairs_EC[expert, :count].tolist() for expert, count in enumerate((1, 1, 3))] == [[1], [4], [0, 3, 5]]


def test_the_norm_keeps_its_input_type_and_scales_to_one():
    x_TD = torch.randn(6, 64, dtype=torch.bfloat16) * 30
    out = rms_norm(x_TD, torch.full((64,), 2.0, dtype=torch.bfloat16), 1e-6)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float().square().mean(-1), torch.full((6,), 4.0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"q_lora_rank": None}, None),
        ({"num_heads": 48}, "num_attention_heads = 48"),
        ({"num_shared_experts": 0}, "n_shared_experts = 0"),
        ({"kv_lora_rank": 96}, "kv_lora_rank = 96"),
        ({"qk_nope_head_dim": 512}, "qk_nope_head_dim = 512: must be a power of two from 32 to 256"),
        ({"intermediate_size": 1004}, "intermediate_size = 1004: must be a multiple of 8"),
        ({"q_lora_rank": 100}, "q_lora_rank = 100: must be a multiple of 8"),
    ],
)
def test_what_the_gpu_kernels_cannot_run_is_refused(change, problem):
    fitting = {
        "hidden_size": 256,
        "num_heads": 16,
        "q_lora_rank": 96,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
    }
    architecture = msgspec.structs.replace(BASE, **fitting | change)
    reasons = refusals(architecture, "bfloat16", 64, (9, 0))
    assert [reason.startswith(problem) for reason in reasons] == [True] if problem else reasons == []
    others = refusals(architecture, "float32", 48, (10, 0))
    assert len(others) == len(reasons) + 3 and others[3:] == reasons


@pytest.mark.parametrize(("heads", "accepted"), [(16, [32, 64, 128, 256]), (128, [64, 128, 256])])
def test_a_page_holds_whole_tiles_of_attention(heads, accepted):
    architecture = msgspec.structs.replace(BASE, num_heads=heads)
    others = refusals(architecture, "bfloat16", 64, (9, 0))
    for size in range(1, 257):
        reasons = refusals(architecture, "bfloat16", size, (9, 0))
        assert (reasons == others) == (size in accepted)
        listed = ", ".join(map(str, accepted[:-1]))
        assert reasons == others or reasons[0].endswith(f"set [engine] page_size to {listed} or 256")
