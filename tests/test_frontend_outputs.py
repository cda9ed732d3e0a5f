"""What comes back besides tokens stays in step with them and has the API's formats: against a script."""

import array
import asyncio
import base64
import codecs
import json
import math
import struct
import tracemalloc
import types

import msgspec
import openai
import orjson
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.errors import RequestError
from nmoe.frontend.detokenizer import ByteLevelDetokenizer
from nmoe.frontend.logprobs import ChoiceFormats, Formats, Offsets, PromptFormats, Vocabulary, fragment
from nmoe.frontend.openai import Call
from nmoe.frontend.outputs import Outputs
from nmoe.frontend.prompt import Prompt
from nmoe.frontend.replies import Choice, whole_body
from nmoe.frontend.streams import Stream, Streams
from nmoe.messages import Abort, Ended, Finish, Rejected, Release, Sampling, Submit, Tokens
from nmoe.metrics import Board
from nmoe.outputs import Returns, RoutingLayout, pack, read_records
from tests.scripted import BOS, EOS, MAX_SEQ_LEN, TOKENIZER, VOCAB_SIZE, Rig, events, ids_of, ints, run, write_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "a"}
ALL = {
    "logprobs": 2,
    "prompt_logprobs": 1,
    "top_k_logprobs": 3,
    "logprob_token_ids": [9, 4],
    "return_routed_experts": True,
    "return_token_ids": True,
}
ROUTED = bytes([3, 1, 4, 1])  # of one position: layers with experts of the demo times experts per token


@pytest_asyncio.fixture(scope="module")
async def rig(tmp_path_factory):
    config = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_experts_per_tok": 2}
    async with Rig(write_model(tmp_path_factory.mktemp("model"), **config)) as running:
        yield running


def record(token, returns):
    """Of one token; every number is a multiple of 1/8 and tells of which token it is."""
    likeliest = [token + i for i in range(returns.top_k)]
    return struct.pack(
        f"<2fi{returns.top_k}i{returns.top_k}f{len(returns.scored_ids)}f",
        -token / 8,
        -token / 4,
        token + 1,
        *likeliest,
        *[-each / 8 for each in likeliest],
        *[-(token + each) / 8 for each in returns.scored_ids],
    )


def block(submit, tokens, routed=0, *, cells=(), returns=None):
    """Records of some tokens, of a prompt or of an output, and the routing of so many positions."""
    returns = returns or submit.returns
    records = b"".join(record(token, returns) for token in tokens) if returns.records else b""
    return pack(array.array("i", cells).tobytes(), records, len(tokens), ROUTED * routed, routed)


def text_of(token):
    return TOKENIZER.decode([token], skip_special_tokens=False) if token < 261 else ""


def completion_logprobs(tokens, number, *, start=0):
    """OpenAI's format for ASCII tokens, all of them drawn."""
    tops = []
    for token in tokens:
        top = {}
        for each in [*range(token, token + number), token]:
            top.setdefault(text_of(each), -each / 8)
        tops.append(top)
    return {
        "tokens": list(map(text_of, tokens)),
        "token_logprobs": [-token / 8 for token in tokens],
        "top_logprobs": tops,
        "text_offset": [start + i for i in range(len(tokens))],
        "token_ids": tokens,
        "drawn_logprobs": [-token / 4 for token in tokens],
    }


def own_fields(tokens, prefix="", first=()):
    ids = [[token, token + 1, token + 2] for token in tokens]
    return {
        f"{prefix}top_k_logprobs": {
            "ids": [*first, *ids],
            "logprobs": [*first, *[[-each / 8 for each in row] for row in ids]],
        },
        f"{prefix}token_id_logprobs": [*first, *[[-(token + 9) / 8, -(token + 4) / 8] for token in tokens]],
    }


def vllms(token, number):
    shown = {token: token + 1} | {each: rank + 1 for rank, each in enumerate(range(token, token + number)) if rank}
    return {
        str(each): {"logprob": -each / 8, "rank": rank, "decoded_token": text_of(each)} for each, rank in shown.items()
    }


def routed_field(positions):
    data = base64.b64encode(ROUTED * positions).decode()
    return {"dtype": "uint8", "shape": [positions, 2, 2], "data": data}


# ------------------------------------------------------------------------------------------------------------- formats


