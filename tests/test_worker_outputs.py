"""What comes back besides tokens, from Steps with the real model: transformers' logits are the oracle."""

from random import Random

import numpy as np
import pytest
import torch

from nmoe.arena import ArenaLayout
from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Engine, Model, Parallel
from nmoe.messages import CHANNEL_PREFILL, ROW_HAS_IDS, ROW_RETURNS, ROW_SAMPLES, Admit, Sampling, Step
from nmoe.outputs import Returns, read_records, unpack
from nmoe.profiles import Numerics
from nmoe.worker.blocks import Arena
from nmoe.worker.cache import make_cache
from nmoe.worker.model import load_model
from nmoe.worker.runner import Runner
from tests.checkpoints import make_checkpoint

PAGE, PAGES, SLOTS, MAX_SEQ_LEN = 4, 120, 8, 80
VOCAB = 512
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0)
NOTHING = Returns()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Logits of one digit before the point: so 1e-5 is not their float32's last bit.
    return make_checkpoint(tmp_path_factory.mktemp("model"), initializer_range=0.1)


@pytest.fixture(scope="module")
def oracle(folder):
    from transformers import DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


@pytest.fixture(scope="module")
def engine(folder):
    """The model and its configuration."""
    config = Config(
        model=Model(path=str(folder)),
        parallel=Parallel(world_size=1, device="cpu"),
        engine=Engine(page_size=PAGE, num_pages=PAGES, max_batch_size=SLOTS),
    )
    checkpoint = open_checkpoint(config)
    return config, checkpoint, load_model(checkpoint, config, 0, CPU, lambda *_: None)


class Request:
    """A request as its scheduler and its frontend see it."""

    def __init__(self, prompt, returns=NOTHING, sampling=GREEDY, cached=0, pages=()):
        self.ids, self.prompt_len = list(prompt), len(prompt)
        self.returns, self.sampling = returns, sampling
        self.cached, self.pages = cached, list(pages)
        self.computed = min(cached, len(prompt) - 1)
        self.returned, self.slot, self.sampled = 0, None, False
        self.records, self.routing, self.cells = [], b"", []

    @property
    def output(self):
        return self.ids[self.prompt_len :]

    @property
    def continues(self):
        """Whether its next token's id is only known to the device."""
        return self.slot is not None and self.sampled

    def preempt(self, driver):
        driver.free(self)
        self.computed = self.cached = 0
        self.sampled = False


