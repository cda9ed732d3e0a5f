"""Steps that are replayed say what they would say kernel by kernel: the runner and its graphs, where a replay is the
captured step over again, with its results in the same places."""

import contextlib
import types
from random import Random

import pytest
import torch

from nmoe.worker.batch import Batch
from nmoe.worker.graphs import StepGraph
from nmoe.worker.samplers import GPUSampler
from tests.test_runner import SLOTS, Driver, Request, Toy, _expected, _logits, _prompt


class Captured(Toy):
    """A toy that takes a captured step's rows from the device; those of nobody are on the reserved page."""

    dtype = torch.float32

    def forward(self, batch, cache, numerics):
        if batch.decodes_R is None:
            return super().forward(batch, cache, numerics)
        real = int((batch.pages_RP[:, 0] < cache.num_pages).sum())
        assert (batch.pages_RP[real:] == cache.num_pages).all() and not batch.decodes_R[real:].any()
        rows = Batch(
            ids_T=batch.ids_T[:real],
            positions_T=batch.positions_T[:real],
            write_T=batch.write_T[:real],
            starts=list(range(real + 1)),
            contexts=(batch.decodes_R[:real] + 1).tolist(),
            pages_RP=batch.pages_RP[:real],
            num_decodes=real,
        )
        hidden_TD = super().forward(rows, cache, numerics)
        return torch.cat((hidden_TD, hidden_TD.new_zeros(len(batch.ids_T) - real, 1)))

    def logits_into(self, hidden_TD, out_TV, numerics):
        out_TV.copy_(_logits(hidden_TD[:, 0]))


class Largest(GPUSampler):
    """Its kernels are not for the CPU."""

    def sample_any(self, logits_SV, parts, *, simple):
        tokens_S = logits_SV.argmax(-1).int()
        self._slots.remember(parts.sampling_slots[: len(tokens_S)], tokens_S)
        return tokens_S, torch.zeros(len(tokens_S))


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(f"{Driver.__module__}.Toy", Captured)
    monkeypatch.setattr("nmoe.worker.runner.ReferenceSampler", Largest)
    graph = types.SimpleNamespace(capture_begin=lambda pool: None, capture_end=lambda: None)
    stream = types.SimpleNamespace(synchronize=lambda: None)
    for name, value in {"CUDAGraph": graph, "graph_pool_handle": 0, "Stream": stream, "synchronize": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    driver, replayed = Driver(), []

    @torch.inference_mode()
    def replay(graph):
        results = "hidden_TD", "logits_RV", "tokens_R", "logprobs_R"
        places = {name: getattr(graph, name) for name in results}
        driver.runner._graphs._step(graph)
        for name, place in places.items():
            setattr(graph, name, place.copy_(getattr(graph, name)))
        replayed.append(graph.layout.tokens)

    monkeypatch.setattr(StepGraph, "replay", replay)
    driver.runner.capture(SLOTS, 1)
    driver.replayed = replayed
    return driver


def test_rows_come_and_go_on_and_leave(driver):
    random = Random(11)
    waiting = [(Request(_prompt(random, random.randint(1, 9))), random.randint(1, 30)) for _ in range(30)]
    running, done = [], []
    while waiting or running:
        while waiting and len(running) < SLOTS and random.random() < 0.1:
            request, count = waiting.pop()
            driver.run([(request, request.prompt_len)], random)
            running.append((request, count))
        running = [item for item in running if len(item[0].output) < item[1] or done.append(item)]
        for request, _ in done:
            if request.slot is not None:
                driver.finish(request)
        driver.run([(request, 1) for request, _ in running], random)
    for request, count in done:
        assert request.output == _expected(request.ids[: request.prompt_len], count)
    assert set(driver.replayed) >= {1, 2, 4, SLOTS} and driver.deltas > 50


def test_launches_are_the_same_within_inference_mode_and_without(driver):
    random = Random(12)
    request = Request(_prompt(random, 5))
    driver.run([(request, 5)], random)
    for _ in range(5):
        driver.run([(request, 1)], random)
    with torch.inference_mode():
        for _ in range(15):
            driver.run([(request, 1)], random)
    for _ in range(15):
        driver.run([(request, 1)], random)
    assert request.output == _expected(request.ids[:5], 36)
    assert len(driver.replayed) == 35
