"""What comes back besides tokens, computed on the GPU: the kernels against their references, records against the logits
that came with them, captured steps against eager ones, and the exact class in any company."""

import numpy as np
import pytest
import torch

from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Engine, Model, Parallel
from nmoe.messages import Sampling, bias_fields
from nmoe.outputs import Returns, read_records
from nmoe.profiles import Numerics
from nmoe.worker.kernels import likeliest_triton, records, routing
from nmoe.worker.model import load_model
from tests.checkpoints import make_checkpoint
from tests.returning import GREEDY, NOTHING, Driver, Request, drawn_logprob, told

GPU = torch.device("cuda", 0)
PAGE, VOCAB = 32, 512
SHAPE = {
    "hidden_size": 256,
    "num_attention_heads": 16,
    "q_lora_rank": 96,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "initializer_range": 0.08,
    "dtype": torch.bfloat16,
}
EVERYTHING = Returns(records=True, prompt=True, top_k=128, scored_ids=(5, 511, 5), logits=True, routing=True)
WISHES = [
    EVERYTHING,
    NOTHING,
    Returns(records=True),
    Returns(records=True, top_k=7, logits=True),
    Returns(records=True, prompt=True, routing=True),
    Returns(routing=True),
]
SAMPLINGS = [
    Sampling(temperature=1.3, min_p=0.01, top_k=50, top_p=0.9, seed=5),
    Sampling(seed=1),
    Sampling(temperature=0.9, top_k=30, seed=6, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2),
    Sampling(temperature=1.1, seed=7, **bias_fields({3: 4.0, 9: -2.0, 11: 5.5})),
    GREEDY,
    Sampling(temperature=1.5, top_p=0.8, seed=3),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("gpu") / "tiny", **SHAPE)
    config = Config(
        Model(path=str(folder), dtype="bfloat16"),
        Parallel(1, "cuda"),
        Engine(num_pages=200, page_size=PAGE, max_batch_size=16),
    )
    checkpoint = open_checkpoint(config)
    return config, checkpoint, load_model(checkpoint, config, 0, GPU, lambda *_: None)


def make_driver(engine, *, captured):
    driver = Driver(engine, num_slots=16, max_seq_len=512, cells=1024)
    if captured:
        driver.runner.capture(16, 256)
    return driver


def make_requests(wishes=WISHES, samplings=SAMPLINGS, seed=0):
    rng = np.random.default_rng(seed)
    lengths = (70, 33, 5, 64, 130, 97)
    return [
        Request(rng.integers(6, VOCAB, length).tolist(), wish, sampling)
        for length, wish, sampling in zip(lengths, wishes, samplings, strict=True)
    ]


def finish(driver, requests, *, chunk, output, numerics=Numerics.FAST):
    """Prompts in chunks, one request more with each step; all decode to `output` tokens. Then they make room."""
    begun = 0
    while any(len(request.output) < output for request in requests):
        begun = min(begun + 1, len(requests))
        work = [(request, 1) for request in requests[:begun] if request.continues and len(request.output) < output]
        fill = [request for request in requests[:begun] if not request.continues]
        work += [(request, min(chunk, len(request.ids) - request.computed)) for request in fill]
        driver.run(work, numerics)
    for request in requests:
        driver.free(request)


def close(actual, expected, tolerance):
    torch.testing.assert_close(
        torch.tensor(actual).double(), torch.as_tensor(expected).double(), rtol=0, atol=tolerance
    )