def test_an_answer_of_many_choices_takes_little_more_memory_than_its_body():
    """Rendered a choice at a time, and each in pieces: the objects of all of them are ten times as large."""
    tokens = [100] * 600
    call = Call(endpoint="completions", prompts=[[5] * 600], n=20, logprobs=20, prompt_logprobs=20)
    formats = Formats(call, Vocabulary(None), RoutingLayout(0, 0, 1))
    prompt = Prompt([5] * 600, "prompt")
    outputs = [Outputs(msgspec.structs.replace(call.returns, prompt=not place), 600) for place in range(call.n)]
    of_prompt = PromptFormats(formats, prompt, outputs[0])
    outputs[0].add(memoryview(block(None, tokens[1:], returns=call.returns)))
    choices = []
    for place, mine in enumerate(outputs):
        mine.add(memoryview(block(None, tokens, returns=call.returns)))
        stream = types.SimpleNamespace(
            uid=place, reason="length", num_tokens=600, cached_tokens=0, take=lambda: ("", tokens)
        )
        choices.append(Choice(place, prompt, stream, ChoiceFormats(formats, of_prompt, 0, mine)))
    tracemalloc.start()
    try:
        body = whole_body(call, "m", choices)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [len(choice["prompt_logprobs"]) for choice in json.loads(body)["choices"]] == [600] * 20
    assert peak < 4 * len(body)


@given(st.lists(st.integers(0, 9)) | st.dictionaries(st.text(), st.lists(st.none() | st.text(), max_size=600)))
def test_pieces_make_the_same_json(value):
    assert orjson.loads(orjson.dumps(fragment(value))) == value
    if isinstance(value, list):
        assert orjson.loads(orjson.dumps(fragment(iter(value)))) == value


async def test_a_completion_with_everything(rig):
    asked = run(rig.ask(COMPLETIONS, prompt="abc", echo=True, **ALL))
    submit = await rig.next(Submit)
    assert submit.returns == Returns(True, True, 3, (9, 4), routing=True)
    prompt = ints(submit.prompt)
    assert prompt == [BOS, *ids_of("abc")]
    await rig.tokens(submit, "", block=block(submit, prompt[1:3], 2))  # a chunk of the prompt: no token
    await rig.tokens(submit, "x", block=block(submit, [prompt[3], *ids_of("x")], 2))
    await rig.tokens(submit, "y", "length", block=block(submit, ids_of("y"), 1))
    (choice,) = (await asked)[2]["choices"]
    expected = completion_logprobs([*prompt[1:], *ids_of("xy")], 2)
    for name, first in zip(expected, ["<bos>", None, None, 0, BOS, None], strict=True):
        expected[name] = [first, *expected[name]]
    expected["drawn_logprobs"][:4] = [None] * 4
    assert choice == {
        "index": 0,
        "text": "abcxy",
        "finish_reason": "length",
        "logprobs": expected,
        "token_ids": ids_of("xy"),
        "prompt_token_ids": prompt,
        "prompt_logprobs": [None, *[vllms(token, 1) for token in prompt[1:]]],
        **own_fields(ids_of("xy")),
        **own_fields(prompt[1:], "prompt_", [None]),
        "routed_experts": routed_field(5),
    }


async def test_a_chat_with_everything(rig):
    asked = run(rig.ask(CHAT, messages=[USER], **{**ALL, "logprobs": True, "top_logprobs": 2}))
    submit = await rig.next(Submit)
    prompt = ints(submit.prompt)
    await rig.tokens(submit, "h", block=block(submit, [*prompt[1:], *ids_of("h")], len(prompt)))
    await rig.tokens(submit, [EOS], "stop", block=block(submit, [EOS], 1))
    body = (await asked)[2]
    (choice,) = body["choices"]

    def entry(token):
        shown = [
            {"token": text_of(each), "logprob": -each / 8, "bytes": list(text_of(each).encode())}
            for each in (token, token + 1)
        ]
        return {**shown[0], "top_logprobs": shown, "drawn_logprob": -token / 4}

    tokens = [*ids_of("h"), EOS]
    assert choice["logprobs"] == {"content": [entry(token) for token in tokens], "refusal": None}
    assert choice["token_ids"] == tokens and choice["message"]["content"] == "h"
    assert choice["routed_experts"] == routed_field(len(prompt) + 1)
    assert {name: choice[name] for name in own_fields(tokens)} == own_fields(tokens)
    assert body["prompt_logprobs"] == [None, *[vllms(token, 1) for token in prompt[1:]]]
    expected = own_fields(prompt[1:], "prompt_", [None])
    assert {name: body[name] for name in expected} == expected
    openai.types.chat.ChatCompletion.model_validate(body)


