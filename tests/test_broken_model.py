"""A model whose logits are not finite: its requests end with an error that says so, and nobody else notices.

The checkpoint's embedding of one token is NaN. So a request is well until that token is in its context, and the others
of its batch, which share experts and pages with it, always are.
"""

import asyncio
import json

import aiohttp
import pytest
import torch

from nmoe.client import Client
from nmoe.errors import RequestError
from tests.checkpoints import load_tensors, make_checkpoint, save_shards
from tests.serving import Server

POISON = 200
GOOD = {"prompt": [7, 8, 9, 10], "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 2}
SPREAD = GOOD | {"temperature": 0.8, "seed": 5, "logit_bias": {str(POISON): -100}}
BAD = GOOD | {"prompt": [7, 8, POISON]}
SAMPLINGS = [{}, {"temperature": 1, "top_k": 5}, {"frequency_penalty": 1.0, "logit_bias": {"3": 100}}]


@pytest.fixture(scope="module", params=[1, 2])
def server(tmp_path_factory, request):
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "broken")
    tensors = load_tensors(folder)
    tensors["model.embed_tokens.weight"][POISON] = torch.nan
    save_shards(folder, tensors, 1)
    engine = {"num_pages": 24, "page_size": 4, "max_batch_size": 8, "max_prefill_tokens": 32}
    parallel = {"world_size": request.param, "device": "cpu"}
    with Server({"model": {"path": str(folder)}, "parallel": parallel, "engine": engine}) as running:
        yield running


def ask_all(server, bodies):
    """Status and document or events of each, sent at once."""

    async def ask(session, body):
        async with session.post("/v1/completions", json=body) as response:
            text = await response.text()
            if not response.headers["Content-Type"].startswith("text/event-stream"):
                return response.status, json.loads(text)
            return response.status, text.removesuffix("\n\n").split("\n\n")

    async def run():
        async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(ask(session, body) for body in bodies))

    return asyncio.run(run())


def check(error):
    assert (error["type"], error["code"], error["param"]) == ("server_error", "logits_not_finite", None)
    assert error["message"] == "the model's logits are not finite here; check the checkpoint and [model] dtype"


def told(answer):
    """A choice without what tells one request from another."""
    status, document = answer
    assert status == 200, document
    return document["choices"]


@pytest.mark.parametrize(
    "fields",
    [
        *SAMPLINGS,
        {"n": 3},
        {"max_tokens": 0, "prompt_logprobs": 1},
        {"prompt": [7, POISON, *range(30, 70)], "max_tokens": 0, "prompt_logprobs": 0},
        {"prompt": [[7, 8], [POISON, 8]]},
        {"stream": True},
        {"return_routed_experts": True, "top_k_logprobs": 128},
        {"profile": "rl_sample"},
        {"profile": "eval_exact"},
        {"profile": "offline_distill", "logprob_token_ids": [1, POISON]},
    ],
    ids=str,
)
def test_a_request_ends_with_an_error_that_names_the_cause(server, fields):
    ((status, document),) = ask_all(server, [BAD | fields])
    assert status == 500
    check(document["error"])


def test_a_stream_that_has_begun_ends_with_an_error_event(server):
    # The poison is a token of its own: of the two that the bias leaves, the other comes first, until it is penalised.
    fields = {"stream": True, "max_tokens": 80, "logit_bias": {"3": 100, str(POISON): 20}, "frequency_penalty": 2}
    ((status, events),) = ask_all(server, [GOOD | fields])
    assert status == 200 and 1 < len(events) < 80 and "[DONE]" not in events[-1]
    check(json.loads(events[-1].removeprefix("data: "))["error"])


def test_logits_in_bulk_end_with_the_same_error(server):
    with Client(server.url) as client:
        for prompt in ([7, 8, POISON], [POISON, 8, 7]):
            with pytest.raises(RequestError, match="logits are not finite") as error:
                client.generate(prompt, max_tokens=3, prompt_logprobs=0, logits=True)
            assert (error.value.status, error.value.code) == (500, "logits_not_finite")
        assert client.generate([7, 8], max_tokens=2, logits=True, logit_bias={str(POISON): -100}).choices


def test_others_of_the_batch_do_not_notice(server):
    alone = [told(ask_all(server, [body])[0]) for body in (GOOD, SPREAD)]
    mixed = [body for place in range(10) for body in (GOOD, BAD | SAMPLINGS[place % 3], SPREAD)]
    errors = server.metrics().get('nmoe:request_success_total{finished_reason="error"}', 0)
    answers = ask_all(server, mixed)
    for place in range(0, 30, 3):
        for answer, expected in zip((answers[place], answers[place + 2]), alone, strict=True):
            (choice,) = told(answer)
            assert choice["text"] == expected[0]["text"]
            assert choice["logprobs"]["token_ids"] == expected[0]["logprobs"]["token_ids"]
        status, document = answers[place + 1]
        assert status == 500
        check(document["error"])
    assert server.metrics()['nmoe:request_success_total{finished_reason="error"}'] == errors + 10
    assert server.healthy()


def test_a_mask_that_leaves_one_token_is_no_error(server):
    stops = list(range(20, 36))
    body = GOOD | {"logit_bias": {str(i): -100 for i in range(500) if i != 77}, "stop_token_ids": stops}
    (choice,) = told(ask_all(server, [body | {"min_tokens": 3, "repetition_penalty": 0.01, "ignore_eos": False}])[0])
    assert len(choice["logprobs"]["token_ids"]) == 12
    assert all(isinstance(number, float) for number in choice["logprobs"]["token_logprobs"])
