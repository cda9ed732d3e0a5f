"""Steps become the right batches: a toy model that reads nothing but the cache notices every wrong page or position."""

import types
from random import Random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Engine, Model, Parallel
from nmoe.config_json import read_architecture
from nmoe.errors import NmoeError
from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL, ROW_HAS_IDS, ROW_SAMPLES, Admit, Sampling, Step
from nmoe.profiles import Numerics
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.cache import make_cache
from nmoe.worker.graphs import StepGraphs
from nmoe.worker.model import load_model
from nmoe.worker.process import warm_up, warm_up_prefills
from nmoe.worker.rdep import OneRank
from nmoe.worker.runner import Runner
from nmoe.worker.slots import MalformedStep
from tests.checkpoints import make_checkpoint

VOCAB = 50
PAGE = 4
PAGES = 60
SLOTS = 6
MAX_SEQ_LEN = 48
GREEDY = Sampling(temperature=0.0)
CPU = torch.device("cpu")


class Toy:
    """Next-token logits are a function of all earlier ids, which it can only know from the cache."""

    def __init__(self):
        self.exchange = OneRank()
        self.architecture = types.SimpleNamespace(vocab_size=VOCAB)
        self.device = CPU
        self.batches = []
        self.classes = []

    def forward(self, batch: Batch, cache: KVCache, numerics):
        self.batches.append(batch)
        self.classes.append(numerics)
        rows = cache.rows_LNSC[0].flatten(0, 1)
        rows[batch.write_T] = torch.stack((batch.ids_T, batch.positions_T), 1).double()
        offsets = torch.arange(cache.page_size)
        hidden = [torch.empty(0, 1, dtype=torch.float64)]
        for row, context in enumerate(batch.contexts):
            count = batch.starts[row + 1] - batch.starts[row]
            assert count == 1 or row >= batch.num_decodes
            pages = batch.pages_RP[row]
            used = -(-context // cache.page_size)
            assert (pages[:used] < cache.num_pages).all()
            seen = rows[(pages[:, None] * cache.page_size + offsets).flatten()[:context]]
            assert seen[:, 1].tolist() == list(range(context)), "cache rows of other positions, or never written"
            assert batch.positions_T[batch.starts[row] : batch.starts[row + 1]].tolist() == [*range(context)][-count:]
            hidden.append(_digests(seen[:, 0])[-count:, None])
        return torch.cat(hidden)

    def logits(self, hidden_SD, numerics):
        return _logits(hidden_SD[:, 0])


def _digests(ids):
    """One number per prefix of `ids`, which depends on the order."""
    return ((ids + 1) * torch.arange(1, len(ids) + 1)).cumsum(0) % 1009


def _logits(digests):
    return (torch.sin(digests[:, None] * torch.arange(1, VOCAB + 1) * 0.37) * 4).float()


def _expected(ids, count):
    """The greedy continuation of `ids`, from the definition."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(_logits(_digests(torch.tensor(ids, dtype=torch.float64))[-1:]).argmax()))
    return ids[-count:]


def _runner(num_pages=PAGES):
    cache = KVCache(torch.full((1, num_pages + 1, PAGE, 2), torch.nan, dtype=torch.float64))
    toy = Toy()
    return Runner(toy, cache, num_slots=SLOTS, max_seq_len=MAX_SEQ_LEN), toy


def _step(step_id, rows, ids=(), pages=(), admits=(), num_tokens=1000, channel=None):
    if channel is None:
        channel = CHANNEL_PREFILL if rows is None or any(row[3] & ROW_HAS_IDS for row in rows) else CHANNEL_DECODE
    return Step(
        generation=1,
        step_id=step_id,
        numerics=Numerics.FAST,
        channel=channel,
        num_tokens=num_tokens,
        rows=None if rows is None else np.array(rows, np.int32).reshape(-1, 4).tobytes(),
        ids=np.array(ids, np.int32).tobytes(),
        pages=np.array(pages, np.int32).tobytes(),
        admits=tuple(admits),
    )


def _tokens(launched):
    assert launched.ready()
    return np.frombuffer(launched.tokens(), np.int32).tolist()


class Request:
    """One request as a scheduler sees it."""

    def __init__(self, prompt, sampling=GREEDY, cached=0, pages=()):
        self.ids = list(prompt)
        self.prompt_len = len(prompt)
        self.sampling = sampling
        self.cached = cached
        self.computed = min(cached, len(prompt) - 1)
        self.pages = list(pages)
        self.slot = None

    @property
    def output(self):
        return self.ids[self.prompt_len :]

    @property
    def decodes(self):
        return self.computed >= self.prompt_len


class Driver:
    """The least scheduler there can be: it is told which requests a step computes, and books the results."""

    def __init__(self):
        self.runner, self.toy = _runner()
        self.free_pages = list(range(PAGES))
        self.free_slots = list(range(SLOTS))
        self.step_id = 0
        self.going_on = None
        self.deltas = 0

    def run(self, work, random, ahead=0):
        """One step: `work` is [(request, count)]. Each request gets `ahead` pages more than it needs."""
        work = sorted(work, key=lambda item: not item[0].decodes)
        admits, pages, rows, ids = [], [], [], []
        for request, count in work:
            if request.slot is None:
                request.slot = self.free_slots.pop(random.randrange(len(self.free_slots)))
                admits.append(Admit(request.slot, request.cached, request.sampling))
                pages += [(nth, request.slot, page) for nth, page in enumerate(request.pages)]
            first, end = request.computed, request.computed + count
            while len(request.pages) < min(-(-end // PAGE) + ahead, MAX_SEQ_LEN // PAGE):
                request.pages.append(self.free_pages.pop(random.randrange(len(self.free_pages))))
                pages.append((len(request.pages), request.slot, request.pages[-1]))
            flags = 0 if request.decodes else ROW_HAS_IDS
            ids += request.ids[first:end] if flags else []
            rows.append((request.slot, first, count, flags | (ROW_SAMPLES if end >= request.prompt_len else 0)))
        pages = [assigned for _, *assigned in sorted(pages)]  # the slots' pages mixed, each slot's in order
        channel, num_tokens = (CHANNEL_PREFILL, 1000) if ids else (CHANNEL_DECODE, max(1, len(rows)))
        going_on = self.going_on == rows
        step = _step(self.step_id, None if going_on else rows, ids, pages, admits, num_tokens, channel)
        self.step_id += 1
        self.deltas += going_on
        self.going_on = [(slot, first + count, count, flags) for slot, first, count, flags in rows]
        tokens = iter(_tokens(self.runner.launch(step)))
        for request, count in work:
            request.computed += count
            if request.computed >= request.prompt_len:
                request.ids.append(next(tokens))
        assert next(tokens, None) is None

    def finish(self, request):
        """Free the slot and the pages."""
        self.free_slots.append(request.slot)
        self.free_pages += request.pages[request.cached // PAGE :]
        request.slot = None


def _prompt(random, length):
    return [random.randrange(VOCAB) for _ in range(length)]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 2))
def test_any_order_of_chunks_and_decodes_continues_every_prompt(seed, ahead):
    driver, random = Driver(), Random(seed)
    waiting = [(Request(_prompt(random, random.randint(1, 20))), random.randint(1, 12)) for _ in range(9)]
    running, done = [], []
    while waiting or running:
        while waiting and len(running) < SLOTS and random.random() < 0.5:
            running.append(waiting.pop())
        chosen = [item for item in running if random.random() < 0.9]
        driver.run(
            [(r, 1 if r.decodes else random.randint(1, r.prompt_len - r.computed)) for r, _ in chosen], random, ahead
        )
        for item in [item for item in running if len(item[0].output) == item[1]]:
            running.remove(item)
            driver.finish(item[0])
            done.append(item)
    for request, count in done:
        assert request.output == _expected(request.ids[: request.prompt_len], count)


def test_rows_that_go_on_need_no_rows():
    random = Random(3)
    driver = Driver()
    requests = [Request(_prompt(random, length)) for length in (1, 3, 9)]
    driver.run([(request, request.prompt_len) for request in requests], random)
    for _ in range(20):
        driver.run([(request, 1) for request in requests], random)
    assert driver.deltas == 19
    for request in requests:
        assert request.output == _expected(request.ids[: request.prompt_len], 21)


def test_prefill_chunks_go_on_too():
    random = Random(4)
    driver = Driver()
    request = Request(_prompt(random, 17))
    for _ in range(4):
        driver.run([(request, 4)], random)
    assert driver.deltas == 3
    driver.run([(request, 1)], random)
    assert request.output == _expected(request.ids[:17], 1)


def test_two_steps_are_launched_before_the_first_result_is_read():
    runner, _ = _runner()
    first = runner.launch(_step(0, [(2, 0, 3, 3)], [5, 6, 7], [(2, 9), (2, 4)], [Admit(2, 0, GREEDY)]))
    second = runner.launch(_step(1, [(2, 3, 1, ROW_SAMPLES)]))
    third = runner.launch(_step(2, None))
    assert [*_tokens(first), *_tokens(second), *_tokens(third)] == _expected([5, 6, 7], 3)


@pytest.mark.parametrize("prompt_len", [8, 9, 11])
def test_shared_pages_are_read_and_never_written(prompt_len):
    """8 of the prompt's tokens are cached; a fully cached prompt computes its last token again, to sample from it."""
    random = Random(5)
    driver = Driver()
    prompt = _prompt(random, prompt_len)
    owner = Request(prompt)
    driver.run([(owner, prompt_len)], random)
    sharer = Request(prompt, cached=8, pages=owner.pages[:2])
    seen = len(driver.toy.batches)
    driver.run([(owner, 1), (sharer, prompt_len - sharer.computed)], random)
    for _ in range(5):
        driver.run([(owner, 1), (sharer, 1)], random)
    assert sharer.output == _expected(prompt, 6)
    written = torch.cat([batch.write_T for batch in driver.toy.batches[seen:]]) // PAGE
    assert not set(written.tolist()) & set(owner.pages[:2])


def test_a_slot_forgets_its_last_request():
    random = Random(6)
    driver = Driver()
    driver.free_slots = [3]
    for length in (15, 2, 7):
        request = Request(_prompt(random, length))
        driver.run([(request, length)], random, ahead=3)
        driver.run([(request, 1)], random)
        assert request.output == _expected(request.ids[:length], 2)
        driver.finish(request)


def test_a_seed_repeats_its_tokens_in_any_slot_and_company():
    sampling = Sampling(temperature=1.3, top_k=20, top_p=0.95, seed=77)
    outputs = []
    for company in (0, 2, 4):
        random = Random(company)
        driver = Driver()
        request = Request(range(10, 15), sampling)
        others = [Request(_prompt(random, 5), Sampling(0.8, seed=i) if i % 2 else GREEDY) for i in range(company)]
        requests = [*others, request]
        random.shuffle(requests)
        driver.run([(each, 5) for each in requests], random)
        for _ in range(15):
            driver.run([(each, 1) for each in requests], random)
        outputs.append(request.output)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(set(outputs[0])) > 3


def test_positions_of_a_request_draw_apart():
    """A model that always says the same draws different tokens at different positions."""
    runner, toy = _runner()
    toy.logits = lambda hidden_SD, numerics: torch.zeros(len(hidden_SD), VOCAB)
    admit = Admit(0, 0, Sampling(seed=1))
    tokens = _tokens(runner.launch(_step(0, [(0, 0, 1, 3)], [5], [(0, page) for page in range(12)], [admit])))
    tokens += _tokens(runner.launch(_step(1, [(0, 1, 1, ROW_SAMPLES)])))
    for step_id in range(2, 40):
        tokens += _tokens(runner.launch(_step(step_id, None)))
    assert len(set(tokens)) > 20


def test_an_idle_rank_goes_through_the_layers():
    runner, toy = _runner()
    for step_id, rows in ((0, []), (1, None)):
        assert _tokens(runner.launch(_step(step_id, rows))) == []
    assert [(len(batch.ids_T), batch.starts, batch.contexts) for batch in toy.batches] == [(0, [0], [])] * 2


def test_one_token_rows_are_decodes_whatever_brings_their_ids():
    runner, toy = _runner()
    rows = [(0, 0, 1, 3), (1, 0, 1, 3), (2, 0, 2, 3), (3, 0, 1, 3)]
    pages = [(slot, slot) for slot in range(4)]
    runner.launch(_step(0, rows, [1, 2, 3, 4, 5], pages, [Admit(slot, 0, GREEDY) for slot in range(4)]))
    assert toy.batches[0].num_decodes == 2


def test_warm_up_leaves_nothing_behind():
    for page in (1, 2, 64):
        cache = KVCache(torch.zeros(1, 3, page, 2, dtype=torch.float64))
        runner = Runner(Toy(), cache, num_slots=1, max_seq_len=2)
        warm_up(runner, page)
        with pytest.raises(MalformedStep):
            runner.launch(_step(0, [(0, 2, 1, ROW_SAMPLES)]))


def test_both_classes_are_warmed_up():
    cache, toy = KVCache(torch.zeros(1, 3, PAGE, 2, dtype=torch.float64)), Toy()
    for numerics in Numerics:
        warm_up(Runner(toy, cache, num_slots=1, max_seq_len=2), PAGE, numerics)
    assert toy.classes == [Numerics.FAST] * 2 + [Numerics.EXACT] * 2


def test_warming_up_prefills_leaves_nothing_behind():
    cache = KVCache(torch.full((1, 13, PAGE, 2), torch.nan, dtype=torch.float64))
    toy = Toy()
    runner = Runner(toy, cache, num_slots=SLOTS, max_seq_len=MAX_SEQ_LEN)
    warm_up_prefills(runner, cache, longest=21, most=70)
    # 64 tokens need 24 pages: idle steps, since other ranks may have them
    assert [np.diff(batch.starts).tolist() for batch in toy.batches] == [[16], [21, 11], [], []]
    with pytest.raises(MalformedStep):
        runner.launch(_step(0, [(0, 21, 1, ROW_SAMPLES)]))


ADMIT = [Admit(1, 0, GREEDY)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": [(SLOTS, 0, 1, 3)], "ids": [1]}, "row 0: slot 6 of 6"),
        ({"rows": [(-1, 0, 1, 3)], "ids": [1]}, "row 0: slot -1 of 6"),
        ({"rows": [(0, 0, 0, 3)]}, "row 0: slot 0 of 6, 0 tokens"),
        ({"rows": [(0, 3, 1, ROW_SAMPLES), (0, 3, 1, ROW_SAMPLES)]}, "two rows share a slot"),
        ({"rows": [(1, 0, 1, ROW_SAMPLES)], "admits": ADMIT}, r"row 0 \(slot 1\): a row without ids"),
        ({"rows": [(0, 3, 2, ROW_SAMPLES)]}, r"row 0 \(slot 0\): a row without ids"),
        ({"rows": [(0, 3, 1, 0)]}, r"row 0 \(slot 0\): a row without ids"),
        (
            {"rows": [(1, 0, 1, 3), (0, 3, 1, 1)], "ids": [1], "pages": [(1, 7)], "admits": ADMIT},
            "comes before all rows with ids",
        ),
        ({"rows": [(0, 4, 1, ROW_SAMPLES)]}, r"row 0 \(slot 0\) starts at position 4, its slot goes on at 3"),
        ({"rows": [(0, 2, 1, ROW_SAMPLES)]}, r"row 0 \(slot 0\) starts at position 2, its slot goes on at 3"),
        ({"rows": [(0, 3, 2, 3)], "ids": [1, 2]}, r"row 0 \(slot 0\) ends at position 5, its slot's pages hold 4"),
        ({"rows": [(0, 3, 1, ROW_SAMPLES)], "ids": [1]}, "1 ids where its rows need 0"),
        ({"rows": [(0, 3, 1, 3)]}, "0 ids where its rows need 1"),
        ({"rows": [(0, 3, 1, 3)], "ids": [9], "num_tokens": 0}, "1 tokens of at most 0"),
        ({"rows": [], "pages": [(0, PAGES)]}, "pages 60 to 60 of 60"),
        ({"rows": [], "pages": [(SLOTS, 1)]}, "slots 6 to 6 of 6"),
        ({"rows": [], "pages": [(0, page) for page in range(12)]}, "slot 0 gets more than the 12"),
        ({"rows": [], "admits": [Admit(SLOTS, 0, GREEDY)]}, "slot 6 of 6"),
    ],
)
def test_a_malformed_step_is_refused_by_name(fields, message):
    runner, _ = _runner()
    runner.launch(_step(0, [(0, 0, 3, 3)], [5, 6, 7], [(0, 0)], [Admit(0, 0, GREEDY)]))
    with pytest.raises(MalformedStep, match="step 8: .*" + message):
        runner.launch(_step(8, **fields))


