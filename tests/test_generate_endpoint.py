"""`POST /v1/generate` and its client: tensors equal to what JSON says, logits in frames, clients that do not read."""

import array
import asyncio
import json
import socket
import struct
import tracemalloc
import urllib.request

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.client import AsyncClient, Client, decode_arrays, request_body
from nmoe.errors import RequestError
from nmoe.frontend import bulk, packed
from nmoe.messages import Abort, Ended, Hello, Rejected, Release, Submit, Tokens
from nmoe.native import FRAME_HEAD, Answer, Logits
from nmoe.outputs import pack
from tests.scripted import TIMEOUT, VOCAB_SIZE, Rig, ids_of, ints, run, write_model

PROMPT = list(range(5, 45))


# --------------------------------------------------------------------------------------------------------- the engine


def post(url, body):
    """The JSON of a POST."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def client(server):
    """A client of the shared server; one connection for all that it asks."""
    with Client(server.url) as made:
        yield made


def test_tensors_say_what_json_says(server, client):
    fields = {
        "prompt": PROMPT,
        "max_tokens": 7,
        "seed": 3,
        "ignore_eos": True,
        "logprobs": 4,
        "prompt_logprobs": 2,
        "top_k_logprobs": 5,
        "logprob_token_ids": [9, 4],
    }
    answer = client.generate(**fields)
    (choice,) = answer.choices
    body = post(f"{server.url}/v1/completions", {**fields, "return_token_ids": True})
    (same,) = body["choices"]
    assert (choice.text, choice.finish_reason, choice.index) == (same["text"], same["finish_reason"], 0)
    assert choice.token_ids.tolist() == same["token_ids"] and choice.prompt_token_ids.tolist() == PROMPT
    assert (answer.model, answer.usage) == (body["model"], body["usage"]) and answer.id.startswith("gen-")
    close = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(choice.logprobs, same["logprobs"]["token_logprobs"], **close)
    np.testing.assert_allclose(choice.drawn_logprobs, same["logprobs"]["drawn_logprobs"], **close)
    assert choice.top_k_ids.tolist() == same["top_k_logprobs"]["ids"]
    np.testing.assert_allclose(choice.top_k_logprobs, same["top_k_logprobs"]["logprobs"], **close)
    np.testing.assert_allclose(choice.token_id_logprobs, same["token_id_logprobs"], **close)
    told = [entry[str(token)] for token, entry in zip(PROMPT[1:], same["prompt_logprobs"][1:], strict=True)]
    np.testing.assert_allclose(choice.prompt_logprobs, [entry["logprob"] for entry in told], **close)
    assert choice.prompt_ranks.tolist() == [entry["rank"] for entry in told]
    assert choice.prompt_top_k_ids.tolist() == same["prompt_top_k_logprobs"]["ids"][1:]
    np.testing.assert_allclose(choice.prompt_top_k_logprobs, same["prompt_top_k_logprobs"]["logprobs"][1:], **close)
    np.testing.assert_allclose(choice.prompt_token_id_logprobs, same["prompt_token_id_logprobs"][1:], **close)
    assert choice.logits is None and choice.prompt_logits is None and choice.routed_experts is None


def test_what_is_not_asked_for_does_not_come(client):
    (choice,) = client.generate("hello", max_tokens=2).choices
    present = {name for name in choice.__struct_fields__ if getattr(choice, name) is not None}
    assert present == {"index", "text", "finish_reason", "token_ids", "prompt_token_ids"}


def test_logits_are_the_models(client, checkpoint):
    from transformers import AutoModelForCausalLM

    answer = client.generate(PROMPT, max_tokens=6, temperature=0, ignore_eos=True, prompt_logprobs=0, logits=True)
    (choice,) = answer.choices
    ids = [*PROMPT, *choice.token_ids.tolist()]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint)(torch.tensor([ids])).logits[0].numpy()
    logits = np.concatenate([choice.prompt_logits, choice.logits])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected[:-1], rtol=1e-4, atol=1e-4)
    logprobs = torch.log_softmax(torch.from_numpy(logits), -1).numpy()[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(np.concatenate([choice.prompt_logprobs, choice.logprobs]), logprobs, rtol=0, atol=1e-5)


def test_many_choices_have_their_own_logits_and_one_prompt(client):
    answer = client.generate(
        [PROMPT[:9], np.array([7, 8, 9])], n=2, max_tokens=3, seed=5, ignore_eos=True, prompt_logprobs=0, logits=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        length = len(answer.choices[choice.index // 2 * 2].prompt_token_ids)
        assert choice.logits.shape == (3, 512)
        assert (choice.prompt_logits is None) == (choice.prompt_token_ids is None) == (choice.index % 2 == 1)
        if choice.index % 2 == 0:
            assert choice.prompt_logits.shape == (length - 1, 512)
    lengths = [len(answer.choices[index].prompt_token_ids) for index in (0, 2)]
    assert lengths == [9, 3]


def test_a_prompt_alone_is_scored(client):
    (choice,) = client.generate(PROMPT, max_tokens=0, prompt_logprobs=0, logits=True).choices
    assert choice.prompt_logits.shape == (len(PROMPT) - 1, 512) and choice.token_ids.shape == (0,)
    (choice,) = client.generate([7], max_tokens=0, prompt_logprobs=0, logits=True).choices
    assert choice.prompt_logits is None and choice.prompt_logprobs.shape == (0,)


def test_a_stop_string_cuts_logits_and_logprobs_alike(client):
    fields = {"prompt": "hello", "temperature": 0, "max_tokens": 12, "logprobs": 0, "ignore_eos": True}
    (whole,) = client.generate(**fields).choices
    stop = next(text for text in whole.text[2:] if text.isprintable() and text != "\ufffd")
    (cut,) = client.generate(**fields, stop=[stop], logits=True).choices
    assert cut.finish_reason == "stop" and 0 < len(cut.token_ids) < 12
    assert len(cut.logits) == len(cut.logprobs) == len(cut.token_ids)
    np.testing.assert_allclose(cut.logprobs, whole.logprobs[: len(cut.logprobs)], rtol=0, atol=1e-5)


async def test_both_clients_see_the_same_and_parts_come_in_order(server, client):
    fields = {"max_tokens": 2, "temperature": 0, "prompt_logprobs": 0, "logits": True, "logprobs": 1}
    async with AsyncClient(server.url) as asynchronous:
        answers = await asyncio.gather(*(asynchronous.generate(PROMPT, **fields) for _ in range(5)))
        parts = [part async for part in asynchronous.parts(PROMPT, **fields)]
    here = client.generate(PROMPT, **fields)
    for answer in answers:
        np.testing.assert_array_equal(answer.choices[0].token_ids, here.choices[0].token_ids)
        np.testing.assert_allclose(answer.choices[0].prompt_logits, here.choices[0].prompt_logits, atol=1e-4)
    assert isinstance(parts[-1], Answer) and all(isinstance(part, Logits) for part in parts[:-1])
    rows = {"prompt_logits": 0, "logits": 0}
    for part in parts[:-1]:
        assert part.first == rows[part.name]
        rows[part.name] += len(part.rows)
    assert rows == {"prompt_logits": len(PROMPT) - 1, "logits": len(parts[-1].choices[0].token_ids)}


def test_a_refusal_is_an_error_with_its_field(client):
    with pytest.raises(RequestError, match="temperature") as error:
        client.generate("x", temperature=9)
    assert (error.value.status, error.value.param) == (400, "temperature")
    with pytest.raises(RequestError, match="stream: unknown field"):
        client.generate("x", stream=True)
    assert client.generate("x", max_tokens=1).choices  # the connection goes on
    with pytest.raises(ValueError, match="2\\*\\*31"):
        client.generate([1 << 31])
    for prompt in (None, {}, 1.5, [True], [1.5], [None]):
        with pytest.raises(RequestError, match="prompt") as error:
            client.generate(prompt)
        assert error.value.status == 400


def test_token_ids_come_in_any_sequence_of_integers():
    packed = request_body({"prompt": [5, 6]})
    for prompt in ((5, 6), range(5, 7), np.array([5, 6]), [np.int64(5), np.int32(6)]):
        assert request_body({"prompt": prompt}) == packed


def test_the_description_knows_it(server):
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=10) as response:
        described = json.load(response)
    operation = described["paths"]["/v1/generate"]["post"]
    assert list(operation["requestBody"]["content"]) == ["application/msgpack"]
    fields = described["components"]["schemas"]["GenerateRequest"]["properties"]
    assert "logits" in fields and "stream" not in fields


# ---------------------------------------------------------------------------------------------------------- the body


@pytest.fixture
async def rig(tmp_path):
    async with Rig(write_model(tmp_path)) as made:
        yield made


async def send(rig, body, content_type="application/msgpack"):
    """Status and error of a body that is refused."""
    async with rig.session.post("/v1/generate", data=body, headers={"Content-Type": content_type}) as response:
        return response.status, (await response.json())["error"]


@pytest.mark.parametrize("prompt", [bytes((1 << 22) + 4), [bytes(1 << 22), bytes(4)]])
def test_packed_ids_are_bounded(prompt):
    with pytest.raises(RequestError, match="more than 1048576 token ids in one body") as refusal:
        packed.unpack_object(msgspec.msgpack.encode({"prompt": prompt}))
    assert refusal.value.status == 413
    ids = packed.unpack_object(msgspec.msgpack.encode({"prompt": bytes(1 << 22)}))["prompt"]
    assert ids == [0] * (1 << 20)


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"", 400, "not valid msgpack"),
        (b"\x93\x01\x02\x03", 400, "must be a map"),
        (b"\x81\x01\x02", 400, "must be a map"),
        (b"\x81\x80\x02", 400, "not valid msgpack"),
        (b"\x82\xa1n\x01\xa1n\x02", 400, "more than once"),
        (b"\xde\x00\x02\xa1n\x01\xa1n\x02", 400, "n: appears more than once"),
        (b"\x81\xaalogit_bias\x82\xa11\x01\xd9\x011\x02", 400, "logit_bias.1: appears more than once"),
        (b"\x81\xa1x\x92\xc0\x81\xa1a\x91\x82\xa1b\x01\xa1b\x02", 400, "x[1].a[0].b: appears more than once"),
        (b"\x81\xaalogit_bias\xde\x00\x02\xa11\x01\xa11\x02", 400, "logit_bias.1: appears more than once"),
        (b"\x82\x91\xa1a\x01\x91\xa1a\x02", 400, "more than once"),
        (b"\x82\xa6prompt\xa1x\xaalogit_bias\x81\x91\xa15\x01", 400, "logit_bias"),
        (b"\x91" * 3000, 400, "nested too deeply"),
        (b"\x81\xa1a" * 900 + b"\x01", 400, ""),
        (b"\x81\xa1a" * 20_000 + b"\x01", 400, "nested too deeply"),
        (b"\x81\xa1\xff\x01", 400, "not valid msgpack"),
        (msgspec.msgpack.encode({"prompt": b"abc"}), 400, "prompt: 3 bytes"),
        (msgspec.msgpack.encode({"prompt": [b"abcd", b"abc"]}), 400, "prompt[1]: 3 bytes"),
        (msgspec.msgpack.encode({"prompt": b"\xff" * 4}), 400, "prompt[0] = -1"),
        (msgspec.msgpack.encode({"prompt": "x", "temperature": float("nan")}), 400, "temperature"),
        (msgspec.msgpack.encode({"prompt": "x", "user": b"me"}), 400, "user"),
        (msgspec.msgpack.encode({"prompt": "x", "seed": msgspec.msgpack.Ext(5, b"x")}), 400, "seed"),
        (msgspec.msgpack.encode({"prompt": "x", "stream": False}), 400, "stream: unknown field"),
        (msgspec.msgpack.encode({"prompt": [1] * 300_000}), 413, "262144 values; send token ids as the bytes"),
        (b"\x82\xa6prompt\xa1x\xa8metadata\x82\xa1a\xa1b\xa1a\xa1c", 400, "appears more than once"),
        (b"\x82\xa6prompt\xa1x\xaalogit_bias\xde\x00\x02\xa15\x01\xa15\x02", 400, "appears more than once"),
    ],
    ids=range(25),
)
async def test_bad_bodies_get_the_usual_error(rig, body, status, told):
    got, error = await send(rig, body)
    assert got == status and told in error["message"]


async def test_json_is_another_endpoint(rig):
    got, error = await send(rig, b"{}", "application/json")
    assert got == 415 and "send application/msgpack" in error["message"]


scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary()
documents = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


def num_values(value):
    if isinstance(value, list):
        return 1 + sum(map(num_values, value))
    if isinstance(value, dict):
        return 1 + sum(1 + num_values(item) for item in value.values())
    return 1


@settings(max_examples=60)
@given(documents, st.integers(0, 20))
def test_values_are_counted_without_being_made(document, most):
    body = msgspec.msgpack.encode(document)
    before, packed.MAX_VALUES = packed.MAX_VALUES, most
    try:
        if num_values(document) > most:
            with pytest.raises(RequestError, match="more than"):
                packed._look_through(body)
        else:
            packed._look_through(body)
    finally:
        packed.MAX_VALUES = before


@given(st.binary(max_size=60) | documents.map(lambda document: msgspec.msgpack.encode(document)[:-1]))
def test_any_bytes_are_an_object_or_an_error(body):
    packed._look_through(body)
    try:
        assert isinstance(packed.unpack_object(body), dict)
    except RequestError as error:
        assert error.status == 400


# ------------------------------------------------------------------------------------------------------- the scheduler


class Engine:
    """Computes logits for a rig: the row of record i is filled with i; cells are given out in order, each once."""

    def __init__(self, rig):
        self.rig = rig
        self.next_cell = 0
        self.released = []

    async def step(self, submit, *, prompt=0, tokens=(), reason=None, first=0):
        """Logits of so many prompt positions and of each token; the first fills its row with `first`."""
        count = prompt + len(tokens)
        cells = range(self.next_cell, self.next_cell + count)
        self.next_cell += count
        for place, cell in enumerate(cells):
            row = self.rig.layout.cell(cell)
            self.rig.arena[row] = struct.pack("<f", first + place) * self.rig.layout.vocab_size
        record = struct.pack("<2fi", -1.0, -2.0, 3)
        block = pack(array.array("i", cells).tobytes(), record * count, count, b"", 0)
        ended = (Ended(submit.uid, reason),) if reason else ()
        await self.rig.send(
            Tokens(
                self.rig.generation,
                array.array("q", [submit.uid]).tobytes(),
                array.array("i", tokens).tobytes(),
                array.array("i", [len(tokens)]).tobytes(),
                ended,
                block,
                array.array("i", [len(block)]).tobytes(),
            )
        )

    async def until_released(self, count):
        """So many cells came back, no cell twice."""
        while len(self.released) < count:
            self.released += ints((await self.rig.next(Release)).cells)
        assert len(set(self.released)) == len(self.released) == count


@pytest.fixture
def engine(rig):
    return Engine(rig)


async def test_frames_come_while_the_rest_is_computed(rig, engine):
    async with AsyncClient(rig.url) as client:
        parts = client.parts([5, 6, 7, 8], max_tokens=3, prompt_logprobs=0, logits=True)
        first = run(anext(parts))
        submit = await rig.next(Submit)
        assert submit.returns.logits and submit.returns.prompt and submit.returns.records
        await engine.step(submit, prompt=2)
        part = await asyncio.wait_for(first, TIMEOUT)
        assert (part.name, part.first, part.index) == ("prompt_logits", 0, 0)
        np.testing.assert_array_equal(part.rows, np.repeat([[0], [1]], VOCAB_SIZE, 1).astype(np.float32))
        await engine.until_released(2)
        await engine.step(submit, prompt=1, tokens=ids_of("a"), first=2)  # prompt and output in one step
        part, other = await anext(parts), await anext(parts)
        assert (part.name, part.first, other.name, other.first) == ("prompt_logits", 2, "logits", 0)
        assert part.rows[0, 0] == 2 and other.rows[0, 0] == 3
        await engine.step(submit, tokens=ids_of("b"), reason="length", first=4)
        last, answer = [part async for part in parts]
        assert (last.name, last.first, last.rows[0, 9]) == ("logits", 1, 4)
        (choice,) = answer.choices
        assert choice.text == "ab" and choice.finish_reason == "length"
        np.testing.assert_array_equal(choice.prompt_logprobs, [-1] * 3)
        np.testing.assert_array_equal(choice.drawn_logprobs, [-2] * 2)
        await engine.until_released(5)


async def test_an_error_before_anything_has_its_status_and_a_later_one_its_frame(rig, engine):
    async with AsyncClient(rig.url) as client:
        asked = run(client.generate([5, 6], logits=True))
        await rig.send(Rejected(1, (await rig.next(Submit)).uid, 429, "full"))
        with pytest.raises(RequestError, match="full") as error:
            await asked
        assert error.value.status == 429
        asked = run(client.generate([5, 6], logits=True))
        submit = await rig.next(Submit)
        await engine.step(submit, tokens=ids_of("a"))
        await engine.until_released(1)
        await rig.tokens(submit, reason="error", detail="the workers are gone")
        with pytest.raises(RequestError, match="the workers are gone") as error:
            await asked
        assert (error.value.status, error.value.code) == (503, "engine_restarted")


async def test_a_frame_that_never_comes_is_a_connection_error(rig, engine):
    async with AsyncClient(rig.url) as client:
        asked = run(client.generate([5, 6], logits=True))
        await engine.step(await rig.next(Submit), tokens=ids_of("a"))
        await engine.until_released(1)
        rig.launcher.close()  # the server ends
        with pytest.raises((ConnectionError, RequestError)):
            await asked


async def test_cells_of_a_scheduler_that_died_are_not_given_to_its_next_life(rig, engine):
    async with await_nothing(rig) as connection:
        submit = await rig.next(Submit)
        await fill(engine, submit)
        rig.restart_scheduler()
        await rig.next(Hello)
        connection.close()
        assert await rig.silent(), "cells that the next life has never given out"


def await_nothing(rig):
    """A client that asks for logits and does not read; its receive buffer is small."""
    return _Mute(rig)


class _Mute:
    def __init__(self, rig):
        self.rig = rig

    async def __aenter__(self):
        host, port = self.rig.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)
        await asyncio.get_running_loop().sock_connect(self.socket, (host, int(port)))
        body = request_body({"prompt": [5, 6], "max_tokens": 190, "logits": True})
        head = (
            f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/msgpack\r\nContent-Length: {len(body)}"
        )
        await asyncio.get_running_loop().sock_sendall(self.socket, head.encode() + b"\r\n\r\n" + body)
        return self.socket

    async def __aexit__(self, *_):
        self.socket.close()


async def fill(engine, submit):
    """Logits until the frontend takes no more of them: then some cells stay with it."""
    for _ in range(15):
        await engine.step(submit, tokens=[9] * 250)
        while not await engine.rig.silent():
            engine.released += ints((await engine.rig.next(Release)).cells)
        if engine.next_cell - len(engine.released) > 400:
            return
    raise AssertionError("the frontend takes whatever comes, though nobody reads")


async def test_who_does_not_read_keeps_only_its_own_cells_and_not_for_long(rig, engine, monkeypatch):
    monkeypatch.setattr(bulk, "_UNREAD_S", 1.0)
    async with await_nothing(rig), AsyncClient(rig.url) as client:
        mute = await rig.next(Submit)
        await fill(engine, mute)
        held = engine.next_cell - len(engine.released)
        engine.released = []
        asked = run(client.generate([5, 6], max_tokens=1, logits=True))  # somebody else is served meanwhile
        submit = await rig.next(Submit)
        await engine.step(submit, tokens=ids_of("a"), reason="length")
        assert (await asyncio.wait_for(asked, TIMEOUT)).choices[0].text == "a"
        await engine.until_released(1)
        back = []
        while len(back) < held:
            message = rig._decode((await asyncio.wait_for(rig.router.recv_multipart(), TIMEOUT))[1])
            if isinstance(message, Abort):
                assert message.uid == mute.uid
            else:
                back += ints(message.cells)
        assert len(set(back)) == held


async def test_who_leaves_gives_its_cells_back(rig, engine):
    async with await_nothing(rig) as connection:
        submit = await rig.next(Submit)
        await fill(engine, submit)
        held = engine.next_cell - len(engine.released)
        connection.close()
        aborted, back = False, []
        while len(back) < held or not aborted:
            message = rig._decode((await asyncio.wait_for(rig.router.recv_multipart(), TIMEOUT))[1])
            aborted = aborted or (isinstance(message, Abort) and message.uid == submit.uid)
            back += ints(message.cells) if isinstance(message, Release) else []
        assert len(set(back)) == held


async def test_memory_does_not_grow_with_the_logits(tmp_path):
    """80 MB of logits on their way through; a frame is 1 MiB."""
    async with Rig(write_model(tmp_path, vocab_size=1 << 15)) as rig, AsyncClient(rig.url) as client:
        engine = Engine(rig)
        asked = run(drain(client.parts([5, 6], max_tokens=150, logits=True)))
        submit = await rig.next(Submit)
        tracemalloc.start()
        for step in range(5):
            await engine.step(submit, tokens=[9] * 128, reason="length" if step == 4 else None)
        rows = await asyncio.wait_for(asked, 30)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == 640 and peak < 12 << 20, f"{peak >> 20} MiB"
        await engine.until_released(640)


async def drain(parts):
    """How many rows of logits there were."""
    return sum([len(part.rows) async for part in parts if isinstance(part, Logits)])


def test_frames_are_msgpack_for_any_reader():
    """A bin 32 whose content is one object."""
    part = Logits(0, "logits", 4, {"dtype": "float32", "shape": (1, 1), "data": struct.pack("<f", 2.5)})
    payload = msgspec.msgpack.encode(part)
    framed = FRAME_HEAD.pack(0xC6, len(payload)) + payload
    assert msgspec.msgpack.decode(msgspec.msgpack.decode(framed)) == {
        "type": "logits",
        "index": 0,
        "name": "logits",
        "first": 4,
        "rows": {"dtype": "float32", "shape": [1, 1], "data": struct.pack("<f", 2.5)},
    }
    assert decode_arrays(payload).rows.tolist() == [[2.5]]