async def test_only_what_was_asked_for(rig):
    """One record serves all fields; each shows what belongs to it."""
    asked = run(rig.ask(COMPLETIONS, prompt="a", logprobs=0, prompt_logprobs=None))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "x", "length", block=block(submit, ids_of("x")))
    choice = (await asked)[2]["choices"][0]
    assert choice.keys() == {"index", "text", "finish_reason", "logprobs"}
    assert choice["logprobs"] == completion_logprobs(ids_of("x"), 0)


async def test_what_json_has_no_number_for(rig):
    asked = run(rig.ask(COMPLETIONS, prompt="a", logprobs=0, logprob_token_ids=[5]))
    submit = await rig.next(Submit)
    data = struct.pack("<2fif", -math.inf, -math.inf, 300, -math.inf)
    await rig.tokens(submit, "x", "length", block=pack(b"", data, 1, b"", 0))
    choice = (await asked)[2]["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == choice["logprobs"]["drawn_logprobs"] == [-9999.0]
    assert choice["token_id_logprobs"] == [[-9999.0]]


async def test_parts_of_characters(rig):
    """Both bytes of a character say where it begins; the bytes are in a chat's format."""
    for path, prompt in ((COMPLETIONS, {"prompt": "a", "logprobs": 0}), (CHAT, {"messages": [USER], "logprobs": True})):
        asked = run(rig.ask(path, **prompt))
        submit = await rig.next(Submit)
        await rig.tokens(submit, "aé!", "length", block=block(submit, ids_of("aé!")))
        logprobs = (await asked)[2]["choices"][0]["logprobs"]
        if path == COMPLETIONS:
            assert logprobs["tokens"] == ["a", "\ufffd", "\ufffd", "!"] and logprobs["text_offset"] == [0, 1, 1, 2]
        else:
            assert b"".join(bytes(entry["bytes"]) for entry in logprobs["content"]) == "aé!".encode()


@pytest.mark.parametrize(
    ("prompt", "offsets"),
    [
        ("a<eos>b é!", [0, 0, 1, 6, 7, 8, 8, 9, 10]),  # BOS is not in the text, another special token is
        ("<user>", [0, 0, 6]),
        (ids_of("a<eos>b"), [0, 1, 1, 2]),  # the text of ids is without them
    ],
)
async def test_offsets_of_an_echoed_prompt_are_places_in_its_text(rig, prompt, offsets):
    asked = run(rig.ask(COMPLETIONS, prompt=prompt, echo=True, logprobs=0))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "x", "length", block=block(submit, [*ints(submit.prompt)[1:], *ids_of("x")]))
    (choice,) = (await asked)[2]["choices"]
    assert choice["logprobs"]["text_offset"] == offsets and len(choice["text"]) == offsets[-1] + 1


class Bytes:
    """A tokenizer of tokens that are these bytes."""

    def __init__(self, pieces):
        self._pieces = dict(enumerate(pieces))

    def token_bytes(self, token):
        return self._pieces[token]

    def detokenizer(self):
        return ByteLevelDetokenizer(self._pieces)


@given(st.lists(st.lists(st.sampled_from(b"a!\xc3\xa9\xe4\xbd\xa0"), min_size=1, max_size=3).map(bytes), max_size=8))
def test_a_token_begins_where_its_character_does(pieces):
    """Also behind a character that nobody completes, whose place a replacement character takes."""
    expected, before = [], b""
    for piece in pieces:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        goes_on = piece[0] & 0xC0 == 0x80
        expected.append(len(decoder.decode(before, not goes_on)))
        before += piece
    assert Offsets(Vocabulary(Bytes(pieces)), 0).of(range(len(pieces))) == expected


