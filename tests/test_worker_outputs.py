"""What comes back besides tokens, from Steps with the real model: transformers' logits are the oracle."""

from random import Random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Engine, Model, Parallel
from nmoe.messages import ROW_HAS_IDS, ROW_RETURNS, ROW_SAMPLES, Admit, Sampling, bias_fields
from nmoe.outputs import Returns, RoutingLayout, cells_of, pack, read_records, unpack
from nmoe.profiles import Numerics
from nmoe.worker import outputs
from nmoe.worker.cache import make_cache
from nmoe.worker.kernels.records import likeliest, make_records
from nmoe.worker.model import load_model
from nmoe.worker.slots import MalformedStep
from tests.checkpoints import make_checkpoint
from tests.returning import GREEDY, NOTHING, Driver, Request, drawn_logprob, step, told

PAGE, PAGES, SLOTS, MAX_SEQ_LEN = 4, 120, 8, 80
VOCAB = 512
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Logits of one digit before the point: so 1e-5 is not their float32's last bit.
    return make_checkpoint(tmp_path_factory.mktemp("model"), initializer_range=0.1)


@pytest.fixture(scope="module")
def oracle(folder):
    from transformers import DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def load(folder):
    """A model and its configuration."""
    config = Config(
        model=Model(path=str(folder)),
        parallel=Parallel(world_size=1, device="cpu"),
        engine=Engine(page_size=PAGE, num_pages=PAGES, max_batch_size=SLOTS),
    )
    checkpoint = open_checkpoint(config)
    return config, checkpoint, load_model(checkpoint, config, 0, CPU, lambda *_: None)


@pytest.fixture(scope="module")
def engine(folder):
    return load(folder)


def make_driver(engine, rank=0):
    return Driver(engine, num_slots=SLOTS, max_seq_len=MAX_SEQ_LEN, rank=rank)


def replaced(admit, **returns):
    """The same request with other wishes."""
    return msgspec.structs.replace(admit, returns=msgspec.structs.replace(admit.returns, **returns))


def prompt_of(random, length):
    return [random.randrange(VOCAB) for _ in range(length)]


def reference(oracle, ids):
    """Logits of all positions, float32 [T, V], and the bytes of their routing."""
    chosen = []

    def note(gate, _, outputs):
        logits_TE, _, ids_TK = outputs
        biased_TK = (logits_TE.sigmoid() + gate.e_score_correction_bias).gather(1, ids_TK)
        chosen.append(ids_TK.gather(1, biased_TK.sort(descending=True).indices))

    gates = [layer.mlp.gate for layer in oracle.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(note) for gate in gates]
    with torch.inference_mode():
        logits_TV = oracle(torch.tensor([ids])).logits[0].float()
    for hook in hooks:
        hook.remove()
    return logits_TV, torch.stack(chosen, 1).numpy()


def check_records(request, logits_TV, first_told):
    """That there is one record for each token from position `first_told` on, and that it is right."""
    returns, logprobs_TV = request.returns, logits_TV.log_softmax(-1)
    assert len(request.records) == len(request.ids) - first_told
    for place, record in zip(range(first_told, len(request.ids)), request.records, strict=True):
        token, logits_V, logprobs_V = request.ids[place], logits_TV[place - 1], logprobs_TV[place - 1]
        assert abs(record.logprob - logprobs_V[token]) < 1e-5
        # Tokens that are as likely up to rounding may be in either order.
        above, level = logits_V - logits_V[token], 1e-5
        assert (above > level).sum() < record.rank <= (above > -level).sum()
        assert len(set(record.top_ids)) == returns.top_k
        told_K = torch.tensor(record.top_logprobs)
        torch.testing.assert_close(told_K, logprobs_V.topk(returns.top_k).values, rtol=0, atol=1e-5)
        torch.testing.assert_close(told_K, logprobs_V[list(record.top_ids)], rtol=0, atol=1e-5)
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
    Returns(routing=True),
    Returns(records=True, top_k=1, prompt=True, routing=True),
]