class Driver:
    """The least scheduler there can be: it is told which requests a step computes, and books what comes back."""

    def __init__(self, engine, rank=0):
        config, checkpoint, model = engine
        self.cache = make_cache(config, checkpoint, CPU)
        self.layout = ArenaLayout(2, 64, VOCAB)
        self.memory = self.layout.make()
        self.arena = np.frombuffer(self.memory, np.float32).reshape(-1, VOCAB)
        self.runner = Runner(
            model,
            self.cache,
            num_slots=SLOTS,
            max_seq_len=MAX_SEQ_LEN,
            arena=Arena(self.layout, self.memory, rank),
        )
        self.free_pages, self.free_slots = list(range(PAGES)), list(range(SLOTS))
        self.free_cells = list(range(64 * rank, 64 * rank + 64))
        self.step_id = 0

    def free(self, request):
        self.free_slots.append(request.slot)
        self.free_pages += request.pages[request.cached // PAGE :]
        request.slot, request.pages = None, []

    def run(self, work, numerics=Numerics.FAST):
        """One step of [(request, count)], decode rows first."""
        admits, pages, rows, ids, cells = [], [], [], [], []
        for request, count in work:
            end = request.computed + count
            flags = ROW_RETURNS if request.returns else 0
            flags |= 0 if request.continues else ROW_HAS_IDS
            flags |= ROW_SAMPLES if end == len(request.ids) else 0
            if request.slot is None:
                request.slot = self.free_slots.pop()
                admits.append(self._admit(request))
                pages += [(request.slot, page) for page in request.pages]
            while len(request.pages) * PAGE < end:
                request.pages.append(self.free_pages.pop())
                pages.append((request.slot, request.pages[-1]))
            ids += request.ids[request.computed : end] if flags & ROW_HAS_IDS else []
            rows.append((request.slot, request.computed, count, flags))
            if request.returns.logits:
                begin = max(request.computed, request.returned)
                last = min(end, request.prompt_len - 1)
                told = max(0, last - begin) if request.returns.prompt else 0
                cells += [self.free_cells.pop() for _ in range(told + bool(flags & ROW_SAMPLES))]
        launched = self.runner.launch(step(self.step_id, rows, ids, pages, admits, cells, numerics))
        self.step_id += 1
        self._book(work, rows, launched)

    def _admit(self, request):
        past = np.array(request.ids, np.int32).tobytes()
        return Admit(
            request.slot,
            request.cached,
            request.sampling,
            past,
            request.prompt_len,
            request.returns,
            request.returned,
        )

    def _book(self, work, rows, launched):
        tokens = np.frombuffer(launched.tokens(), np.int32).tolist()
        blocks, sizes = launched.blocks()
        blocks, sizes = memoryview(blocks), np.frombuffer(sizes, np.int32).tolist()
        for (request, count), (*_, flags) in zip(work, rows, strict=True):
            request.computed += count
            if flags & ROW_SAMPLES:
                request.ids.append(tokens.pop(0))
                request.sampled = True
            if flags & ROW_RETURNS:
                size = sizes.pop(0)
                self._read(request, blocks[:size])
                blocks = blocks[size:]
        assert not tokens and not sizes and not blocks

    def _read(self, request, data):
        block = unpack(data, request.returns)
        cells = block.cells.tolist()
        request.records += read_records(block.records, request.returns)
        request.routing += bytes(block.routing)
        request.cells += [self.arena[cell].copy() for cell in cells]
        self.free_cells += cells
        request.returned = max(request.returned, request.computed)


def step(step_id, rows, ids=(), pages=(), admits=(), cells=(), numerics=Numerics.FAST):
    return Step(
        generation=1,
        step_id=step_id,
        numerics=numerics,
        channel=CHANNEL_PREFILL,
        num_tokens=1000,
        rows=None if rows is None else np.array(rows, np.int32).reshape(-1, 4).tobytes(),
        ids=np.array(ids, np.int32).tobytes(),
        pages=np.array(pages, np.int32).reshape(-1, 2).tobytes(),
        admits=tuple(admits),
        cells=np.array(cells, np.int32).tobytes(),
    )


def prompt_of(random, length):
    return [random.randrange(VOCAB) for _ in range(length)]


def reference(oracle, ids):
    """Logits of all positions, float32 [T, V]."""
    with torch.inference_mode():
        return oracle(torch.tensor([ids])).logits[0].float()


def check_records(request, logits_TV, first_told):
    """That there is one record for each token from position `first_told` on, and that it is right."""
    returns, logprobs_TV = request.returns, logits_TV.log_softmax(-1)
    assert len(request.records) == len(request.ids) - first_told
    for place, record in zip(range(first_told, len(request.ids)), request.records, strict=True):
        token, logits_V, logprobs_V = request.ids[place], logits_TV[place - 1], logprobs_TV[place - 1]
        assert abs(record.logprob - logprobs_V[token]) < 1e-5
        assert record.rank == (logits_V > logits_V[token]).sum() + 1
        best = logprobs_V.topk(returns.top_k)
        assert list(record.top_ids) == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(record.top_logprobs), best.values, rtol=0, atol=1e-5)
        scored = logprobs_V[list(returns.scored_ids)]
        torch.testing.assert_close(torch.tensor(record.scored), scored, rtol=0, atol=1e-5)
        assert np.isnan(record.drawn_logprob) == (place < request.prompt_len)


WISHES = [
    Returns(),
    Returns(records=True),
    Returns(records=True, top_k=128, prompt=True),
    Returns(records=True, top_k=3, scored_ids=(7, 500, 7, 0)),
    Returns(records=True, prompt=True, scored_ids=(1,)),
    Returns(records=True, top_k=2, prompt=True, logits=True),
    Returns(records=True, logits=True),
]


@pytest.mark.parametrize("numerics", Numerics)
@pytest.mark.parametrize("seed", range(3))
def test_records_are_transformers_in_any_company_and_chunks(engine, oracle, seed, numerics):
    random, driver = Random(seed), Driver(engine)
    waiting = [Request(prompt_of(random, random.randint(1, 20)), wish) for wish in WISHES + WISHES[1:]]
    random.shuffle(waiting)
    every, running = list(waiting), []
    while waiting or running:
        while waiting and len(running) < SLOTS:
            running.append(waiting.pop())
        chosen = [request for request in running if random.random() < 0.8]
        chosen.sort(key=lambda request: not request.continues)
        driver.run(
            [(r, 1 if r.continues else random.randint(1, min(9, len(r.ids) - r.computed))) for r in chosen], numerics
        )
        for request in list(running):
            if len(request.output) == 6:
                running.remove(request)
                driver.free(request)
            elif request.slot is not None and random.random() < 0.1:
                request.preempt(driver)
    for request in every:
        logits_TV = reference(oracle, request.ids)
        if request.returns:
            check_records(request, logits_TV, 1 if request.returns.prompt else request.prompt_len)
        if request.returns.logits:
            assert len(request.cells) == len(request.records)
            told = logits_TV[len(logits_TV) - 1 - len(request.cells) : -1]
            torch.testing.assert_close(torch.tensor(np.array(request.cells)), told, rtol=0, atol=1e-5)
    assert sorted(driver.free_cells) == list(range(64))
