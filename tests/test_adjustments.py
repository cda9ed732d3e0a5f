"""Every sampling parameter draws from the distribution that its definition gives, alone, combined, in any company."""

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.messages import Admit, Sampling, bias_fields
from nmoe.worker.adjustments import Adjustments
from nmoe.worker.philox import uniforms
from nmoe.worker.sampler import greedy, make_plan, sample

CPU = torch.device("cpu")
VOCAB = 24
DRAWS = 20_000
PROMPT = [1, 1, 4, 6, 20, 9]
OUTPUT = [4, 4, 4, 7, 9, 11, 11]
LOGITS = np.random.default_rng(3).normal(0, 2, VOCAB).astype(np.float32)


def adjustments_of(samplings, prompt=PROMPT, output=OUTPUT):
    """Slot i samples as `samplings[i]` says; all have the same past."""
    state = Adjustments(len(samplings), VOCAB, CPU)
    past = np.array(prompt + output, np.int32).tobytes()
    state.admit(
        [
            Admit(slot, 0, sampling, past if sampling.needs_past else b"", len(prompt))
            for slot, sampling in enumerate(samplings)
        ]
    )
    return state


def tokens_of(samplings, logits, positions, state=None):
    """One token per row, the way the runner gets them."""
    state = state or adjustments_of(samplings)
    slots = np.arange(len(samplings))
    logits = logits.clone()
    adjustment = state.plan(slots)
    positions = np.asarray(positions)
    if adjustment is not None:
        state.apply(adjustment, logits, positions)
    columns = [
        np.array([getattr(sampling, name) for sampling in samplings], dtype)
        for name, dtype in (("temperature", np.float32), ("top_k", int), ("top_p", float), ("min_p", float))
    ]
    plan = make_plan(*columns, VOCAB, CPU)
    seeds = np.array([sampling.seed for sampling in samplings])
    if len(plan.drawn):
        tokens = sample(logits, plan, torch.from_numpy(uniforms(seeds[plan.drawn], positions[plan.drawn])))
    else:
        tokens = greedy(logits)
    if adjustment is not None:
        state.count(adjustment, tokens)
    return tokens.tolist()


def adjusted(logits, sampling, prompt, output):
    """The definitions, one token at a time, in float64."""
    logits = [float(logit) for logit in logits]
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if len(output) < sampling.min_tokens:
        for token in sampling.barred_ids:
            logits[token] = -math.inf
    for token in range(len(logits)):
        if token in prompt or token in output:
            power = sampling.repetition_penalty
            logits[token] = logits[token] / power if logits[token] > 0 else logits[token] * power
        logits[token] -= sampling.frequency_penalty * output.count(token)
        logits[token] -= sampling.presence_penalty * (token in output)
    return np.array(logits)


def distribution(logits, sampling, prompt=PROMPT, output=OUTPUT):
    """The exact probabilities of a row that draws."""
    logits = adjusted(logits, sampling, prompt, output)
    likelihood = np.exp((logits - logits.max()) / sampling.temperature)
    likelihood[likelihood < sampling.min_p] = 0
    order = np.argsort(-likelihood, kind="stable")
    if sampling.top_k:
        likelihood[order[sampling.top_k :]] = 0
    likelihood /= likelihood.sum()
    before = np.cumsum(likelihood[order]) - likelihood[order]
    likelihood[order[before >= sampling.top_p]] = 0
    return likelihood / likelihood.sum()