@pytest.mark.parametrize("numerics", Numerics)
@pytest.mark.parametrize("seed", range(3))
def test_records_are_transformers_in_any_company_and_chunks(engine, oracle, seed, numerics):
    random, driver = Random(seed), make_driver(engine)
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
        logits_TV, routing_TLK = reference(oracle, request.ids[:-1])
        if request.returns.routing:
            assert request.routing == routing_TLK.astype(np.uint8).tobytes()
        if request.returns.records:
            check_records(request, logits_TV, 1 if request.returns.prompt else request.prompt_len)
        if request.returns.logits:
            assert len(request.cells) == len(request.records)
            told = logits_TV[-len(request.cells) :]
            torch.testing.assert_close(torch.tensor(np.array(request.cells)), told, rtol=0, atol=1e-5)
    assert sorted(driver.free_cells) == list(range(64))


def test_exact_outputs_have_the_same_bits_in_any_company_and_chunks(engine):
    """Alone and whole, or mixed, in chunks, and preempted."""
    random = Random(21)
    wishes = [Returns(records=True, prompt=True, top_k=5, logits=True, routing=True), *WISHES[1:4]]
    prompts = [prompt_of(random, length) for length in (13, 5, 1, 20)]
    sampling = Sampling(temperature=1.2, top_p=0.9, seed=3)
    alone, mixed = ([Request(*each, sampling) for each in zip(prompts, wishes, strict=True)] for _ in range(2))
    driver = make_driver(engine)
    for request in alone:
        while len(request.output) < 6:
            driver.run([(request, 1 if request.continues else len(request.ids))], Numerics.EXACT)
        driver.free(request)
    while running := [request for request in mixed if len(request.output) < 6]:
        running.sort(key=lambda request: not request.continues)
        most = [1 if request.continues else min(4, len(request.ids) - request.computed) for request in running]
        driver.run(list(zip(running, most, strict=True)), Numerics.EXACT)
        if random.random() < 0.3:
            running[-1].preempt(driver)
    assert [told(request) for request in mixed] == [told(request) for request in alone]


def test_routing_of_a_cached_prefix_is_read_from_where_it_was_kept(engine, oracle):
    """Also that of a prompt whose pages are all cached, where only the last position is computed again."""
    random, driver = Random(7), make_driver(engine)
    prompt = prompt_of(random, 13)
    owner = Request(prompt)
    driver.run([(owner, 13)])
    for length in (8, 10, 13):
        sharer = Request(prompt[:length], Returns(routing=True), cached=8, pages=owner.pages[:2])
        driver.run([(owner, 1), (sharer, length - sharer.computed)])
        driver.run([(owner, 1), (sharer, 1)])
        assert sharer.routing == reference(oracle, sharer.ids[:-1])[1].astype(np.uint8).tobytes()
        driver.free(sharer)


def test_routing_after_a_preemption_goes_on_where_it_ended(engine, oracle):
    """Its prefix is cached then, and what came back does not come again."""
    random, driver = Random(8), make_driver(engine)
    request = Request(prompt_of(random, 9), Returns(records=True, routing=True))
    driver.run([(request, 9)])
    driver.run([(request, 1)])
    pages = request.pages
    request.preempt(driver)
    request.pages, request.cached, request.computed = pages[:2], 8, 8
    driver.free_pages = [page for page in driver.free_pages if page not in pages]
    driver.run([(request, 3)])
    logits_TV, routing_TLK = reference(oracle, request.ids[:-1])
    assert request.routing == routing_TLK.astype(np.uint8).tobytes()
    check_records(request, logits_TV, 9)


def test_many_experts_take_two_bytes(tmp_path):
    folder = make_checkpoint(tmp_path, n_routed_experts=264, num_hidden_layers=2, moe_intermediate_size=8)
    from transformers import DeepseekV3ForCausalLM

    driver = make_driver(load(folder))
    request = Request(prompt_of(Random(9), 30), Returns(routing=True))
    driver.run([(request, 30)])
    model = DeepseekV3ForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    _, routing_TLK = reference(model, request.ids[:-1])
    assert routing_TLK.max() > 255
    assert request.routing == routing_TLK.astype(np.uint16).tobytes()