@pytest.mark.parametrize("is_stream", [False, True])
async def test_scoring_without_output(rig, is_stream):
    asked = run(
        rig.ask(COMPLETIONS, prompt="abc", echo=True, logprobs=1, max_tokens=0)
        if not is_stream
        else read(rig, COMPLETIONS, prompt="abc", echo=True, logprobs=1, max_tokens=0)
    )
    submit = await rig.next(Submit)
    prompt = ints(submit.prompt)
    assert submit.max_tokens == 0
    await rig.tokens(submit, "", "length", block=block(submit, prompt[1:]))
    answer = await asked
    if is_stream:
        opening, closing, done = answer
        assert done == "[DONE]" and closing["choices"][0]["finish_reason"] == "length"
        choice = opening["choices"][0]
    else:
        choice = answer[2]["choices"][0]
        assert answer[2]["usage"]["completion_tokens"] == 0
    assert choice["text"] == "abc"
    assert choice["logprobs"]["token_logprobs"] == [None, *[-token / 8 for token in prompt[1:]]]


async def test_a_scored_prompt_may_fill_the_context(rig):
    prompt = [5] * MAX_SEQ_LEN
    asked = run(rig.ask(COMPLETIONS, prompt=prompt, prompt_logprobs=0, max_tokens=0))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "", "length", block=block(submit, prompt[1:]))
    assert len((await asked)[2]["choices"][0]["prompt_logprobs"]) == MAX_SEQ_LEN
    status, _, body = await rig.ask(COMPLETIONS, prompt=[*prompt, 5], prompt_logprobs=0, max_tokens=0)
    assert status == 400 and body["error"]["param"] == "prompt"


async def test_ids_must_be_in_the_vocabulary(rig):
    status, _, body = await rig.ask(COMPLETIONS, prompt="a", logprob_token_ids=[0, VOCAB_SIZE])
    assert status == 400 and body["error"]["param"] == "logprob_token_ids[1]"


async def test_numbers_of_likeliest_tokens_fit_the_vocabulary(tmp_path):
    async with Rig(write_model(tmp_path, tokenizer=False, vocab_size=8), model={"weights": "random"}) as rig:
        status, _, body = await rig.ask(COMPLETIONS, prompt=[1], logprobs=20)
        assert status == 400 and body["error"]["param"] == "logprobs"
        asked = run(rig.ask(COMPLETIONS, prompt=[1], profile="online_distill"))
        submit = await rig.next(Submit)
        assert submit.returns.top_k == 8
        await rig.tokens(submit, [2], "length", block=block(submit, [2]))
        assert (await asked)[0] == 200


async def test_a_dense_model_has_no_routing(tmp_path):
    async with Rig(write_model(tmp_path, first_k_dense_replace=99)) as rig:
        status, _, body = await rig.ask(COMPLETIONS, prompt="a", return_routed_experts=True)
        assert status == 400 and body["error"]["param"] == "return_routed_experts"


async def test_prompts_repeated_with_their_logprobs_are_bounded(tmp_path):
    async with Rig(write_model(tmp_path), max_body_mb=1) as rig:
        status, _, body = await rig.ask(COMPLETIONS, prompt=[5] * 150, n=128, prompt_logprobs=20)
        assert status == 400 and body["error"]["param"] == "prompt_logprobs"


# --------------------------------------------------------------------------------------------------- seeds and profiles


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_the_drawn_seed_comes_back_in_rl_sample(rig, path):
    prompt = {"prompt": "a"} if path == COMPLETIONS else {"messages": [USER]}
    for fields, is_told in (
        ({"profile": "rl_sample"}, True),
        ({"profile": "rl_sample", "seed": 5}, False),
        ({}, False),
    ):
        asked = run(rig.ask(path, **prompt, **fields))
        submit = await rig.next(Submit)
        await rig.tokens(submit, "x", "length", block=block(submit, ids_of("x")) if submit.returns else b"")
        body = (await asked)[2]
        assert body.get("seed") == (submit.sampling.seed if is_told else None)


async def test_each_prompt_tells_its_own_seed(rig):
    asked = run(rig.ask(COMPLETIONS, prompt=["a", "a"], n=2, profile="rl_sample"))
    submits = [await rig.next(Submit), await rig.next(Submit)]
    for submit in submits:
        for sibling in range(2):
            await rig.tokens(submit, "x", "length", block=block(submit, ids_of("x")), sibling=sibling)
    body = (await asked)[2]
    seeds = [submit.sampling.seed for submit in submits]
    assert [choice["seed"] for choice in body["choices"]] == [seeds[0], seeds[0], seeds[1], seeds[1]]
    assert seeds[0] != seeds[1] and "seed" not in body


# ------------------------------------------------------------------------------------------------------------- streams