def test_a_decode_step_brings_no_ids():
    """Ranks that have some would launch kernels where the others replay a graph."""
    runner, _ = _runner()
    step = _step(0, [(0, 0, 3, 3)], [5, 6, 7], [(0, 0)], [Admit(0, 0, GREEDY)])
    with pytest.raises(MalformedStep, match="step 0: 3 ids on the channel of decode steps"):
        runner.launch(msgspec.structs.replace(step, channel=CHANNEL_DECODE))


def test_rows_that_go_on_are_refused_once_their_pages_are_full():
    runner, _ = _runner()
    admits = [Admit(0, 0, GREEDY), Admit(1, 0, GREEDY)]
    pages = [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4)]
    runner.launch(_step(0, [(0, 0, 3, 3), (1, 0, 2, 3)], [5, 6, 7, 8, 9], pages, admits))
    runner.launch(_step(1, [(0, 3, 1, ROW_SAMPLES), (1, 2, 1, ROW_SAMPLES)]))
    for step_id in range(2, 7):
        runner.launch(_step(step_id, None))
    runner.launch(_step(7, None, pages=[(1, 5)]))
    for step_id in range(8, 10):
        runner.launch(_step(step_id, None))
    with pytest.raises(MalformedStep, match=r"step 10: row 0 \(slot 0\) ends at position 13, its slot's pages hold 12"):
        runner.launch(_step(10, None))