SAMPLINGS = [
    Sampling(seed=1),
    Sampling(temperature=0.7, top_k=5, seed=2),
    Sampling(temperature=1.5, top_p=0.8, seed=3),
    Sampling(temperature=1.2, min_p=0.2, seed=4),
    Sampling(temperature=1.3, min_p=0.01, top_k=50, top_p=0.9, seed=5),
    Sampling(temperature=0.9, top_k=30, seed=6, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2),
    Sampling(temperature=1.1, seed=7, **bias_fields({3: 4.0, 9: -2.0, 11: 5.5})),
]


def test_the_log_probability_of_the_draw_is_that_of_its_distribution(engine, oracle):
    """Beside rows that return nothing, and greedy ones."""
    random, driver = Random(11), make_driver(engine)
    wanted = [Request(prompt_of(random, 6), Returns(records=True), sampling) for sampling in SAMPLINGS]
    requests = [*wanted, Request(prompt_of(random, 6), Returns(records=True), GREEDY)]
    for offset in range(2):
        company = requests[offset::2] + [Request(prompt_of(random, 6), NOTHING, sampling) for sampling in SAMPLINGS[:3]]
        random.shuffle(company)
        for turn in range(8):
            driver.run([(request, 1 if turn else 6) for request in company])
        for request in company:
            driver.free(request)
    for request in requests:
        assert len(request.records) == 8
        logits_TV, _ = reference(oracle, request.ids[:-1])
        for place, record in enumerate(request.records, request.prompt_len):
            if request.sampling is GREEDY:
                assert record.drawn_logprob == 0
                continue
            past, token = request.ids[:place], request.ids[place]
            expected = drawn_logprob(logits_TV[place - 1], request.sampling, past, request.prompt_len, token)
            assert abs(record.drawn_logprob - expected) < 2e-5
            assert abs(record.logprob - logits_TV[place - 1].log_softmax(-1)[token]) < 1e-5


def test_a_prompt_is_scored_without_sampling(engine, oracle):
    driver = make_driver(engine)
    request = Request(prompt_of(Random(12), 11), Returns(records=True, prompt=True, top_k=2))
    request.samples = False
    driver.run([(request, 5)])
    driver.run([(request, 6)])
    assert not request.output
    check_records(request, reference(oracle, request.ids)[0], 1)


def test_rows_that_go_on_return_too(engine, oracle):
    driver = make_driver(engine)
    request = Request(prompt_of(Random(13), 5), Returns(records=True, routing=True))
    driver.run([(request, 5)])
    driver.run([(request, 1)])
    request.pages.append(driver.free_pages.pop())
    for step_id, pages in ((90, [(request.slot, request.pages[-1])]), (91, ())):
        launched = driver.runner.launch(step(step_id, None, pages=pages))
        driver.book([(request, 1)], [(request.slot, request.computed, 1, ROW_RETURNS | ROW_SAMPLES)], launched)
    logits_TV, routing_TLK = reference(oracle, request.ids[:-1])
    check_records(request, logits_TV, 5)
    assert request.routing == routing_TLK.astype(np.uint8).tobytes()


def test_prompts_are_scored_a_tile_at_a_time(engine, oracle, monkeypatch):
    """Records and logits do not depend on where the tiles end."""
    seen = []
    model = engine[2]
    logits = model.logits
    monkeypatch.setattr(outputs, "_TILE", 3 * VOCAB)
    monkeypatch.setattr(
        model, "logits", lambda hidden_SD, *rest: seen.append(len(hidden_SD)) or logits(hidden_SD, *rest)
    )
    random, driver = Random(14), make_driver(engine)
    requests = [
        Request(prompt_of(random, length), Returns(records=True, prompt=True, top_k=index, logits=index % 2 == 0))
        for index, length in enumerate((9, 1, 12, 2))
    ]
    driver.run([(request, request.prompt_len) for request in requests])
    assert seen == [4, *[3] * 6, 2]
    for request in requests:
        logits_TV, _ = reference(oracle, request.ids[:-1])
        check_records(request, logits_TV, 1)
        if request.returns.logits:
            torch.testing.assert_close(torch.tensor(np.array(request.cells)), logits_TV, rtol=0, atol=1e-5)


