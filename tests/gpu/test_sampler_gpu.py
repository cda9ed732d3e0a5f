"""The sampling kernels draw what the reference draws, from the same numbers, in any company."""

import numpy as np
import pytest
import torch

from nmoe.messages import Admit, Sampling
from nmoe.worker.inputs import Layout
from nmoe.worker.sampler import NO_TOKEN
from nmoe.worker.samplers import GPUSampler, ReferenceSampler
from nmoe.worker.slots import DeviceSlots, SlotTable

GPU = torch.device("cuda")
SAMPLINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, min_p=0.02),
    Sampling(temperature=2.0, top_k=1),
    Sampling(temperature=1.3, top_k=50),
    Sampling(temperature=0.9, top_p=0.9),
    Sampling(temperature=1.1, top_k=200, top_p=0.7),
    Sampling(temperature=0.8, top_p=0.01),
    Sampling(temperature=1.5, top_k=10**9, top_p=0.95, min_p=0.001),
    Sampling(temperature=1e-8, top_k=3),
]


def both(logits, samplings, ends, device):
    """Tokens, log-probabilities and last tokens by the reference and by the kernels."""
    rows, vocab = logits.shape
    results = []
    for kind, where in ((ReferenceSampler, torch.device("cpu")), (GPUSampler, device)):
        table, slots = SlotTable(rows + 3, 1, 32, 1), DeviceSlots(rows + 3, 1, 1, where)
        sampler = kind(table, slots, vocab)
        order = np.random.default_rng(0).permutation(rows + 3)[:rows]
        admits = [Admit(int(slot), 0, sampling) for slot, sampling in zip(order, samplings, strict=True)]
        table.admit(admits)
        sampler.admit(admits)
        sampler.take_rows(order)
        layout = Layout(rows, rows)
        words = np.zeros(layout.size, np.int32)
        parts = layout.parts(words)
        parts.sampling_slots[:], parts.sampling_ends[:] = order, ends
        tokens, logprobs = sampler.sample(logits.to(where), layout.parts(torch.from_numpy(words).to(where)))
        logprobs = torch.zeros(rows) if logprobs is None else logprobs.cpu()
        results.append((tokens.cpu().long(), logprobs, slots.last_S.cpu()[order].long()))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "spread"), [(1000, 1.0), (16160, 0.5), (163840, 0.6), (50000, 4.0)])
def test_draws_are_the_reference_s(dtype, vocab, spread):
    """Exponentials differ in their last bit between devices, so a draw near a token's edge may fall beside it."""
    repeats = 12
    generator = torch.Generator().manual_seed(vocab)
    samplings = [
        Sampling(one.temperature, one.top_k, one.top_p, seed=nth << 33 | 5, min_p=one.min_p)
        for nth in range(repeats)
        for one in SAMPLINGS
    ]
    logits = (torch.randn(len(samplings), vocab, generator=generator) * spread).to(dtype)
    logits[:, ::7] = logits[:, :1]  # equals
    ends = np.arange(len(samplings)) * 11
    (expected, logprobs, _), (tokens, actual, last) = both(logits, samplings, ends, GPU)
    same = tokens == expected
    assert same.double().mean() > 0.97, (tokens[~same], expected[~same])
    torch.testing.assert_close(actual[same], logprobs[same], rtol=1e-4, atol=1e-4)
    assert torch.equal(last, tokens)


def test_a_row_does_not_depend_on_its_company():
    logits = torch.randn(40, 30000, device=GPU).bfloat16()
    samplings = [SAMPLINGS[row % len(SAMPLINGS)] for row in range(40)]
    ends = np.arange(40)
    whole = both(logits, samplings, ends, GPU)[1][0]
    for row in (1, 5, 6, 38):
        assert both(logits[row : row + 1], samplings[row : row + 1], ends[row : row + 1], GPU)[1][0] == whole[row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [slice(None), slice(0, None, 3), slice(4500, 4501)])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_give_no_token(wrong, places, dtype):
    logits = torch.randn(len(SAMPLINGS), 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, places] = wrong
    (expected, _, _), (tokens, _, last) = both(logits, SAMPLINGS, np.arange(len(SAMPLINGS)), GPU)
    masked = wrong == -torch.inf and places != slice(None)  # some tokens may be
    assert (expected >= 0).all() if masked else (expected == NO_TOKEN).all()
    assert torch.equal(tokens >= 0, expected >= 0)
    assert ((last >= 0) & (last < 5000)).all()  # the next step may be on its way with it