def test_rows_do_not_go_on_in_a_slot_that_was_given_away():
    runner, _ = _runner()
    pages = [(0, page) for page in range(6)]
    runner.launch(_step(0, [(0, 0, 3, 3)], [5, 6, 7], pages, [Admit(0, 0, GREEDY)]))
    runner.launch(_step(1, [(0, 3, 1, ROW_SAMPLES)]))
    with pytest.raises(MalformedStep, match=r"step 2: row 0 \(slot 0\) starts at position 4, its slot goes on at 0"):
        runner.launch(_step(2, None, admits=[Admit(0, 0, GREEDY)]))


def test_reset_forgets_every_request():
    runner, _ = _runner()
    runner.launch(_step(0, [(0, 0, 3, 3)], [5, 6, 7], [(0, 0)], [Admit(0, 0, GREEDY)]))
    runner.reset()
    assert _tokens(runner.launch(_step(1, None))) == []
    with pytest.raises(MalformedStep):
        runner.launch(_step(2, [(0, 3, 1, ROW_SAMPLES)]))


def test_a_reset_forgets_what_was_captured_on_the_way(monkeypatch):
    """Only some ranks may have got the step, and a capture needs all of them."""
    runner, _ = _runner()
    graphs = StepGraphs.__new__(StepGraphs)
    kept = {(Numerics.FAST, CHANNEL_DECODE, 1): "a decode", (Numerics.FAST, CHANNEL_PREFILL, 16): "a chunk"}
    graphs._graphs = kept | {(Numerics.EXACT, CHANNEL_DECODE, 4): "running"}
    idle = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: idle.append(len(graphs._graphs)))
    runner._graphs = graphs
    runner.reset()
    assert graphs._graphs == kept and idle == [3]


