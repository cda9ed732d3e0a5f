"""Generation against a scripted scheduler: prompts, answers, streams, stop strings, leaving clients."""

import array
import asyncio
import json

import pytest
import pytest_asyncio

from nmoe import ipc
from nmoe.frontend.streams import Streams
from nmoe.messages import Abort, Ended, Finish, Hello, Rejected, Serving, Submit, Tokens
from tests.scripted import BOS, EOS, MAX_SEQ_LEN, Rig, events, ids_of, ints, run, write_model
from tests.test_tokenizer import failing, save

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest_asyncio.fixture(scope="module")
async def rig(tmp_path_factory):
    async with Rig(write_model(tmp_path_factory.mktemp("model"))) as running:
        yield running


async def answer(rig, path, output, reason="length", **body):
    """The JSON of a request that the scheduler answers with `output`, and its Submit."""
    asked = run(rig.ask(path, **body))
    submit = await rig.next(Submit)
    await rig.tokens(submit, output, reason)
    status, _, document = await asked
    assert status == 200, document
    return document, submit


async def stream(rig, path, pieces, reason="length", **body):
    """The events of a streaming request whose tokens come in `pieces`, and its Submit."""

    async def read():
        async with rig.post(path, stream=True, **body) as response:
            return await events(response)

    reading = run(read())
    submit = await rig.next(Submit)
    for piece in pieces:
        await rig.tokens(submit, piece)
        await asyncio.sleep(0.002)
    await rig.tokens(submit, "", reason)
    return await reading, submit


async def test_completion(rig):
    document, submit = await answer(rig, COMPLETIONS, "héllo", prompt="hi", max_tokens=6, model="tiny")
    assert ints(submit.prompt) == [BOS, *ids_of("hi")]
    assert document["object"] == "text_completion" and document["model"] == "tiny"
    assert document["id"] == f"cmpl-{submit.uid:x}"
    assert document["choices"] == [{"index": 0, "text": "héllo", "logprobs": None, "finish_reason": "length"}]
    assert document["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_chat(rig):
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "d"},
    ]
    document, submit = await answer(rig, CHAT, [*ids_of("yes"), EOS], "stop", messages=messages)
    # The template writes BOS itself; role markers that are special tokens become them.
    assert ints(submit.prompt) == ids_of("<bos><system>Be kind.<user>a\nb<assistant>c<user>d<assistant>")
    assert submit.max_tokens == MAX_SEQ_LEN - len(ints(submit.prompt))  # to the context's end
    assert document["object"] == "chat.completion" and document["id"] == f"chatcmpl-{submit.uid:x}"
    message = {"role": "assistant", "content": "yes", "refusal": None}
    assert document["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert document["usage"]["completion_tokens"] == 4


async def test_sampling_reaches_the_scheduler(rig):
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 11}
    _, submit = await answer(rig, COMPLETIONS, "x", prompt=[5, 6], max_tokens=3, **fields)
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 11)
    assert submit.max_tokens == 3 and submit.eos_ids == (EOS,) and ints(submit.prompt) == [5, 6]


async def test_defaults_are_openais(rig):
    _, submit = await answer(rig, COMPLETIONS, "x", prompt="a", stop=None, seed=None, logprobs=None)
    assert submit.max_tokens == 16 and submit.n == 1 and submit.profile == "production_generate"
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.sampling.top_k) == (1.0, 1.0, 0)
    _, other = await answer(rig, COMPLETIONS, "x", prompt="a")
    assert submit.sampling.seed != other.sampling.seed and submit.uid != other.uid


async def test_default_length_ends_with_the_context(rig):
    _, submit = await answer(rig, COMPLETIONS, "x", prompt=[5] * (MAX_SEQ_LEN - 3))
    assert submit.max_tokens == 3


async def test_numbers_that_mean_off(rig):
    _, submit = await answer(rig, COMPLETIONS, "x", prompt="a", top_k=-1, seed=-1, ignore_eos=True)
    assert submit.sampling.top_k == 0 and submit.sampling.seed == 2**63 - 1 and submit.eos_ids == ()