async def read(rig, path, **body):
    async with rig.post(path, stream=True, **body) as response:
        return await events(response)


async def test_a_stream_tells_what_belongs_to_its_text(rig):
    asked = run(read(rig, COMPLETIONS, prompt="ab", echo=True, stop="xyz", **ALL))
    submit = await rig.next(Submit)
    prompt = ints(submit.prompt)
    await rig.tokens(submit, "", block=block(submit, prompt[1:2], 1))
    for step, text in enumerate(["1", "x", "y", "2", "x"]):
        told = [*prompt[2:], *ids_of(text)] if not step else ids_of(text)
        await rig.tokens(submit, text, block=block(submit, told, 2 if not step else 1))
        await asyncio.sleep(0.003)
    await rig.tokens(submit, "!", "length", block=block(submit, ids_of("!"), 1))
    opening, *chunks, done = await asked
    assert done == "[DONE]"
    first = opening["choices"][0]
    assert first["text"] == "ab" and first["prompt_token_ids"] == prompt
    assert first["logprobs"]["token_ids"] == prompt and len(first["prompt_logprobs"]) == 3
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert texts in (["1", "xy2", "x!"], ["1", "xy2", "x!", ""])  # what might have become the stop string waited
    at = 2
    for chunk in chunks:
        choice = chunk["choices"][0]
        tokens = ids_of(choice["text"])
        if tokens:
            assert choice["logprobs"] == completion_logprobs(tokens, 2, start=at)
            expected = own_fields(tokens)
            assert {name: choice[name] for name in expected} == expected
            assert choice["token_ids"] == tokens
        at += len(tokens)
        assert ("routed_experts" in choice) == (choice["finish_reason"] is not None)
    assert chunks[-1]["choices"][0]["routed_experts"] == routed_field(1 + 2 + 5)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_tokens_shown_by_their_ids(rig, is_stream):
    """No two of them look the same, whatever their text."""
    fields = {"prompt": [BOS, EOS], "echo": True, "logprobs": 2, "return_tokens_as_token_ids": True}
    asked = run(read(rig, COMPLETIONS, **fields) if is_stream else rig.ask(COMPLETIONS, **fields))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "x", "length", block=block(submit, [EOS, *ids_of("x")]))
    answer = await asked
    parts = [event["choices"][0] for event in answer[:-1]] if is_stream else answer[2]["choices"]
    told = [part["logprobs"] for part in parts if part["logprobs"]]
    (x,) = ids_of("x")
    tokens, tops = ([each for part in told for each in part[name]] for name in ("tokens", "top_logprobs"))
    assert tokens == [f"token_id:{token}" for token in (BOS, EOS, x)]
    assert tops[1:] == [{f"token_id:{each}": -each / 8 for each in (token, token + 1)} for token in (EOS, x)]


