"""Requests that return something, for a Runner without a scheduler: on any device, in whatever order a test wants."""

import numpy as np

from nmoe.arena import ArenaLayout
from nmoe.messages import (
    CHANNEL_DECODE,
    CHANNEL_PREFILL,
    ROW_HAS_IDS,
    ROW_RETURNS,
    ROW_SAMPLES,
    Admit,
    Sampling,
    Step,
)
from nmoe.outputs import Returns, read_records, unpack
from nmoe.profiles import Numerics
from nmoe.worker.blocks import Arena
from nmoe.worker.cache import make_cache
from nmoe.worker.runner import Runner

NOTHING = Returns()
GREEDY = Sampling(temperature=0.0)


class Request:
    """A request as its scheduler and its frontend see it."""

    def __init__(self, prompt, returns=NOTHING, sampling=GREEDY, cached=0, pages=()):
        self.ids, self.prompt_len = list(prompt), len(prompt)
        self.returns, self.sampling = returns, sampling
        self.cached, self.pages = cached, list(pages)
        self.computed = min(cached, len(prompt) - 1)
        self.returned, self.slot, self.sampled = 0, None, False
        self.samples = True
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

    def __init__(self, engine, *, num_slots, max_seq_len, cells=64, rank=0):
        """`engine`: configuration, checkpoint and model. Two ranks have `cells` each."""
        config, checkpoint, model = engine
        vocab_size = checkpoint.architecture.vocab_size
        self.page_size = config.engine.page_size
        self.cache = make_cache(config, checkpoint, model.device)
        self.layout = ArenaLayout(2, cells, vocab_size)
        self.memory = self.layout.make()
        self.arena = np.frombuffer(self.memory, np.float32).reshape(-1, vocab_size)
        self.runner = Runner(
            model,
            self.cache,
            num_slots=num_slots,
            max_seq_len=max_seq_len,
            arena=Arena(self.layout, self.memory, rank),
        )
        self.free_pages, self.free_slots = list(range(config.engine.num_pages)), list(range(num_slots))
        self.free_cells = list(range(cells * rank, cells * rank + cells))
        self.step_id = 0

    def free(self, request):
        self.free_slots.append(request.slot)
        self.free_pages += request.pages[request.cached // self.page_size :]
        request.slot, request.pages = None, []

    def run(self, work, numerics=Numerics.FAST):
        """One step of [(request, count)], decode rows first."""
        admits, pages, rows, ids, cells = [], [], [], [], []
        for request, count in work:
            end = request.computed + count
            flags = ROW_RETURNS if request.returns else 0
            flags |= 0 if request.continues else ROW_HAS_IDS
            flags |= ROW_SAMPLES if end == len(request.ids) and request.samples else 0
            if request.slot is None:
                request.slot = self.free_slots.pop()
                admits.append(self._admit(request))
                pages += [(request.slot, page) for page in request.pages]
            while len(request.pages) * self.page_size < end:
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
        self.book(work, rows, launched)

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

    def book(self, work, rows, launched):
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
    """A Step of these rows, or of one row that goes on where `rows` is None."""
    decodes = rows is None or not any(row[3] & ROW_HAS_IDS for row in rows)
    return Step(
        generation=1,
        step_id=step_id,
        numerics=numerics,
        channel=CHANNEL_DECODE if decodes else CHANNEL_PREFILL,
        num_tokens=1 if rows is None else sum(row[2] for row in rows),
        rows=None if rows is None else np.array(rows, np.int32).reshape(-1, 4).tobytes(),
        ids=np.array(ids, np.int32).tobytes(),
        pages=np.array(pages, np.int32).reshape(-1, 2).tobytes(),
        admits=tuple(admits),
        cells=np.array(cells, np.int32).tobytes(),
    )


def told(request):
    """All that came back of a request, NaN as a number."""
    records = [(r.logprob, r.rank, *r.top_ids, *r.top_logprobs, *r.scored) for r in request.records]
    drawn = np.nan_to_num([record.drawn_logprob for record in request.records], nan=1.0).tolist()
    return request.ids, records, drawn, request.routing, np.array(request.cells).tobytes()


def drawn_logprob(logits_V, sampling, ids, prompt_len, token):
    """From the definition, in float64: of the distribution after everything that the sampling asks for."""
    logits_V = logits_V.double().numpy().copy()
    output = ids[prompt_len:]
    for past in set(ids):
        logits_V[past] *= sampling.repetition_penalty ** (-1 if logits_V[past] > 0 else 1)
    for past in set(output):
        logits_V[past] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(past)
    for biased, bias in sampling.logit_bias.items():
        logits_V[biased] += bias
    share_V = np.exp((logits_V - logits_V.max()) / sampling.temperature)
    share_V[share_V < sampling.min_p] = 0
    order = (-share_V).argsort(kind="stable")
    share_V[order[sampling.top_k or len(order) :]] = 0
    before = share_V[order].cumsum() - share_V[order]
    share_V[order[before >= sampling.top_p * share_V.sum()]] = 0
    return np.log(share_V[token] / share_V.sum())