# ------------------------------------------------------------------------------------------------ with the real model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("model"))
    return Config(
        model=Model(path=str(path)),
        parallel=Parallel(world_size=1, device="cpu"),
        engine=Engine(page_size=PAGE, num_pages=PAGES, max_batch_size=3),
    )


def test_chunks_and_decodes_equal_one_forward(config):
    checkpoint = open_checkpoint(config)
    model = load_model(checkpoint, config, 0, CPU, lambda *_: None)
    cache = make_cache(config, checkpoint, CPU)
    driver = Driver()
    driver.runner = Runner(model, cache, num_slots=SLOTS, max_seq_len=MAX_SEQ_LEN)
    driver.runner.launch(_step(0, []))  # idle
    random = Random(8)
    requests = [Request(_prompt(random, length)) for length in (13, 1, 22, 30)]
    while any(len(request.output) < 8 for request in requests):
        work = [r for r in requests if random.random() < 0.8 and len(r.output) < 8]
        driver.run([(r, 1 if r.decodes else min(7, r.prompt_len - r.computed)) for r in work], random)
    for request in requests:
        count = len(request.ids) - 1
        whole = Batch(
            ids_T=torch.tensor(request.ids[:-1]),
            positions_T=torch.arange(count),
            write_T=torch.arange(count),
            starts=[0, count],
            contexts=[count],
            pages_RP=torch.arange(-(-count // PAGE))[None],
            num_decodes=0,
        )
        logits = model.logits(model.forward(whole, cache, Numerics.FAST)[request.prompt_len - 1 :], Numerics.FAST)
        assert request.output == logits.argmax(-1).tolist()


def test_the_cache_fills_a_share_of_the_memory_or_is_as_large_as_told(config):
    checkpoint = open_checkpoint(config)
    replace = msgspec.structs.replace
    assert make_cache(config, checkpoint, CPU).num_pages == PAGES
    cache = make_cache(replace(config, engine=replace(config.engine, num_pages=0)), checkpoint, CPU)
    assert cache.num_pages == 3 * checkpoint.max_seq_len // PAGE, "all that a full batch of the longest can use"
    assert cache.rows_LNSC.shape == (3, cache.num_pages + 1, PAGE, read_architecture(checkpoint.path).cache_dim)
    with pytest.raises(NmoeError, match=r"cannot be allocated.*set \[engine\] num_pages"):
        make_cache(replace(config, engine=replace(config.engine, num_pages=10**12)), checkpoint, CPU)