def assert_fits(counts, expected):
    """Pearson's chi-square: below the 99.9 % quantile (Wilson-Hilferty), and nothing where nothing may be."""
    assert counts[expected == 0].sum() == 0
    wanted = expected * counts.sum()
    usual = wanted >= 5
    observed = np.append(counts[usual], counts[~usual].sum())
    wanted = np.append(wanted[usual], wanted[~usual].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    if freedom:
        quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
        assert ((observed - wanted) ** 2 / wanted).sum() < quantile


BIAS = bias_fields({2: 3.5, 7: -100.0, 9: -1.0, 20: 2.0})
CASES = {
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "presence": {"presence_penalty": 1.5},
    "presence, negative": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.7},
    "frequency, negative": {"frequency_penalty": -0.5},
    "repetition": {"repetition_penalty": 1.6},
    "repetition below 1": {"repetition_penalty": 0.7},
    "bias": BIAS,
    "minimum length": {"min_tokens": len(OUTPUT) + 1, "barred_ids": (0, 7, 11)},
    "minimum length reached": {"min_tokens": len(OUTPUT), "barred_ids": (0, 7, 11)},
    "min_p, temperature": {"min_p": 0.2, "temperature": 1.8},
    "min_p, top_k, top_p": {"min_p": 0.05, "top_k": 9, "top_p": 0.85, "temperature": 1.4},
    "all penalties": {"presence_penalty": 0.4, "frequency_penalty": -0.3, "repetition_penalty": 1.3},
    "everything": {
        "temperature": 1.3,
        "top_k": 12,
        "top_p": 0.95,
        "min_p": 0.02,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        **BIAS,
        "min_tokens": 50,
        "barred_ids": (0, 5, 20),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_exact_distribution_beside_greedy_rows(case):
    """A few slots with the parameters, between greedy ones and plain ones, drawn from at many positions."""
    wanted = Sampling(seed=17, **CASES[case])
    rows = [wanted, Sampling(temperature=0.0), wanted, Sampling(seed=4), Sampling(0.0, frequency_penalty=1.0)]
    rows = rows * (DRAWS // 200)
    counts = np.zeros(VOCAB, int)
    state = adjustments_of(rows)
    plan = state.plan(np.arange(len(rows)))
    logits = torch.from_numpy(LOGITS).expand(len(rows), -1).clone()
    here = len(PROMPT) + len(OUTPUT)  # the position of the token to be sampled
    if plan is not None:
        state.apply(plan, logits, np.full(len(rows), here))
    columns = [
        np.array([getattr(row, name) for row in rows], dtype)
        for name, dtype in (("temperature", np.float32), ("top_k", int), ("top_p", float), ("min_p", float))
    ]
    drawing = make_plan(*columns, VOCAB, CPU)
    mine = np.array([row is wanted for row in rows])
    plain = np.array([row.seed == 4 for row in rows])
    others = np.zeros(VOCAB, int)
    for turn in range(100):
        numbers = uniforms(np.full(len(drawing.drawn), 17), turn * len(rows) + drawing.drawn)
        tokens = sample(logits, drawing, torch.from_numpy(numbers)).numpy()
        counts += np.bincount(tokens[mine], minlength=VOCAB)
        others += np.bincount(tokens[plain], minlength=VOCAB)
        assert set(tokens[1::5]) == {int(LOGITS.argmax())}
        assert set(tokens[4::5]) == {int(adjusted(LOGITS, rows[4], PROMPT, OUTPUT).argmax())}
    assert_fits(counts, distribution(LOGITS, wanted))
    assert_fits(others, distribution(LOGITS, Sampling()))


def sampling_strategy():
    return st.builds(
        lambda bias, **others: Sampling(**bias, **others),
        temperature=st.sampled_from([0.0, 0.7, 1.0, 1.6]),
        top_k=st.sampled_from([0, 1, 5]),
        top_p=st.sampled_from([0.3, 0.9, 1.0]),
        seed=st.integers(0, 2**63 - 1),
        min_p=st.sampled_from([0.0, 0.1]),
        presence_penalty=st.sampled_from([0.0, 0.0, 1.1, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.4]),
        bias=st.sampled_from([{}, BIAS]),
        min_tokens=st.sampled_from([0, 3, 40]),
        barred_ids=st.sampled_from([(), (0,), (3, 4, 5)]),
    )


properties = settings(derandomize=True, deadline=None, max_examples=60)


@properties
@given(st.lists(sampling_strategy(), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_a_row_gives_the_same_tokens_alone_and_in_any_company(rows, random):
    """For several steps on end, so that what was counted in one counts in the next."""
    order = list(range(len(rows)))
    random.shuffle(order)
    logits = torch.from_numpy(np.random.default_rng(len(rows)).normal(0, 2, (len(rows), VOCAB)).astype(np.float32))
    start = len(PROMPT) + len(OUTPUT)

    def run(which):
        chosen = [rows[i] for i in which]
        state = adjustments_of(chosen)
        return [tokens_of(chosen, logits[which], [start + i] * len(which), state) for i in range(4)]

    together = run(order)
    for place, row in enumerate(order):
        assert [tokens[place] for tokens in together] == [tokens[0] for tokens in run([row])]


@properties
@given(sampling_strategy().filter(lambda s: s.needs_past), st.integers(0, 6))
def test_a_return_after_a_preemption_goes_on_alike(sampling, cut):
    """Counting token by token on the device is the same as counting them all at the return."""
    greedy_one = msgspec.structs.replace(sampling, temperature=0.0)
    logits = torch.from_numpy(LOGITS)[None]
    whole, output = adjustments_of([greedy_one], PROMPT, []), []
    for at in range(10):
        output += tokens_of([greedy_one], logits, [len(PROMPT) + at], whole)
    assert output == reference(greedy_one, 10)
    again = adjustments_of([greedy_one], PROMPT, output[:cut])
    rest = [tokens_of([greedy_one], logits, [len(PROMPT) + at], again)[0] for at in range(cut, 10)]
    assert output[cut:] == rest


def reference(sampling, count):
    output = []
    for _ in range(count):
        output.append(int(adjusted(LOGITS, sampling, PROMPT, output).astype(np.float32).argmax()))
    return output


def test_places_are_used_again_and_only_by_slots_with_penalties():
    state = Adjustments(40, VOCAB, CPU)
    penalised, plain = Sampling(presence_penalty=1.0), Sampling(**BIAS)
    for turn in range(30):
        slots = range(turn % 3, 40, 3)
        state.admit([Admit(slot, 0, penalised, np.array([1, 2], np.int32).tobytes(), 1) for slot in slots])
        state.admit([Admit(slot, 0, plain, b"", 1) for slot in slots])
    assert len(state._past_NV) <= 16
    assert state.plan(np.arange(40)) is not None
    state.admit([Admit(slot, 0, Sampling(temperature=0.0), b"", 1) for slot in range(40)])
    assert state.plan(np.arange(40)) is None
    state.reset()
    assert len(state._past_NV) == 0


def test_a_new_request_in_a_slot_has_no_past_of_the_old_one():
    strong = Sampling(0.0, frequency_penalty=2.0)
    logits = torch.from_numpy(LOGITS)[None]
    state = adjustments_of([strong], [1], [])
    first = [tokens_of([strong], logits, [1 + i], state)[0] for i in range(5)]
    state.admit([Admit(0, 0, strong, np.array([1], np.int32).tobytes(), 1)])
    assert first == [tokens_of([strong], logits, [1 + i], state)[0] for i in range(5)]
    assert len(set(first)) > 1