async def test_cached_tokens_are_reported(rig):
    asked = run(rig.ask(COMPLETIONS, prompt="abc"))
    await rig.tokens(await rig.next(Submit), "x", "length", cached_tokens=3)
    _, _, document = await asked
    assert document["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


@pytest.mark.parametrize("is_chat", [False, True])
async def test_stream(rig, is_chat):
    body = {"messages": [{"role": "user", "content": "a"}]} if is_chat else {"prompt": "a"}
    # é in two tokens that come apart, EOS without text.
    pieces = ["h", ids_of("é")[:1], ids_of("é")[1:], "llo", [EOS]]
    found, submit = await stream(rig, CHAT if is_chat else COMPLETIONS, pieces, "stop", **body)
    assert found.pop() == "[DONE]"
    ids = {chunk["id"] for chunk in found}
    assert ids == {f"{'chatcmpl' if is_chat else 'cmpl'}-{submit.uid:x}"}
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk" if is_chat else "text_completion"}
    choices = [chunk["choices"][0] for chunk in found]
    if is_chat:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""} and choices[-1]["delta"] == {}
        texts = [choice["delta"]["content"] for choice in choices[1:-1]]
    else:
        assert choices[-1]["text"] == ""
        texts = [choice["text"] for choice in choices[:-1]]
    assert texts == ["h", "", "é", "llo", ""]  # one event for each of the scheduler's
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert not any("usage" in chunk for chunk in found)


async def test_a_streams_headers(rig):
    """Some clients, requests for one, read text of which they are not told that it is UTF-8 as Latin-1; nginx holds
    events back unless it is told not to."""

    async def read():
        async with rig.post(COMPLETIONS, prompt="a", stream=True) as response:
            await response.read()
            return response.headers

    reading = run(read())
    await rig.tokens(await rig.next(Submit), "ü", "length")
    headers = await reading
    assert headers["Content-Type"] == "text/event-stream; charset=utf-8" and headers["Cache-Control"] == "no-cache"
    assert headers["X-Accel-Buffering"] == "no"


async def test_an_event_is_one_line_to_every_client(rig):
    text = "a\x85b\u2028c\u2029dé"

    async def read():
        async with rig.post(COMPLETIONS, stream=True, prompt="hi") as response:
            return await response.text()

    reading = run(read())
    await rig.tokens(await rig.next(Submit), text, "length")
    lines = [line.removeprefix("data: ") for line in (await reading).splitlines() if line]
    assert lines.pop() == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == text


@pytest.mark.parametrize("is_chat", [False, True])
async def test_stream_with_ids_and_usage(rig, is_chat):
    body = {"messages": [{"role": "user", "content": "a"}]} if is_chat else {"prompt": "a"}
    options = {"return_token_ids": True, "stream_options": {"include_usage": True}}
    pieces = ["ab", "c", [EOS]]
    found, submit = await stream(rig, CHAT if is_chat else COMPLETIONS, pieces, "stop", **body, **options)
    assert found.pop() == "[DONE]"
    usage = found.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in found)
    assert [token for chunk in found for token in chunk["choices"][0]["token_ids"]] == [*ids_of("abc"), EOS]
    places = [chunk if is_chat else chunk["choices"][0] for chunk in found]
    assert places[0]["prompt_token_ids"] == ints(submit.prompt)
    assert not any("prompt_token_ids" in place for place in places[1:])


@pytest.mark.parametrize("is_chat", [False, True])
async def test_token_ids_without_streaming(rig, is_chat):
    body = {"messages": [{"role": "user", "content": "a"}]} if is_chat else {"prompt": "a"}
    path = CHAT if is_chat else COMPLETIONS
    document, submit = await answer(rig, path, [*ids_of("ab"), EOS], "stop", return_token_ids=True, **body)
    choice = document["choices"][0]
    assert choice["token_ids"] == [*ids_of("ab"), EOS]
    assert (document if is_chat else choice)["prompt_token_ids"] == ints(submit.prompt)


