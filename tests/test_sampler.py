"""The sampler draws from the exact distribution; a row's token depends on its logits, seed and position alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.worker.philox import philox4x32, uniforms
from nmoe.worker.sampler import NO_TOKEN, greedy, make_plan, sample

CPU = torch.device("cpu")
VOCAB = 40


def _logits(rows, vocab=VOCAB, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (rows, vocab)).astype(np.float32))


def _sample(logits, temperature=1.0, top_k=0, top_p=1.0, seeds=0, positions=0, min_p=0.0):
    """Tokens of all rows; each parameter is a number for all rows or one per row."""
    rows = len(logits)
    temperature, top_k, top_p, seeds, positions, min_p = (
        np.broadcast_to(np.asarray(value), rows) for value in (temperature, top_k, top_p, seeds, positions, min_p)
    )
    plan = make_plan(temperature.astype(np.float32), top_k, top_p, min_p, logits.shape[1], CPU)
    if not len(plan.drawn):
        return greedy(logits).numpy()
    random = uniforms(seeds[plan.drawn].astype(np.int64), positions[plan.drawn])
    return sample(logits, plan, torch.from_numpy(random)).numpy()


def _distribution(logits, temperature, top_k, top_p):
    """The exact probabilities, straight from the definition in float64."""
    scaled = logits.double().numpy() / temperature
    likelihood = np.exp(scaled - scaled.max())
    order = np.argsort(-likelihood, kind="stable")
    if top_k:
        likelihood[order[top_k:]] = 0
    likelihood /= likelihood.sum()
    before = np.cumsum(likelihood[order]) - likelihood[order]
    likelihood[order[before >= top_p]] = 0
    return likelihood / likelihood.sum()


def _assert_fits(counts, expected):
    """Pearson's chi-square: below the 99.9 % quantile (Wilson-Hilferty), and nothing where nothing may be."""
    assert counts[expected == 0].sum() == 0
    total = counts.sum()
    usual = expected * total >= 5
    observed = np.append(counts[usual], counts[~usual].sum())
    wanted = np.append(expected[usual], expected[~usual].sum()) * total
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    if freedom == 0:
        return
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < quantile


def test_philox_gives_the_published_vectors():
    counters = np.array(
        [[0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]], dtype=np.uint64
    ).T.copy()
    keys = np.array([[0, 0], [0xFFFFFFFF] * 2, [0xA4093822, 0x299F31D0]], dtype=np.uint64).T.copy()
    expected = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    assert philox4x32(counters, keys).T.tolist() == expected


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.3, 0, 1.0),
        (2.5, 0, 1.0),
        (1.0, 5, 1.0),
        (1.0, 1, 1.0),
        (1.0, 0, 0.8),
        (1.0, 0, 0.01),
        (0.7, 10, 0.9),
        (3.0, 20, 0.5),
        (1.5, VOCAB + 7, 0.95),
    ],
)
def test_draws_follow_the_exact_distribution(temperature, top_k, top_p):
    draws, logits = 40_000, _logits(1)
    tokens = _sample(logits.expand(draws, -1), temperature, top_k, top_p, seeds=11, positions=np.arange(draws))
    _assert_fits(np.bincount(tokens, minlength=VOCAB), _distribution(logits[0], temperature, top_k, top_p))


def test_adjacent_seeds_and_positions_are_independent():
    """The joint table of two neighbours is the product of their distributions, along both axes."""
    seeds, positions = np.meshgrid(np.arange(200), np.arange(200), indexing="ij")
    draws = uniforms(seeds.ravel(), positions.ravel()).reshape(seeds.shape)
    cells = (draws * 6).astype(int)
    pairs = {
        "seeds": (cells[:-1], cells[1:]),
        "positions": (cells[:, :-1], cells[:, 1:]),
        "a seed's next position and the next seed's position": (cells[:-1, 1:], cells[1:, :-1]),
    }
    for first, second in pairs.values():
        _assert_fits(np.bincount((6 * first + second).ravel(), minlength=36), np.full(36, 1 / 36))
    assert len(np.unique(draws)) == draws.size