def test_a_rank_writes_its_own_cells(engine):
    driver = make_driver(engine, rank=1)
    request = Request(prompt_of(Random(15), 6), Returns(records=True, logits=True))
    driver.run([(request, 6)])
    assert request.cells[0].argmax() == request.output[0]
    assert np.flatnonzero(driver.arena.any(1)).tolist() == [127]


ASKS = Admit(0, 0, GREEDY, b"", 3, Returns(records=True, logits=True))
BOTH = ROW_HAS_IDS | ROW_SAMPLES


@pytest.mark.parametrize(
    ("admit", "flags", "cells", "message"),
    [
        (ASKS, BOTH | ROW_RETURNS, [], "0 cells where 1 records have logits"),
        (ASKS, BOTH | ROW_RETURNS, [1, 2], "2 cells where 1 records have logits"),
        (ASKS, ROW_HAS_IDS | ROW_RETURNS, [1], "1 cells where 0 records have logits"),
        (ASKS, BOTH | ROW_RETURNS, [64], r"cells \[64\]: not of 0 to 63, each once"),
        (ASKS, BOTH | ROW_RETURNS, [-1], r"cells \[-1\]: not of 0 to 63, each once"),
        (ASKS, BOTH, [1], "1 cells where no row returns anything"),
        (Admit(0, 0, GREEDY), BOTH | ROW_RETURNS, [], "slot 0 returns something, and its request asked for nothing"),
        (replaced(ASKS, prompt=True), BOTH | ROW_RETURNS, [], "slot 0 returns its prompt's records and brings no"),
        (replaced(ASKS, top_k=513), BOTH | ROW_RETURNS, [], "slot 0 asks for top 513 and ids up to 0 of 512 tokens"),
        (replaced(ASKS, scored_ids=(512,)), BOTH | ROW_RETURNS, [], "slot 0 asks for top 0 and ids up to 512 of 512"),
        (replaced(ASKS, scored_ids=(-1,)), BOTH | ROW_RETURNS, [], "slot 0 asks for .* of 512 tokens"),
    ],
)
def test_a_step_that_returns_what_cannot_be_is_refused_by_name(engine, admit, flags, cells, message):
    driver = make_driver(engine)
    with pytest.raises(MalformedStep, match="step 4: .*" + message):
        driver.runner.launch(step(4, [(0, 0, 3, flags)], [5, 6, 7], [(0, 0)], [admit], cells))


def test_two_records_do_not_share_a_cell(engine):
    driver = make_driver(engine)
    admits = [msgspec.structs.replace(ASKS, slot=slot) for slot in range(2)]
    rows = [(slot, 0, 1, BOTH | ROW_RETURNS) for slot in range(2)]
    with pytest.raises(MalformedStep, match=r"cells \[3, 3\]: not of 0 to 63, each once"):
        driver.runner.launch(step(4, rows, [5, 6], [(0, 0), (1, 1)], admits, [3, 3]))


def test_a_new_request_in_a_slot_returns_what_it_asks_for_itself(engine):
    driver = make_driver(engine)
    driver.free_slots = [5]
    for returns in (Returns(records=True, top_k=4, routing=True), NOTHING, Returns(records=True)):
        request = Request(prompt_of(Random(16), 7), returns)
        driver.run([(request, 7)])
        assert len(request.records) == returns.records
        assert bool(request.routing) == returns.routing
        driver.free(request)


# ------------------------------------------------------------------------------------------------ records of any logits