STOPPED = [
    # the tokens' texts, the stop strings, the text that comes out, tokens counted
    (["he", "ll", "o"], "ll", "he", 4),
    (["he", "l", "lo", "!"], ["lo"], "hel", 5),  # across tokens
    ([*"abcabd"], ["abd", "zz"], "abc", 6),  # a beginning that turned out to be none
    ([*"aaab"], ["aab"], "a", 4),
    (["x", ids_of("中")[:1], ids_of("中")[1:2], ids_of("中")[2:], "y"], "中", "x", 4),  # across bytes
    (["a\n", "\nb"], ["\n\n"], "a", 3),
    (["stop"], ["stop"], "", 4),
]


@pytest.mark.parametrize(("pieces", "stop", "text", "count"), STOPPED)
async def test_stop_string(rig, pieces, stop, text, count):
    asked = run(rig.ask(COMPLETIONS, prompt="a", stop=stop, return_token_ids=True, max_tokens=50))
    submit = await rig.next(Submit)
    for piece in pieces:
        await rig.tokens(submit, piece)
    finish = await rig.next(Finish)
    assert (finish.uid, finish.count) == (submit.uid, count)
    await rig.tokens(submit, "more", "stop")  # was in flight
    status, _, document = await asked
    choice = document["choices"][0]
    assert status == 200 and choice["text"] == text and choice["finish_reason"] == "stop"
    assert document["usage"]["completion_tokens"] == count == len(choice["token_ids"])


@pytest.mark.parametrize(("pieces", "stop", "text", "count"), STOPPED)
async def test_stop_string_in_a_stream(rig, pieces, stop, text, count):
    async def read():
        async with rig.post(COMPLETIONS, prompt="a", stop=stop, stream=True, max_tokens=50) as response:
            return await events(response)

    reading = run(read())
    submit = await rig.next(Submit)
    for piece in pieces:
        await rig.tokens(submit, piece)
        await asyncio.sleep(0.002)
    assert (await rig.next(Finish)).count == count
    await rig.tokens(submit, "more", "stop")
    *chunks, done = await reading
    assert done == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


async def test_text_held_back_comes_at_the_end(rig):
    document, _ = await answer(rig, COMPLETIONS, "hello wor", prompt="a", stop=["world"])
    assert document["choices"][0]["text"] == "hello wor" and document["choices"][0]["finish_reason"] == "length"
    found, _ = await stream(rig, COMPLETIONS, ["hello ", "wo", "r"], prompt="a", stop=["world"])
    texts = [chunk["choices"][0]["text"] for chunk in found[:-1]]
    assert texts == ["hello ", "", "", "wor"]


async def test_half_a_character_at_the_end(rig):
    document, _ = await answer(rig, COMPLETIONS, ids_of("a中")[:3], prompt="a")
    assert document["choices"][0]["text"] == "a�"


async def test_stop_string_with_the_last_token_needs_no_finish(rig):
    document, _ = await answer(rig, COMPLETIONS, "ab", "length", prompt="a", stop="b")
    assert document["choices"][0]["text"] == "a" and document["choices"][0]["finish_reason"] == "stop"
    assert await rig.silent()


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("tokens_first", [False, True])
async def test_a_client_that_leaves_is_aborted(rig, is_stream, tokens_first):
    async def ask():
        async with rig.post(COMPLETIONS, prompt="a", stream=is_stream) as response:
            await response.read()

    asking = run(ask())
    submit = await rig.next(Submit)
    if tokens_first:
        await rig.tokens(submit, "x")
        await asyncio.sleep(0.01)
    asking.cancel()
    abort = await rig.next(Abort)  # although nothing is written that could fail
    assert abort.uid == submit.uid
    await rig.tokens(submit, "y", "abort")  # still in flight; nobody is there
    assert await rig.silent()
    assert (await answer(rig, COMPLETIONS, "fine", prompt="a"))[0]["choices"][0]["text"] == "fine"