def test_seeds_differ_in_all_their_bits():
    seeds = np.array([1 << bit for bit in range(63)] + [0, (1 << 63) - 1], dtype=np.int64)
    draws = uniforms(seeds, np.full(len(seeds), 5))
    assert len(np.unique(draws)) == len(seeds)
    assert (draws >= 0).all()
    assert (draws < 1).all()


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, -1.0, 2.0]])
    assert _sample(logits, temperature=0).tolist() == [1, 0]


def test_temperature_0_ignores_the_other_parameters():
    logits = _logits(8)
    tokens = _sample(logits, temperature=0, top_k=3, top_p=0.1, seeds=np.arange(8))
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_the_coldest_draw_is_greedy():
    logits = _logits(50)
    tokens = _sample(logits, temperature=1e-30, seeds=np.arange(50))
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_top_k_keeps_exactly_k_of_equals():
    tokens = _sample(torch.zeros(500, VOCAB), top_k=3, positions=np.arange(500))
    assert sorted(set(tokens.tolist())) == [0, 1, 2]


def test_a_masked_token_is_never_drawn():
    logits = torch.full((2000, VOCAB), -torch.inf)
    logits[:, [3, 17]] = torch.tensor([1.0, 0.0])
    assert set(_sample(logits, positions=np.arange(2000)).tolist()) == {3, 17}
    assert set(_sample(logits, top_k=30, positions=np.arange(2000)).tolist()) == {3, 17}


@pytest.mark.parametrize("temperature", [0.0, 0.9, [0.0, 0.9] * 32])
@pytest.mark.parametrize("top_k", [0, 5, [0, 0, 5, 5] * 16])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_give_no_token_and_touch_no_neighbour(wrong, top_k, temperature):
    logits = _logits(64)
    right = _sample(logits, temperature, top_k, seeds=np.arange(64))
    logits[:20] = wrong
    logits[20:24, ::3] = wrong
    logits[24:28, 2] = wrong
    tokens = _sample(logits, temperature, top_k, seeds=np.arange(64))
    masked = wrong == -math.inf  # some tokens may be
    assert (tokens[: 20 if masked else 28] == NO_TOKEN).all()
    assert masked == bool((tokens[20:28] >= 0).all())
    assert tokens[28:].tolist() == right[28:].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 5])
def test_extreme_logits_that_are_finite_give_a_token(temperature, top_k):
    logits = torch.full((3, VOCAB), -torch.inf)
    logits[0, 7], logits[1, 7], logits[2] = -3e38, 3e38, -3e38
    logits[2, 7] = 3e38
    assert _sample(logits, temperature, top_k).tolist() == [7, 7, 7]


def test_the_ends_of_the_unit_interval_are_tokens():
    logits = _logits(1)
    plan = make_plan(np.ones(1, np.float32), np.zeros(1, int), np.ones(1), np.zeros(1), VOCAB, CPU)
    tokens = [sample(logits, plan, torch.tensor([u], dtype=torch.float64)).item() for u in (0.0, 1 - 2**-53)]
    assert tokens == [0, VOCAB - 1]


_rows = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        st.sampled_from([0, 1, 7, VOCAB]),
        st.sampled_from([0.2, 0.9, 1.0]),
        st.integers(0, 2**63 - 1),
        st.integers(0, 10**6),
        st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    ),
    min_size=1,
    max_size=12,
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(_rows, st.randoms(use_true_random=False))
def test_a_row_gives_the_same_token_alone_and_in_any_company(rows, random):
    logits = _logits(len(rows), seed=len(rows))
    alone = [int(_sample(logits[i : i + 1], *row)[0]) for i, row in enumerate(rows)]
    order = list(range(len(rows)))
    random.shuffle(order)
    columns = [np.array(column) for column in zip(*(rows[i] for i in order), strict=True)]
    together = _sample(logits[order], *columns)
    assert together.tolist() == [alone[i] for i in order]