async def test_a_chats_tokens_shown_by_their_ids_have_their_bytes(rig):
    fields = {"messages": [USER], "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    asked = run(rig.ask(CHAT, **fields))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "x", "length", block=block(submit, ids_of("x")))
    (entry,) = (await asked)[2]["choices"][0]["logprobs"]["content"]
    (x,) = ids_of("x")
    assert entry["token"] == entry["top_logprobs"][0]["token"] == f"token_id:{x}"
    assert entry["bytes"] == entry["top_logprobs"][0]["bytes"] == [ord("x")]


async def test_a_stream_echoes_a_prompt_that_has_no_text(rig):
    """Of special tokens, which are never shown, only the log-probabilities come back."""
    asked = run(read(rig, COMPLETIONS, prompt=[BOS, EOS], echo=True, logprobs=0))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "", block=block(submit, [EOS]))
    await rig.tokens(submit, "x", "length", block=block(submit, ids_of("x")))
    chunks = [chunk["choices"][0] for chunk in (await asked)[:-1]]
    assert "".join(choice["text"] for choice in chunks) == "x"
    told = [token for choice in chunks if choice["logprobs"] for token in choice["logprobs"]["token_ids"]]
    assert told == [BOS, EOS, *ids_of("x")]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_records_behind_a_stop_string_are_dropped(rig, is_stream):
    fields = {"prompt": "a", "stop": "st", "logprobs": 0, "return_token_ids": True}
    asked = run(read(rig, COMPLETIONS, **fields) if is_stream else rig.ask(COMPLETIONS, **fields))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "a", block=block(submit, ids_of("a")))
    await rig.tokens(submit, "bstcd", block=block(submit, ids_of("bstcd")))
    assert (await rig.next(Finish)).count == 4
    await rig.tokens(submit, "e", block=block(submit, ids_of("e")))  # which was on its way
    await rig.tokens(submit, "", "stop")
    answer = await asked
    choices = [event["choices"][0] for event in answer[:-1]] if is_stream else answer[2]["choices"]
    assert "".join(choice["text"] for choice in choices) == "ab"
    told = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["token_ids"]]
    ids = [token for choice in choices for token in choice["token_ids"]]
    assert told == ids == ids_of("abst")
    logprobs = [value for choice in choices if choice["logprobs"] for value in choice["logprobs"]["token_logprobs"]]
    assert logprobs == [-token / 8 for token in ids]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_siblings_share_the_prompts_records(rig, is_stream):
    """They come with the first; each answer shows them."""
    fields = {"prompt": "ab", "n": 2, "prompt_logprobs": 0, "logprobs": 0, "echo": True}
    asked = run(read(rig, COMPLETIONS, **fields) if is_stream else rig.ask(COMPLETIONS, **fields))
    submit = await rig.next(Submit)
    prompt = ints(submit.prompt)
    await rig.tokens(submit, "x", block=block(submit, [*prompt[1:], *ids_of("x")]))
    await rig.tokens(submit, "y", "length", block=block(submit, ids_of("y")), sibling=1)
    await rig.tokens(submit, "z", "length", block=block(submit, ids_of("z")))
    answer = await asked
    choices = [event["choices"][0] for event in answer[:-1]] if is_stream else answer[2]["choices"]
    for index, text in enumerate(["abxz", "aby"]):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text
        told = [token for choice in mine if choice["logprobs"] for token in choice["logprobs"]["token_ids"]]
        assert told == [BOS, *ids_of(text)]
        assert [choice["prompt_logprobs"] for choice in mine if "prompt_logprobs" in choice] == [
            [None, *[vllms(token, 0) for token in prompt[1:]]]
        ]


async def test_a_stream_begins_when_all_its_prompts_are_computed(rig):
    asked = run(read(rig, COMPLETIONS, prompt=["ab", "c"], prompt_logprobs=0))
    one, two = [await rig.next(Submit), await rig.next(Submit)]
    for submit, text in ((one, "x"), (one, "y"), (two, "z")):
        first = ints(submit.prompt)[1:] if text != "y" else []
        await rig.tokens(submit, text, block=block(submit, [*first, *ids_of(text)]))
        await asyncio.sleep(0.003)
    for submit in (one, two):
        await rig.tokens(submit, "", "length")
    choices = [event["choices"][0] for event in (await asked)[:-1]]
    for index, prompt, text in ((0, "ab", "xy"), (1, "c", "z")):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text
        assert mine[0]["prompt_logprobs"] == [None, *[vllms(token, 0) for token in ids_of(prompt)]]
        assert not any("prompt_logprobs" in choice for choice in mine[1:])


async def test_a_prompt_that_is_refused_ends_a_stream_before_it_began(rig):
    asked = run(rig.ask(COMPLETIONS, prompt=["ab", "c"], prompt_logprobs=0, stream=True))
    one, two = [await rig.next(Submit), await rig.next(Submit)]
    await rig.tokens(one, "x", block=block(one, [*ints(one.prompt)[1:], *ids_of("x")]))
    await rig.send(Rejected(rig.generation, two.uid, 429, "the queue is full"))
    status, _, body = await asked
    assert status == 429 and body["error"]["message"] == "the queue is full"
    assert (await rig.next(Abort)).uid == one.uid


async def test_a_timeout_before_all_prompts_are_computed_is_an_error(tmp_path):
    """Nothing has been sent, though one of the prompts has an output already."""
    async with Rig(write_model(tmp_path), request_timeout_s=0.1) as rig:
        asked = run(rig.ask(COMPLETIONS, prompt=["ab", "cd"], echo=True, logprobs=0, stream=True))
        one, two = [await rig.next(Submit), await rig.next(Submit)]
        await rig.tokens(one, "x", block=block(one, [*ints(one.prompt)[1:], *ids_of("x")]))
        status, _, body = await asked
        assert status == 504 and body["error"]["code"] == "timeout"
        assert {(await rig.next(Abort)).uid for _ in range(2)} == {one.uid, two.uid}