async def test_a_client_that_leaves_after_its_stop_string_is_not_aborted(rig):
    asking = run(rig.ask(COMPLETIONS, prompt="a", stop="x"))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "x")
    await rig.next(Finish)
    asking.cancel()
    assert await rig.silent()
    await rig.tokens(submit, "", "stop")


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (429, "rate_limit_error")])
async def test_rejected(rig, is_stream, status, kind):
    asked = run(rig.ask(COMPLETIONS, prompt="a", stream=is_stream))
    submit = await rig.next(Submit)
    await rig.send(Rejected(rig.generation, submit.uid, status, "the queue is full: 4096 requests"))
    got, headers, document = await asked
    assert got == status and ("Retry-After" in headers) == (status == 429)
    assert document["error"] == {
        "message": "the queue is full: 4096 requests",
        "type": kind,
        "param": None,
        "code": None,
    }


async def test_error_from_the_scheduler(rig):
    asked = run(rig.ask(COMPLETIONS, prompt="a"))
    await rig.tokens(await rig.next(Submit), "x", "error", detail="step 7 failed")
    status, _, document = await asked
    assert status == 503 and document["error"]["message"] == "step 7 failed"
    # A stream whose head is out says so in an event, and does not say [DONE].
    found, _ = await stream(rig, COMPLETIONS, ["x"], "error", prompt="a")
    assert found[0]["choices"][0]["text"] == "x"
    assert found[1]["error"]["type"] == "server_error" and len(found) == 2


async def test_requests_share_a_message(rig):
    """Tokens of several streams come in one message, some with several tokens or none."""
    asked = [run(rig.ask(COMPLETIONS, prompt="a", max_tokens=9)) for _ in range(3)]
    submits = [await rig.next(Submit) for _ in range(3)]
    texts = ["ab", "", "xyz"]
    uids = [submit.uid for submit in submits]
    ids = [token for text in texts for token in ids_of(text)]
    message = Tokens(
        rig.generation,
        array.array("q", [*uids, 12345]).tobytes(),
        array.array("i", [*ids, 7]).tobytes(),
        array.array("i", [2, 0, 3, 1]).tobytes(),  # a uid that is unknown here is nobody's
        tuple(Ended(uid, "length") for uid in uids),
    )
    await rig.send(message)
    by_id = {document["id"]: document["choices"][0]["text"] for _, _, document in await asyncio.gather(*asked)}
    assert by_id == {f"cmpl-{uid:x}": text for uid, text in zip(uids, texts, strict=True)}


async def test_one_token_per_request_needs_no_counts(rig):
    asked = run(rig.ask(COMPLETIONS, prompt="a"))
    submit = await rig.next(Submit)
    uids = array.array("q", [submit.uid]).tobytes()
    for letter in "abc":
        await rig.send(Tokens(rig.generation, uids, array.array("i", ids_of(letter)).tobytes()))
    await rig.send(Tokens(rig.generation, b"", b"", None, (Ended(submit.uid, "length"),)))
    assert (await asked)[2]["choices"][0]["text"] == "abc"


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("piece", ["▁", "<0x20>"])
async def test_a_tokenizer_that_panics_ends_its_own_request_only(tmp_path, piece, streams):
    """On ▁ as it comes; on a byte, which may be a part of a character, at the end."""
    folder, library = write_model(tmp_path), failing()
    save(library, folder)
    async with Rig(folder) as rig:
        asked, other = run(text_of(rig, prompt="a", stream=streams)), run(rig.ask(COMPLETIONS, prompt="a"))
        submits = [await rig.next(Submit), await rig.next(Submit)]
        ids = [library.token_to_id(piece), library.token_to_id("world")]
        uids = array.array("q", [submit.uid for submit in submits]).tobytes()
        ends = tuple(Ended(submit.uid, "length") for submit in submits)
        await rig.send(Tokens(rig.generation, uids, array.array("i", ids).tobytes(), None, ends))
        status, _, document = await other
        assert status == 200 and document["choices"][0]["text"] == "world"
        status, text = await asked
        assert (status == 500 or streams) and "the model's tokenizer fails on these tokens" in text
        asked = run(text_of(rig, prompt="a"))
        submit = await rig.next(Submit)
        await rig.tokens(submit, ids[1:], "length")
        assert (await asked)[0] == 200
        status, _, document = await rig.ask("/detokenize", tokens=ids[:1])
        assert status == 500 and "tokenizer fails" in document["error"]["message"]


