"""Several prompts and several answers, echo, usage on the way, tokens, the API's description: against a script."""

import array
import asyncio
import json

import msgspec
import pytest
import pytest_asyncio

import nmoe
from nmoe.errors import RequestError
from nmoe.frontend.openai import parse_call
from nmoe.frontend.prompt import Prompt, make_sampling, make_submit
from nmoe.frontend.schema import FIELDS
from nmoe.frontend.sizes import check_returned
from nmoe.messages import Abort, Ended, Finish, Rejected, Submit, Tokens
from tests.scripted import BOS, EOS, MAX_SEQ_LEN, TEMPLATE, VOCAB_SIZE, Rig, events, ids_of, ints, run, write_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "a"}


@pytest_asyncio.fixture(scope="module")
async def rig(tmp_path_factory):
    async with Rig(write_model(tmp_path_factory.mktemp("model"))) as running:
        yield running


async def step(rig, outputs, ended=()):
    """One message: uid -> text, and uid -> reason."""
    ids = {uid: ids_of(text) for uid, text in outputs.items()}
    uids = array.array("q", ids).tobytes()
    counts = array.array("i", map(len, ids.values())).tobytes()
    tokens = array.array("i", [token for each in ids.values() for token in each]).tobytes()
    last = tuple(Ended(uid, reason, cached_tokens=2) for uid, reason in dict(ended).items())
    await rig.send(Tokens(rig.generation, uids, tokens, counts, last))
    await asyncio.sleep(0.003)