async def test_a_chats_stream(rig):
    asked = run(read(rig, CHAT, messages=[USER], logprobs=True, prompt_logprobs=0))
    submit = await rig.next(Submit)
    prompt = ints(submit.prompt)
    await rig.tokens(submit, "h", block=block(submit, [*prompt[1:], *ids_of("h")]))
    await rig.tokens(submit, "é", "length", block=block(submit, ids_of("é")))
    opening, *chunks, done = await asked
    assert done == "[DONE]" and opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(opening["prompt_logprobs"]) == len(prompt)
    content = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "hé".encode()
    for chunk in [opening, *chunks]:
        openai.types.chat.ChatCompletionChunk.model_validate(chunk)


async def test_a_block_that_nobody_can_read_ends_one_request(rig, caplog):
    asked = run(rig.ask(COMPLETIONS, prompt="a", logprobs=0))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "x", block=struct.pack("<3i", 0, 5, 0))
    status, _, _ = await asked
    assert status == 500 and (await rig.next(Abort)).uid == submit.uid
    assert "its outputs could not be read" in caplog.text


# --------------------------------------------------------------------------------------------- streams without a client


class Desk:
    """Streams whose scheduler is a list."""

    def __init__(self):
        self.sent = []
        self.is_full = False
        self.streams = Streams(0, 1, self._send, Board(3).rows[0])

    def _send(self, message):
        if self.is_full:
            raise RequestError("the engine does not answer", status=503)
        self.sent.append(message)

    def open(self, returns, *, n=1, prompt_len=2, stops=()):
        uids = self.streams.new_uids(n)
        streams = [Stream(uid, _Letters(), stops, 0.0) for uid in uids]
        submit = Submit(1, uids[0], bytes(4 * prompt_len), 99, Sampling(), n=n, returns=returns)
        self.streams.submit(streams, submit)
        return streams, submit

    def deliver(self, rows, ended=()):
        """`rows`: (uid, tokens, block)."""
        uids = array.array("q", [uid for uid, _, _ in rows]).tobytes()
        tokens = array.array("i", [token for _, mine, _ in rows for token in mine]).tobytes()
        counts = array.array("i", [len(mine) for _, mine, _ in rows]).tobytes()
        sizes = array.array("i", [len(data) for _, _, data in rows]).tobytes()
        blocks = b"".join(data for _, _, data in rows)
        self.streams.deliver(Tokens(1, uids, tokens, counts, tuple(ended), blocks, sizes), 1.0)

    @property
    def released(self):
        return [cell for message in self.sent if isinstance(message, Release) for cell in ints(message.cells)]


class _Letters:
    """Token 65 is A, and so on."""

    holds = False

    def feed(self, token):
        return chr(token)

    def flush(self):
        return ""


LOGITS = Returns(True, True, logits=True)


async def test_cells_are_handed_out_once_and_come_back():
    desk = Desk()
    (stream,), submit = desk.open(LOGITS, prompt_len=3, stops=("C",))
    seen = []
    stream.on_outputs = lambda: seen.append(stream.outputs.take_cells())
    desk.deliver([(stream.uid, [], block(submit, [1], cells=[10]))])
    desk.deliver([(stream.uid, [65], block(submit, [2, 65], cells=[11, 12]))])
    assert [[*cells] for cells in seen] == [[10], [11, 12]] and not desk.released
    desk.deliver([(stream.uid, [66, 67, 68], block(submit, [66, 67, 68], cells=[13, 14, 15]))])
    assert [*seen[-1]] == [13, 14] and desk.released == [15]  # behind the stop string
    desk.deliver([(stream.uid, [69], block(submit, [69], cells=[16]))])
    assert desk.released == [15, 16] and len(seen) == 3
    desk.deliver([], [Ended(stream.uid, "stop")])
    desk.streams.close(stream)
    assert desk.released == [15, 16]


async def test_cells_that_nobody_takes_are_released():
    desk = Desk()
    (stream,), submit = desk.open(LOGITS)
    desk.deliver([(stream.uid, [65], block(submit, [1, 65], cells=[1, 2]))])
    assert not desk.released
    desk.streams.close(stream)  # the client left
    assert desk.released == [1, 2] and isinstance(desk.sent[-1], Abort)
    desk.deliver([(stream.uid, [66], block(submit, [66], cells=[3]))])
    desk.deliver([(99, [66], block(submit, [66], cells=[4]))])
    assert desk.released == [1, 2, 3, 4]
    assert sum(isinstance(message, Release) for message in desk.sent) == 3