async def test_whatever_a_message_does_the_next_is_received(tmp_path, monkeypatch):
    class Panic(BaseException):
        pass

    def fail(*_):
        monkeypatch.undo()
        raise Panic

    async with Rig(write_model(tmp_path)) as rig:
        asked = run(rig.ask(COMPLETIONS, prompt="a"))
        submit = await rig.next(Submit)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        monkeypatch.setattr(Streams, "deliver", fail)
        # Both are there when the socket is looked at.
        encoded = [rig._encode(Tokens(1, b"", b"", None, (Ended(uid, "length"),))) for uid in (5, submit.uid)]
        for data in encoded:
            rig.router.send_multipart([ipc.identity(0), data])
        assert (await asked)[0] == 200
        asyncio.get_running_loop().set_exception_handler(None)


async def test_the_death_of_the_scheduler(tmp_path):
    async with Rig(write_model(tmp_path)) as rig:
        asked = run(rig.ask(COMPLETIONS, prompt="a"))
        old = await rig.next(Submit)
        rig.restart_scheduler()
        status, _, document = await asked
        assert status == 503 and "restarted" in document["error"]["message"]
        assert (await rig.ask(COMPLETIONS, prompt="a"))[0] == 503
        await rig.next(Hello)
        await rig.send(Serving(rig.generation, MAX_SEQ_LEN))
        await rig.tokens(old, "x")  # means nothing to anyone
        document, _ = await answer(rig, COMPLETIONS, "b", prompt="a")
        assert document["choices"][0]["text"] == "b"
        assert rig.launcher.receive() is None  # Up is said once


async def text_of(rig, **body):
    async with rig.post(COMPLETIONS, **body) as response:
        return response.status, await response.text()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("workers_only", [False, True])
async def test_what_a_stop_string_has_completed_survives_the_engine(tmp_path, streams, workers_only):
    async with Rig(write_model(tmp_path)) as rig:
        asked = run(text_of(rig, prompt="a", stop="c", stream=streams))
        submit = await rig.next(Submit)
        await rig.tokens(submit, "abcd")
        assert (await rig.next(Finish)).count == 3
        if workers_only:
            await rig.tokens(submit, "", "error")
        else:
            rig.restart_scheduler()
        status, text = await asked
        assert status == 200 and '"ab"' in text and '"finish_reason":"stop"' in text
        assert ("[DONE]" in text) == streams and '"error"' not in text


async def test_more_answers_than_the_queue_holds_are_refused_for_good(tmp_path):
    async with Rig(write_model(tmp_path), max_queue=3) as rig:
        for fields, param in (({"prompt": ["a"] * 2, "n": 2}, "prompt"), ({"prompt": "a", "n": 4}, "n")):
            status, headers, document = await rig.ask(COMPLETIONS, **fields)
            assert status == 400 and "Retry-After" not in headers
            assert document["error"]["param"] == param and "max_queue = 3" in document["error"]["message"]
        asked = run(rig.ask(COMPLETIONS, prompt=["a"] * 3))
        for _ in range(3):
            await rig.tokens(await rig.next(Submit), "x", "length")
        assert (await asked)[0] == 200


async def test_a_new_scheduler_ends_what_the_old_one_had(tmp_path):
    async with Rig(write_model(tmp_path)) as rig:
        asked = run(rig.ask(COMPLETIONS, prompt="a"))
        submit = await rig.next(Submit)
        rig.generation = 2
        await rig.send(Serving(2, MAX_SEQ_LEN))
        status, _, document = await asked
        assert status == 503 and "restarted" in document["error"]["message"]
        assert rig.launcher.receive() is None  # Up is said once
        # What the old one still had to say is dropped.
        asked = run(rig.ask(COMPLETIONS, prompt="a"))
        submit = await rig.next(Submit)
        rig.generation = 1
        await rig.tokens(submit, "old")
        rig.generation = 2
        await rig.tokens(submit, "new", "length")
        assert (await asked)[2]["choices"][0]["text"] == "new"
