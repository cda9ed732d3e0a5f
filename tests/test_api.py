"""The API of a whole server, through OpenAI's own client."""

import asyncio

import openai
import pytest
import pytest_asyncio


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest_asyncio.fixture
async def async_client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, server, **fields):
    """A greedy completion of eight tokens."""
    fields = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, **fields}
    return client.completions.create(model=server.model, **fields)


IDS = {"extra_body": {"return_token_ids": True, "ignore_eos": True}}


def test_models(client, server):
    (model,) = client.models.list().data
    assert model.id == server.model and client.models.retrieve(server.model) == model
    assert model.max_model_len > 0


def test_completion(client, server):
    answer = complete(client, server, extra_body={"ignore_eos": True})
    choice = answer.choices[0]
    assert choice.finish_reason == "length" and isinstance(choice.text, str)
    assert answer.usage.prompt_tokens == len("Once upon a time")  # the test tokenizer has one token per byte
    assert answer.usage.completion_tokens == 8 and answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_streaming_gives_the_same_tokens(client, server):
    whole = complete(client, server, **IDS).choices[0]
    chunks = list(complete(client, server, stream=True, stream_options={"include_usage": True}, **IDS))
    usage = chunks.pop().usage
    assert usage.completion_tokens == 8
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == whole.token_ids
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "length"
    assert chunks[0].choices[0].prompt_token_ids == whole.prompt_token_ids


def test_prompt_as_token_ids(client, server):
    text = complete(client, server, **IDS).choices[0]
    ids = complete(client, server, prompt=text.prompt_token_ids, **IDS).choices[0]
    assert ids.prompt_token_ids == text.prompt_token_ids and ids.token_ids == text.token_ids


def test_chat(client, server):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello!"}]},
    ]
    fields = {"model": server.model, "messages": messages, "temperature": 0, "max_completion_tokens": 6}
    answer = client.chat.completions.create(**fields, extra_body={"ignore_eos": True})
    assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens == 6
    chunks = list(client.chat.completions.create(**fields, stream=True, extra_body={"ignore_eos": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    again = [answer.choices[0].message, {"role": "user", "content": "And then?"}]
    assert client.chat.completions.create(**{**fields, "messages": messages + again}).choices


def test_seed_repeats_and_no_seed_varies(client, server):
    def sample(**fields):
        return complete(client, server, temperature=1.5, max_tokens=24, **fields, **IDS).choices[0].token_ids

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert len({tuple(sample()) for _ in range(3)}) > 1


def test_top_k_1_is_greedy(client, server):
    greedy = complete(client, server, **IDS).choices[0].token_ids
    extra = {**IDS["extra_body"], "top_k": 1}
    assert complete(client, server, temperature=2, extra_body=extra).choices[0].token_ids == greedy
    assert complete(client, server, temperature=2, top_p=1e-6, **IDS).choices[0].token_ids == greedy


def test_stop_string(client, server):
    text = complete(client, server, max_tokens=64, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[len(text) // 2 :][:2]
    assert stop, "the greedy continuation has no text to stop at"
    answer = complete(client, server, max_tokens=64, stop=stop, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].text == text[: text.index(stop)]
    assert answer.usage.completion_tokens < 64
    chunks = complete(client, server, max_tokens=64, stop=[stop], stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]


def test_cached_tokens(client, server):
    fields = {"prompt": "a prefix that only this test has, " * 3, **IDS}
    first, second = complete(client, server, **fields), complete(client, server, **fields)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 64
    assert first.choices[0].token_ids == second.choices[0].token_ids


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 200}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 10_000_000}, "max_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "prompt[0]"),
        ({"extra_body": {"topk": 5}}, "topk"),
    ],
)
def test_what_is_wrong_is_named(client, server, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, server, **fields)
    assert caught.value.param == param and param in caught.value.message


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="another", prompt="a")


async def test_many_at_once(async_client, server):
    """Concurrent streams do not mix: each gives what it gives alone."""

    async def ask(i, stream):
        fields = {"prompt": f"request {i}", "max_tokens": 12, "temperature": 0, **IDS}
        answer = await async_client.completions.create(model=server.model, stream=stream, **fields)
        if not stream:
            return answer.choices[0].token_ids
        return [token async for chunk in answer for token in chunk.choices[0].token_ids]

    alone = [await ask(i, False) for i in range(6)]
    together = await asyncio.gather(*(ask(i, stream) for i in range(6) for stream in (True, False)))
    assert together == [tokens for tokens in alone for _ in range(2)]


async def test_a_client_that_leaves_frees_its_place(async_client, server):
    running = "nmoe:num_requests_running"
    stream = await async_client.completions.create(
        model=server.model, prompt="a", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    before = server.metrics()['nmoe:request_success_total{finished_reason="abort"}']
    await stream.close()
    async with asyncio.timeout(5):
        while True:
            metrics = server.metrics()
            if metrics[running] == 0 and metrics['nmoe:request_success_total{finished_reason="abort"}'] == before + 1:
                break
            await asyncio.sleep(0.02)
