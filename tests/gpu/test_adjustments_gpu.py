"""Bias, minimum length and penalties on the GPU give what they give on the CPU, step by step."""

import numpy as np
import torch

from nmoe.messages import Admit, Sampling
from nmoe.worker.adjustments import Adjustments
from tests.test_adjustments import BIAS, LOGITS, OUTPUT, PROMPT, VOCAB

SAMPLINGS = [
    Sampling(presence_penalty=1.5, frequency_penalty=-0.4),
    Sampling(0.0),
    Sampling(repetition_penalty=1.6, **BIAS),
    Sampling(min_tokens=len(OUTPUT) + 2, barred_ids=(0, 7, 11)),
    Sampling(frequency_penalty=0.7, repetition_penalty=0.8, min_tokens=3, barred_ids=(2,), **BIAS),
]


def run(device):
    """The logits of each step, and the counts at the end; every step 'samples' other tokens."""
    state = Adjustments(len(SAMPLINGS), VOCAB, device)
    past = np.array(PROMPT + OUTPUT, np.int32).tobytes()
    state.admit(
        [Admit(slot, 0, one, past if one.needs_past else b"", len(PROMPT)) for slot, one in enumerate(SAMPLINGS)]
    )
    slots = np.arange(len(SAMPLINGS))[::-1].copy()
    plan = state.plan(slots)
    steps = []
    for at in range(4):
        logits = torch.from_numpy(LOGITS).to(device).repeat(len(SAMPLINGS), 1)
        state.apply(plan, logits, np.full(len(slots), len(PROMPT) + len(OUTPUT) + at))
        steps.append(logits.cpu())
        state.count(plan, torch.arange(len(slots), device=device) * 3 + at)
    return torch.stack(steps), state._past_NV.cpu()


def test_the_gpu_adjusts_as_the_cpu_does():
    expected_logits, expected_past = run(torch.device("cpu"))
    logits, past = run(torch.device("cuda"))
    torch.testing.assert_close(logits, expected_logits)
    assert torch.equal(past, expected_past) and past.any()