# ------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "vocab", "top_k", "scored"), [(1, 129280, 128, 128), (130, 129280, 5, 0), (7, 512, 0, 3)]
)
def test_records_are_the_reference(dtype, rows, vocab, top_k, scored):
    generator = torch.Generator().manual_seed(rows)
    logits_SV = (torch.randn(rows + 3, vocab, generator=generator) * 4).to(dtype)
    rows_N = torch.randperm(rows + 3, generator=generator)[:rows]
    tokens_N, scored_NI = (torch.randint(0, vocab, shape, generator=generator) for shape in ((rows,), (rows, scored)))
    drawn_N = -torch.rand(rows, generator=generator)
    expected = records.make_records(logits_SV, rows_N, tokens_N, drawn_N, top_k, scored_NI)
    given = [tensor.to(GPU) for tensor in (logits_SV, rows_N, tokens_N, drawn_N)]
    actual = records.make_records(*given, top_k, scored_NI.to(GPU)).cpu()
    integers, ends = slice(2, 3 + top_k), 3 + top_k
    assert torch.equal(actual[:, integers], expected[:, integers])
    floats = [words.view(torch.float32) for words in (actual, expected)]
    assert torch.equal(floats[0][:, 1], drawn_N)
    torch.testing.assert_close(floats[0][:, 0], floats[1][:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(floats[0][:, ends:], floats[1][:, ends:], rtol=0, atol=1e-5)
    one = [tensor[:1] for tensor in given[1:]]
    alone = records.make_records(given[0], *one, top_k, scored_NI[:1].to(GPU)).cpu()
    assert torch.equal(alone[0], actual[0]), "bits depend on the batch"


def hard_rows(vocab, dtype):
    """Logits that differ, that tie, that all are the same, that are no numbers; the greatest in one block, or apart."""
    generator = torch.Generator().manual_seed(vocab)
    logits_SV = torch.randn(12, vocab, generator=generator) * 4
    logits_SV[1] = torch.randint(-3, 3, (vocab,), generator=generator)
    logits_SV[2] = 1.5
    logits_SV[3] = -torch.inf
    logits_SV[4, :-3] = -torch.inf
    logits_SV[5, [5, 9, 11]] = torch.tensor([torch.nan, -torch.nan, torch.inf])
    logits_SV[6] = torch.where(torch.arange(vocab) % 2 == 0, 0.0, -0.0)
    logits_SV[7] = torch.arange(vocab)
    logits_SV[8] = -logits_SV[7]
    logits_SV[9, 60:200] += 100
    logits_SV[10, -150:] += 100
    return logits_SV.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [129, 4099, 163840])
@pytest.mark.parametrize("top_k", [1, 10, 32, 128])
def test_the_likeliest_are_the_reference_in_any_company(dtype, vocab, top_k):
    logits_SV = hard_rows(vocab, dtype)
    rows_N = torch.randperm(12, generator=torch.Generator().manual_seed(top_k))
    expected = records.likeliest(logits_SV, rows_N, top_k)
    given, rows = logits_SV.to(GPU), rows_N.to(GPU)
    assert torch.equal(likeliest_triton.likeliest(given, rows, top_k).cpu(), expected)
    many = likeliest_triton.likeliest(given, rows.repeat(50), top_k)
    assert torch.equal(many.cpu(), expected.repeat(50, 1))
    for n in range(12):
        alone = likeliest_triton.likeliest(given, rows[n : n + 1], top_k)
        assert torch.equal(alone[0].cpu(), expected[n])


@pytest.mark.parametrize(("dtype", "experts"), [(torch.uint8, 256), (torch.int16, 384)])
@pytest.mark.parametrize("tokens", [1, 37, 1000])
def test_routing_is_kept_and_read(dtype, experts, tokens):
    generator = torch.Generator().manual_seed(tokens)
    ids_LTK = torch.randint(0, experts, (58, tokens, 8), generator=generator)
    places = torch.randperm(40 * PAGE, generator=generator)[:tokens]
    kept, expected = (torch.zeros(41, PAGE, 58, 8, dtype=dtype, device=device) for device in (GPU, "cpu"))
    routing.keep_routing(ids_LTK.int().to(GPU).unbind(), places.int().to(GPU), kept)
    routing.keep_routing(ids_LTK.unbind(), places, expected)
    assert torch.equal(kept.cpu(), expected)
    pages, positions = (places // PAGE).int(), places % PAGE + 7 * PAGE
    read = routing.read_routing(kept, pages.to(GPU), positions.to(GPU)).cpu()
    assert torch.equal(read, routing.read_routing(expected, pages, positions))


# -------------------------------------------------------------------------------------------------------------- engine


@pytest.mark.parametrize("numerics", Numerics)
@pytest.mark.parametrize("captured", [False, True])
def test_records_describe_the_logits_that_came_with_them(engine, captured, numerics):
    """Every request asks for all there is, and what is said is what follows from its logits."""
    requests = make_requests([EVERYTHING] * 6)
    finish(make_driver(engine, captured=captured), requests, chunk=48, output=12, numerics=numerics)
    for request in requests:
        assert len(request.cells) == len(request.records) == len(request.ids) - 1
        assert len(request.routing) == (len(request.ids) - 1) * 2 * 3
        logits_PV = torch.tensor(np.array(request.cells))
        logprobs_PV = logits_PV.double().log_softmax(-1)
        ordered_PV = torch.sort(logits_PV, dim=-1, descending=True, stable=True).indices
        for place, record in enumerate(request.records, 1):
            token, logits_V, logprobs_V = request.ids[place], logits_PV[place - 1], logprobs_PV[place - 1]
            best = ordered_PV[place - 1, :128]
            assert list(record.top_ids) == best.tolist()
            assert record.rank == (logits_V > logits_V[token]).sum() + 1
            close([record.logprob], logprobs_V[[token]], 1e-5)
            close(record.top_logprobs, logprobs_V[best], 1e-5)
            close(record.scored, logprobs_V[[5, 511, 5]], 1e-5)
            if place < request.prompt_len:
                assert np.isnan(record.drawn_logprob)
            elif request.sampling is GREEDY:
                assert record.drawn_logprob == 0
            else:
                past = request.ids[:place]
                expected = drawn_logprob(logits_V, request.sampling, past, request.prompt_len, token)
                close([record.drawn_logprob], [expected], 1e-4)


def test_exact_outputs_have_the_same_bits_in_any_company_and_chunks(engine):
    """Captured or not, alone or mixed, whole or in chunks."""
    mixed, alone = make_requests(), make_requests()
    finish(make_driver(engine, captured=True), mixed, chunk=48, output=12, numerics=Numerics.EXACT)
    driver = make_driver(engine, captured=False)
    for request in alone:
        finish(driver, [request], chunk=1000, output=12, numerics=Numerics.EXACT)
    for one, other in zip(mixed, alone, strict=True):
        assert told(one) == told(other)


def test_what_returns_does_not_change_what_is_sampled(engine):
    """The same requests with and without anything to return."""
    driver = make_driver(engine, captured=True)
    returning, silent = make_requests(), make_requests([NOTHING] * 6)
    for requests in (returning, silent):
        finish(driver, requests, chunk=48, output=12)
    assert [request.ids for request in returning] == [request.ids for request in silent]


@pytest.mark.parametrize("captured", [False, True])
def test_routing_of_a_cached_prefix_is_what_its_owner_got(engine, captured):
    driver = make_driver(engine, captured=captured)
    ids = np.random.default_rng(5).integers(6, VOCAB, 80).tolist()
    owner = Request(ids, Returns(routing=True))
    driver.run([(owner, 80)])
    for length, cached in ((70, 64), (64, 64)):
        sharer = Request(ids[:length], Returns(routing=True), cached=cached, pages=owner.pages[:2])
        driver.run([(owner, 1), (sharer, length - sharer.computed)])
        kept = 64 * 6
        assert sharer.routing[:kept] == owner.routing[:kept]
        assert len(sharer.routing) == length * 6
        driver.free(sharer)


def test_preempted_requests_go_on_where_they_ended(engine):
    requests, others = make_requests(samplings=[GREEDY] * 6), make_requests(samplings=[GREEDY] * 6)
    driver = make_driver(engine, captured=True)
    for request, other in zip(requests, others, strict=True):
        finish(driver, [other], chunk=1000, output=8, numerics=Numerics.EXACT)
        driver.run([(request, 5)], Numerics.EXACT)
        request.preempt(driver)
        while len(request.output) < 4:
            driver.run([(request, 1 if request.continues else len(request.ids) - request.computed)], Numerics.EXACT)
        request.preempt(driver)
        finish(driver, [request], chunk=33, output=8, numerics=Numerics.EXACT)
        assert told(request) == told(other)


def test_a_record_is_read_from_what_the_device_wrote():
    logits_SV = torch.zeros(1, VOCAB, device=GPU)
    zero = torch.zeros(1, dtype=torch.int64, device=GPU)
    words = records.make_records(logits_SV, zero, zero, -2.0, 3, zero[:, None]).cpu()
    record = read_records(memoryview(words.numpy().tobytes()), Returns(records=True, top_k=3, scored_ids=(0,)))[0]
    assert (record.drawn_logprob, record.rank, list(record.top_ids)) == (-2.0, 1, [0, 1, 2])
    close([record.logprob, *record.top_logprobs, *record.scored], [-np.log(VOCAB)] * 5, 1e-6)