finite = st.floats(-30, 30, width=32)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 6), st.integers(1, 70))
def test_a_record_has_the_same_bits_in_any_batch(data, rows, vocab):
    levels = data.draw(st.lists(finite, min_size=1, max_size=5))  # few, so that some are equal
    places = st.lists(st.integers(0, len(levels) - 1), min_size=rows * vocab, max_size=rows * vocab)
    logits_SV = torch.tensor(levels)[torch.tensor(data.draw(places))].view(rows, vocab)
    top_k, scored = data.draw(st.integers(0, vocab)), data.draw(st.integers(0, 4))
    ids = st.integers(0, vocab - 1)
    tokens_N = torch.tensor(data.draw(st.lists(ids, min_size=rows, max_size=rows)))
    scored_NI = torch.tensor(
        data.draw(st.lists(ids, min_size=rows * scored, max_size=rows * scored)), dtype=torch.int64
    )
    scored_NI = scored_NI.view(rows, scored)
    together = make_records(logits_SV, torch.arange(rows), tokens_N, 0.5, top_k, scored_NI)
    for row in range(rows):
        one = slice(row, row + 1)
        alone = make_records(logits_SV[one], torch.tensor([0]), tokens_N[one], 0.5, top_k, scored_NI[one])
        assert torch.equal(alone[0], together[row])
    returns = Returns(records=True, top_k=top_k, scored_ids=(0,) * scored)
    for row, record in enumerate(read_records(memoryview(together.numpy().tobytes()), returns)):
        logits_V, token = logits_SV[row], tokens_N[row]
        logprobs_V = logits_V.double().log_softmax(-1)
        order = sorted(range(vocab), key=lambda place: (-logits_V[place], place))[:top_k]
        assert list(record.top_ids) == order
        assert record.rank == (logits_V > logits_V[token]).sum() + 1
        assert record.drawn_logprob == 0.5
        told = [record.logprob, *record.top_logprobs, *record.scored]
        expected = logprobs_V[[int(token), *order, *scored_NI[row].tolist()]]
        torch.testing.assert_close(torch.tensor(told, dtype=torch.float64), expected, rtol=1e-6, atol=1e-6)


def test_the_likeliest_are_in_the_order_of_a_stable_sort():
    """Minus zero is zero, any NaN is the largest, and of equal ones the lower id is first."""
    levels = torch.tensor([torch.nan, -torch.nan, torch.inf, 2.5, 0.0, -0.0, -1.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    logits_SV = levels[torch.randint(0, len(levels), (7, 300), generator=generator)]
    rows_N = torch.tensor([4, 0, 6])
    for dtype in (torch.float32, torch.bfloat16):
        order_NV = logits_SV[rows_N].sort(descending=True, stable=True).indices
        for count in (1, 128, 300):
            assert torch.equal(likeliest(logits_SV.to(dtype), rows_N, count), order_NV[:, :count])


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.data())
def test_blocks_are_read_as_they_were_made(data):
    returns = Returns(
        records=True,
        top_k=data.draw(st.integers(0, 128)),
        scored_ids=tuple(range(data.draw(st.integers(0, 128)))),
    )
    count = data.draw(st.integers(0, 4))
    k, scored = returns.top_k, len(returns.scored_ids)
    words_NW = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((count, 3 + 2 * k + scored))
    words_NW = words_NW.astype(np.float32)
    words_NW[:, 2 : 3 + k].view(np.int32)[:] = np.arange(1 + k)
    cells = np.arange(data.draw(st.sampled_from([0, count])), dtype=np.int32)
    routing = data.draw(st.binary(max_size=20))
    made = memoryview(pack(cells.tobytes(), words_NW.tobytes(), count, routing, len(routing)))
    assert cells_of(made).tolist() == cells.tolist()
    block = unpack(made, returns)
    assert (block.cells.tolist(), bytes(block.routing)) == (cells.tolist(), routing)
    records = read_records(block.records, returns)
    assert len(records) == count
    for record, words in zip(records, words_NW.tolist(), strict=True):
        assert [record.logprob, record.drawn_logprob, *record.top_logprobs, *record.scored] == words[:2] + words[
            3 + k :
        ]
        assert (record.rank, list(record.top_ids)) == (0, list(range(1, 1 + k)))
    if len(made) > 12 + len(routing):
        with pytest.raises(ValueError, match="cannot have"):
            unpack(made[: len(made) - len(routing) - 1], returns)


def test_the_memory_rule_counts_what_the_cache_takes(engine):
    """A page of it, and what of that is one position's routing."""
    config, checkpoint, _ = engine
    cache, architecture = make_cache(config, checkpoint, CPU), checkpoint.architecture
    taken = cache.rows_LNSC.nbytes + cache.routing_NSLK.nbytes
    assert taken == (PAGES + 1) * PAGE * architecture.cache_bytes_per_token("float32")
    assert cache.routing_NSLK[0, 0].nbytes == RoutingLayout.of(architecture).position_bytes