@pytest.mark.parametrize("by_tokens", [True, False])
async def test_a_scheduler_that_takes_nothing_for_a_while_hears_the_rest_later(by_tokens):
    desk = Desk()
    (leaves,), submit = desk.open(LOGITS)
    (stops,), _ = desk.open(Returns(), stops=("B",))
    desk.deliver([(leaves.uid, [65], block(submit, [1, 65], cells=[1, 2]))])
    del desk.sent[:]
    desk.is_full = True
    desk.streams.close(leaves)
    desk.deliver([(stops.uid, [66], b"")])
    with pytest.raises(RequestError, match="does not answer"):
        desk.open(Returns())
    assert not desk.sent
    desk.is_full = False
    if by_tokens:
        desk.deliver([], [Ended(leaves.uid, "abort")])
    else:
        desk.open(Returns())
    assert [type(message) for message in desk.sent[:3]] == [Release, Abort, Finish] and desk.released == [1, 2]
    assert len(desk.sent) == (3 if by_tokens else 4)


async def test_a_schedulers_next_life_gets_no_cells_of_the_last():
    desk = Desk()
    (stream,), submit = desk.open(LOGITS)
    desk.deliver([(stream.uid, [65], block(submit, [1, 65], cells=[1, 2]))])
    desk.is_full = True
    desk.deliver([(99, [66], block(submit, [66], cells=[4]))])
    desk.is_full = False
    desk.streams.fail_all(RequestError("gone", status=503))
    desk.streams.close(stream)
    desk.deliver([], [])
    assert not desk.released


async def test_a_reader_that_fails_ends_its_stream_only(caplog):
    desk = Desk()
    (bad, good), submit = desk.open(Returns(True), n=2)
    bad.on_outputs = lambda: 1 / 0
    desk.deliver([(uid, [65], block(submit, [65])) for uid in (bad.uid, good.uid)])
    assert bad.error.status == 500 and good.error is None and len(good.outputs.take()) == 12
    assert "could not be delivered" in caplog.text


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_records_stay_in_step_with_tokens(data):
    """Whatever the steps, the stop strings and the moments of taking: each token has its own record."""

    async def check():
        desk = Desk()
        stops = tuple(data.draw(st.lists(st.text("ABC", min_size=1, max_size=3), max_size=2)))
        returns = Returns(True, data.draw(st.booleans()), data.draw(st.integers(0, 2)), logits=True)
        prompt_len = data.draw(st.integers(1, 5))
        (stream,), submit = desk.open(returns, prompt_len=prompt_len, stops=stops)
        prompt = [*range(200, 200 + prompt_len - 1)] if returns.prompt else []
        output = [ord(letter) for letter in data.draw(st.text("ABC", min_size=1, max_size=12))]
        told, tokens, records, cells = prompt + output, [], b"", []
        at = sampled = 0
        while at < len(told):
            step = data.draw(st.integers(1, len(told) - at))
            mine = told[at : at + step]
            new = output[sampled : max(0, at + step - len(prompt))]
            desk.deliver([(stream.uid, new, block(submit, mine, cells=range(at, at + step)))])
            at, sampled = at + step, sampled + len(new)
            if data.draw(st.booleans()):
                ids = stream.take()[1]
                tokens, records = tokens + ids, records + stream.outputs.take()
                cells += stream.outputs.take_cells()
        tokens, records = tokens + stream.take()[1], records + stream.outputs.take()
        cells += stream.outputs.take_cells()
        assert tokens == output[: len(tokens)] and (stream.stopped or len(tokens) == len(output))
        read_back = read_records(memoryview(records), returns)
        assert [read_back_one.logprob for read_back_one in read_back] == [-token / 8 for token in tokens]
        of_prompt = read_records(memoryview(bytes(stream.outputs.prompt)), returns)
        assert [each.logprob for each in of_prompt] == [-token / 8 for token in prompt]
        assert cells == [*range(len(prompt) + len(tokens))]
        assert desk.released == [*range(len(prompt) + len(tokens), len(told))]

    asyncio.run(check())