async def submits_of(rig, count):
    return [await rig.next(Submit) for _ in range(count)]


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        (["a", "bc"], [[BOS, *ids_of("a")], [BOS, *ids_of("bc")]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ([[5]], [[5]]),
        (["a"], [[BOS, *ids_of("a")]]),
        ([5, 6], [[5, 6]]),
        ("a", [[BOS, *ids_of("a")]]),
    ],
)
async def test_prompts_in_every_form(rig, prompt, ids):
    asked = run(rig.ask(COMPLETIONS, prompt=prompt, return_token_ids=True))
    submits = await submits_of(rig, len(ids))
    assert [ints(submit.prompt) for submit in submits] == ids
    for place, submit in reversed([*enumerate(submits)]):
        await rig.tokens(submit, f"answer {place}", "length", cached_tokens=1)
    status, _, document = await asked
    assert status == 200
    choices = document["choices"]
    assert [choice["index"] for choice in choices] == [*range(len(ids))]
    assert [choice["text"] for choice in choices] == [f"answer {place}" for place in range(len(ids))]
    assert [choice["prompt_token_ids"] for choice in choices] == ids
    assert document["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert document["usage"]["completion_tokens"] == 8 * len(ids)
    assert document["usage"]["prompt_tokens_details"]["cached_tokens"] == len(ids)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_n_answers(rig, path):
    body = {"prompt": "a"} if path == COMPLETIONS else {"messages": [USER]}
    asked = run(rig.ask(path, n=3, **body))
    submit = await rig.next(Submit)
    assert submit.n == 3 and await rig.silent()
    uids = [submit.uid + i for i in range(3)]
    await step(rig, {uids[0]: "x", uids[2]: "zz"}, {uids[2]: "stop"})
    await step(rig, {uids[1]: "y"}, {uids[0]: "length", uids[1]: "length"})
    _, _, document = await asked
    texts = [choice["text"] if path == COMPLETIONS else choice["message"]["content"] for choice in document["choices"]]
    assert texts == ["x", "y", "zz"]
    assert [choice["finish_reason"] for choice in document["choices"]] == ["length", "length", "stop"]
    usage = document["usage"]
    assert usage["completion_tokens"] == 4 and usage["prompt_tokens"] == len(ints(submit.prompt))
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2
    following = run(rig.ask(path, **body))
    after = await rig.next(Submit)
    assert after.uid == submit.uid + 3
    await rig.tokens(after, "x", "length")
    await following


async def test_streams_of_several_answers_interleave(rig):
    async def read():
        options = {"include_usage": True, "continuous_usage_stats": True}
        async with rig.post(
            COMPLETIONS, prompt=["a", "b"], n=2, stream=True, stream_options=options, echo=True
        ) as response:
            return await events(response)

    reading = run(read())
    one, two = await submits_of(rig, 2)
    await step(rig, {one.uid: "A"})
    await step(rig, {one.uid + 1: "B", two.uid + 1: "D"}, {one.uid: "stop"})
    await step(rig, {two.uid: "C", one.uid + 1: "b"}, {two.uid: "length", two.uid + 1: "length", one.uid + 1: "stop"})
    *chunks, last, done = await reading
    assert done == "[DONE]" and last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5 and last["usage"]["prompt_tokens"] == 4
    shown = [(chunk["choices"][0]["index"], chunk["choices"][0]["text"]) for chunk in chunks]
    assert dict(reversed(shown)) == {0: "a", 1: "a", 2: "b", 3: "b"}  # the echo comes first
    assert shown.index((0, "")) < shown.index((2, "C"))  # a choice is closed when it ends
    for index, text in enumerate(["aA", "aBb", "bC", "bD"]):
        assert "".join(piece for at, piece in shown if at == index) == text
    reasons = {c["choices"][0]["index"]: c["choices"][0]["finish_reason"] for c in chunks}
    assert reasons == {0: "stop", 1: "stop", 2: "length", 3: "length"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] <= 1 and counts[-1] == 5
    assert all(chunk["usage"]["prompt_tokens"] == 4 for chunk in chunks)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_aborts_every_answer(rig, is_stream):
    async def ask():
        async with rig.post(COMPLETIONS, prompt=["a", "b"], n=2, stream=is_stream) as response:
            await response.read()

    asking = run(ask())
    one, two = await submits_of(rig, 2)
    await step(rig, {one.uid: "x"}, {one.uid: "stop"})
    asking.cancel()
    aborted = {(await rig.next(Abort)).uid for _ in range(3)}
    assert aborted == {one.uid + 1, two.uid, two.uid + 1}
    assert await rig.silent()


@pytest.mark.parametrize("is_stream", [False, True])
async def test_one_rejected_prompt_refuses_the_request(rig, is_stream):
    asked = run(rig.ask(COMPLETIONS, prompt=["a", "b"], n=2, stream=is_stream))
    one, two = await submits_of(rig, 2)
    await rig.send(Rejected(rig.generation, two.uid, 429, "the queue is full"))
    status, _, document = await asked
    assert status == 429 and document["error"]["message"] == "the queue is full"
    assert {(await rig.next(Abort)).uid for _ in range(2)} == {one.uid, one.uid + 1}
    assert await rig.silent()


async def test_echo(rig):
    for prompt, text in (("hé", "hé"), ([BOS, *ids_of("hé")], "hé"), ([*ids_of("é")[:1]], "�")):
        asked = run(rig.ask(COMPLETIONS, prompt=prompt, echo=True, stop="h"))
        await rig.tokens(await rig.next(Submit), "!", "length")
        assert (await asked)[2]["choices"][0]["text"] == text + "!"  # stop strings are looked for in the output


async def test_an_abort_that_nobody_asked_for_is_a_finish_reason(rig):
    asked = run(rig.ask(COMPLETIONS, prompt="a"))
    await rig.tokens(await rig.next(Submit), "x", "abort")
    choice = (await asked)[2]["choices"][0]
    assert choice["finish_reason"] == "abort" and choice["text"] == "x"


async def test_sampling_fields_reach_the_scheduler(rig):
    fields = {
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.4,
        "logit_bias": {"7": 5, "8": -1.5, "9": 0},
        "min_tokens": 3,
        "stop_token_ids": [9, 9, EOS],
        "priority": -4,
        "profile": "production_generate",
        "user": "me",
        "metadata": {"a": "b"},
    }
    for ignores in (False, True):
        asked = run(rig.ask(COMPLETIONS, prompt="a", ignore_eos=ignores, **fields))
        submit = await rig.next(Submit)
        await rig.tokens(submit, "x", "length")
        assert (await asked)[0] == 200
        sampling = submit.sampling
        assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.2, 0.3)
        assert sampling.repetition_penalty == 1.4 and sampling.logit_bias == {7: 5.0, 8: -1.5}
        assert sampling.min_tokens == 3 and submit.priority == -4
        assert set(submit.eos_ids) == set(sampling.barred_ids) == {9, EOS}


def test_many_prompts_share_their_biases_but_no_random_seed():
    fields = {"prompt": ["a"] * 3, "logit_bias": {str(token): 1 for token in range(9)}}
    for seed in (None, 5):
        call = parse_call("completions", {**fields, "seed": seed})
        sampling = make_sampling(call, (EOS,))
        submits = [make_submit(call, 1, uid, Prompt([7], "prompt"), 1, sampling, (EOS,)) for uid in range(3)]
        assert all(submit.sampling.biases is sampling.biases for submit in submits)
        assert len({submit.sampling.seed for submit in submits}) == (3 if seed is None else 1)


async def test_the_text_of_a_stop_id_is_not_shown(rig):
    stop = ids_of("b")
    asked = run(rig.ask(COMPLETIONS, prompt="a", stop_token_ids=stop, return_token_ids=True))
    await rig.tokens(await rig.next(Submit), "ab", "stop")
    choice = (await asked)[2]["choices"][0]
    assert choice["text"] == "a" and choice["token_ids"] == ids_of("ab")


async def test_stop_strings_wait_for_the_minimum_length(rig):
    asked = run(rig.ask(COMPLETIONS, prompt="a", stop="b", min_tokens=3))
    await rig.tokens(await rig.next(Submit), "abbab", "length")
    assert (await asked)[2]["choices"][0]["text"] == "abba"


async def test_a_stop_string_may_begin_before_the_minimum_length(rig):
    asked = run(rig.ask(COMPLETIONS, prompt="a", stop="bcd", min_tokens=3))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "abcdef")
    assert (await rig.next(Finish)).count == 4
    await rig.tokens(submit, "", "stop")
    choice = (await asked)[2]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a", "stop")


@pytest.mark.parametrize(
    ("endpoint", "asked", "n", "param"),
    [
        ("completions", {"prompt": "a", "echo": True}, 10, "echo"),
        ("completions", {"prompt": "a", "return_token_ids": True}, 10, "return_token_ids"),
        ("completions", {"prompt": "a"}, 10, None),
        ("completions", {"prompt": "a", "echo": True, "return_token_ids": True}, 1, None),
        ("chat", {"messages": [{"role": "user", "content": "a"}], "return_token_ids": True}, 10, None),
    ],
)
def test_prompts_that_every_answer_repeats_are_bounded(endpoint, asked, n, param):
    """Against 1 MiB: a prompt of 200,000 bytes as text, as much as ids."""
    call = parse_call(endpoint, {**asked, "n": n})
    prompt = Prompt([123456] * 28_000, "prompt", "y" * 200_000 if call.echo else "")
    if param is None:
        check_returned(call, [prompt], 1 << 20)
    else:
        with pytest.raises(RequestError, match=rf"^{param}: .* n = 10 .* 1 MiB, more than .* max_body_mb = 1;"):
            check_returned(call, [prompt], 1 << 20)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids[0]"),
        ({"prompt": [[1], [VOCAB_SIZE]]}, "prompt[1][0]"),
        ({"prompt": ["a", "b" * MAX_SEQ_LEN]}, "prompt[1]"),
        ({"prompt": [[1], [1] * 200]}, "prompt[1]"),
        ({"min_tokens": 17}, "min_tokens"),  # of the 16 that a completion gets by default
    ],
)
async def test_what_does_not_fit_the_model(rig, fields, param):
    status, _, document = await rig.ask(COMPLETIONS, **{"prompt": "a", **fields})
    assert status == 400 and document["error"]["param"] == param


async def test_a_minimum_that_the_context_cannot_hold_is_not_told_to_raise_the_maximum(rig):
    for asked, remedy in (
        ((COMPLETIONS, {"prompt": "a", "min_tokens": 17}), "raise max_tokens"),
        ((COMPLETIONS, {"prompt": "a", "min_tokens": MAX_SEQ_LEN}), "lower it, or send a shorter prompt"),
        ((CHAT, {"messages": [USER], "min_tokens": MAX_SEQ_LEN}), "lower it, or send a shorter prompt"),
    ):
        status, _, document = await rig.ask(asked[0], **asked[1])
        assert status == 400 and document["error"]["param"] == "min_tokens"
        assert document["error"]["message"].endswith(f"; {remedy}")


async def test_a_limit_that_does_not_fit_is_called_what_the_client_called_it(rig):
    for field in ("max_tokens", "max_completion_tokens"):
        status, _, document = await rig.ask(CHAT, messages=[USER], **{field: MAX_SEQ_LEN})
        assert status == 400 and document["error"]["param"] == field
        assert document["error"]["message"].startswith(f"{field} = {MAX_SEQ_LEN}: ")


# ----------------------------------------------------------------------------------------------------------------- chat


async def chat_prompt(rig, **body):
    """The text of a chat's prompt, without the BOS before it."""
    asked = run(rig.ask(CHAT, **body))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "x", "length")
    assert (await asked)[0] == 200
    return ints(submit.prompt)[1:]


async def test_a_conversation_that_goes_on(rig):
    said = {"role": "assistant", "content": "so far "}
    assert await chat_prompt(rig, messages=[USER]) == ids_of("<user>a<assistant>")
    assert await chat_prompt(rig, messages=[USER], add_generation_prompt=False) == ids_of("<user>a")
    for extra in ({}, {"add_generation_prompt": False}):
        ids = await chat_prompt(rig, messages=[USER, said], continue_final_message=True, **extra)
        assert ids == ids_of("<user>a<assistant>so far ")


@pytest.mark.parametrize("trims", [False, True])
async def test_continuing_a_message_is_as_transformers_does_it(tmp_path, trims):
    from transformers import PreTrainedTokenizerFast

    from tests.scripted import TOKENIZER

    template = TEMPLATE.replace("message.content", "message.content | trim") if trims else TEMPLATE
    template = template.replace("{% endfor %}", "<eos>{% endfor %}")
    theirs = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, bos_token="<bos>", eos_token="<eos>")
    theirs.chat_template = template
    async with Rig(write_model(tmp_path, template=template)) as rig:
        for text in ("so far", " so far", "so far \n", "a", "eos", ">", "<eos>", "<", " "):
            messages = [USER, {"role": "assistant", "content": text}]
            expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
            ids = await chat_prompt(rig, messages=messages, continue_final_message=True)
            assert ids == ids_of(expected)[1:]


@pytest.mark.parametrize("shown", ["", "message.content | upper", "message.content[1:]", "message.content[:2]"])
async def test_a_message_that_the_template_changes_cannot_be_gone_on_with(tmp_path, shown):
    async with Rig(write_model(tmp_path, template=TEMPLATE.replace("message.content", shown or "''"))) as rig:
        messages = [{"role": "user", "content": "hello"}]
        status, _, document = await rig.ask(CHAT, messages=messages, continue_final_message=True)
        assert status == 400 and document["error"]["param"] == "continue_final_message"


async def test_tools_results_and_template_variables_reach_the_template(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for call in m.tool_calls or [] %}[{{ call.id }} {{ call.function.name }}{{ call.function.arguments }}]"
        "{% endfor %}{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %};{% endfor %}{{ mood }}"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "42"}], "tool_call_id": "c1"},
    ]
    async with Rig(write_model(tmp_path, template=template)) as rig:
        ids = await chat_prompt(rig, messages=messages, chat_template_kwargs={"mood": ["good"]})
        assert ids == ids_of("user:a;assistant:None[c1 f{\"x\":1}];tool:42(c1);['good']")[1:]


async def test_names_reach_the_template(tmp_path):
    """A message without one has none, so that templates may ask whether it is there."""
    template = "{% for m in messages %}{{ m.name if 'name' in m else m.role }}: {{ m.content }};{% endfor %}"
    async with Rig(write_model(tmp_path, template=template)) as rig:
        messages = [USER | {"name": "ann"}, {"role": "assistant", "content": "b", "name": None}]
        assert await chat_prompt(rig, messages=messages) == ids_of("ann: a;assistant: b;")[1:]


async def test_a_template_that_fails_is_the_requests_fault(tmp_path):
    async with Rig(write_model(tmp_path, template="{{ messages[0].content + 1 }}{{ x | length }}")) as rig:
        for kwargs in ({}, {"x": 5}, {"x": [[[]]]}):
            status, _, document = await rig.ask(CHAT, messages=[USER], chat_template_kwargs=kwargs)
            assert status == 400 and document["error"]["param"] == "messages"


# --------------------------------------------------------------------------------------------------------------- tokens


async def test_tokenize(rig):
    status, _, document = await rig.ask("/tokenize", prompt="hé")
    ids = [BOS, *ids_of("hé")]
    assert status == 200
    assert document == {"count": 4, "max_model_len": MAX_SEQ_LEN, "tokens": ids, "token_strs": None}
    _, _, document = await rig.ask("/tokenize", prompt="h", add_special_tokens=False, return_token_strs=True)
    assert document["tokens"] == ids_of("h") and document["token_strs"] == ["h"]
    _, _, document = await rig.ask("/tokenize", messages=[USER], model="tiny")
    assert document["tokens"] == ids_of("<bos><user>a<assistant>")
    _, _, document = await rig.ask("/tokenize", messages=[USER], add_generation_prompt=False)
    assert document["tokens"] == ids_of("<bos><user>a")


async def test_tokenize_nothing(rig):
    assert (await rig.ask("/tokenize", prompt="", add_special_tokens=False))[2]["tokens"] == []
    assert (await rig.ask("/tokenize", prompt=""))[2]["tokens"] == [BOS]


async def test_detokenize(rig):
    _, _, document = await rig.ask("/detokenize", tokens=[BOS, *ids_of("hé")])
    assert document == {"prompt": "<bos>hé"}
    assert (await rig.ask("/detokenize", tokens=[]))[2] == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "messages"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"promt": "a"}, "promt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens[0]"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
async def test_wrong_requests_about_tokens(rig, path, body, param):
    status, _, document = await rig.ask(path, **body)
    assert status == 400 and document["error"]["param"] == param


async def test_version_and_description(rig):
    async with rig.session.get("/version") as response:
        assert await response.json() == {"version": nmoe.__version__}
    async with rig.session.get("/openapi.json") as response:
        document = await response.json()
    assert document["openapi"].startswith("3.1")
    for name, endpoint in (("CompletionRequest", "completions"), ("ChatRequest", "chat")):
        assert [*document["components"]["schemas"][name]["properties"]] == [*FIELDS[endpoint]]
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/health"} <= set(document["paths"])
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]
    assert msgspec.json.decode(text) == document
