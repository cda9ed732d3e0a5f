"""The request schema and the bodies it comes in: what is taken, and which field an error names."""

import contextlib
import json
import pathlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.errors import RequestError
from nmoe.frontend.body import parse_object
from nmoe.frontend.openai import Call, parse_call, parse_tokenize
from nmoe.frontend.schema import ASKS_NOTHING, FIELDS, FOREIGN
from nmoe.outputs import Returns

properties = settings(derandomize=True, deadline=None, max_examples=200)
USER = {"role": "user", "content": "a"}
CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}


def refused(endpoint, **document):
    with pytest.raises(RequestError) as caught:
        parse_call(endpoint, document)
    assert caught.value.status == 400
    return caught.value


# Field, value, what the message says beside the field's name.
WRONG = [
    ("max_tokens", 0, "nothing would come back"),
    ("max_tokens", -1, ">= 0"),
    ("max_tokens", "5", "expected `int`, got `str`"),
    ("max_tokens", 5.5, "expected `int`, got `float`"),
    ("max_tokens", True, "expected `int`, got `bool`"),
    ("max_tokens", 1 << 40, "<= 2147483647"),
    ("temperature", -0.1, ">= 0"),
    ("temperature", 2.1, "<= 2"),
    ("temperature", "hot", "expected `float`"),
    ("top_p", 0, "> 0"),
    ("top_p", 1.01, "<= 1"),
    ("top_k", -2, ">= -1"),
    ("seed", 1 << 63, "int"),
    ("seed", float(1 << 70), "64 bits"),  # as JSON with more than 64 bits is read
    ("seed", 1.5, "expected `int`"),
    ("max_tokens", 1.0, "expected `int`, got `float`"),
    ("stop_token_ids", [1.0], "[0]: expected `int`, got `float`"),
    ("stop_token_ids", [1, float(1 << 70)], "[1]: expected `int` of at most 64 bits"),
    ("seed", -(1 << 63) - 1, "int"),
    ("stop", ["a"] * 17, "<= 16"),
    ("stop", "", "must not be empty"),
    ("stop", ["a", ""], "must not be empty"),
    ("stop", 5, "expected `str | array`"),
    ("stream", "yes", "expected `bool`"),
    ("stream_options", {"include_usage": True}, "stream: true"),
    ("ignore_eos", 1, "expected `bool`"),
    ("return_token_ids", "true", "expected `bool`"),
    ("model", 5, "expected `str`"),
    ("best_of", 2, "not supported"),
    ("prompt_logprobs", 21, "<= 20"),
    ("prompt_logprobs", -1, ">= 0"),
    ("prompt_logprobs", True, "expected `int`, got `bool`"),
    ("top_k_logprobs", 0, ">= 1"),
    ("top_k_logprobs", 129, "<= 128"),
    ("logprob_token_ids", [*range(129)], "<= 128"),
    ("logprob_token_ids", [5, 5], "more than once"),
    ("logprob_token_ids", [-1], ">= 0"),
    ("logprob_token_ids", 5, "expected `array`"),
    ("return_routed_experts", 1, "expected `bool`"),
    ("n", 0, ">= 1"),
    ("n", 129, "<= 128"),
    ("min_p", 1.1, "<= 1"),
    ("presence_penalty", -2.1, ">= -2"),
    ("frequency_penalty", 2.1, "<= 2"),
    ("repetition_penalty", 0.001, ">= 0.01"),
    ("logit_bias", {"1": 101}, "<= 100"),
    ("logit_bias", {"a": 1}, "its keys are token ids"),
    ("logit_bias", {"1\n": 1}, "its keys are token ids"),
    ("logit_bias", {"1": 1, "01": 1}, "more than once"),
    ("min_tokens", -1, ">= 0"),
    ("stop_token_ids", [*range(17)], "<= 16"),
    ("stop_token_ids", [-1], ">= 0"),
    ("priority", 1 << 31, "<= "),
    ("profile", "fast", "there are production_generate, "),
    ("user", 5, "expected `str`"),
    ("user", "a" * 513, "<= 512"),
    ("metadata", {"a": 1}, "expected `str`"),
    ("metadata", {str(i): "" for i in range(17)}, "<= 16"),
    ("temprature", 1, "did you mean temperature?"),
    ("max_token", 1, "did you mean max_tokens?"),
    ("qqq", 1, "known fields: "),
    ("qqq", None, "known fields: "),
]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize(("field", "value", "says"), WRONG)
def test_wrong_fields_are_named(endpoint, field, value, says):
    prompt = {"prompt": "a"} if endpoint == "completions" else {"messages": [USER]}
    error = refused(endpoint, **prompt, **{field: value})
    assert error.param.startswith(field) and str(error).startswith(field) and says in str(error)


@pytest.mark.parametrize(
    ("endpoint", "document", "param"),
    [
        ("completions", {}, "prompt"),
        ("completions", {"prompt": None}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": 5}, "prompt"),
        ("completions", {"prompt": [1, 2, "x"]}, "prompt[2]"),
        ("completions", {"prompt": ["a", ""]}, "prompt[1]"),
        ("completions", {"prompt": [[1], []]}, "prompt[1]"),
        ("completions", {"prompt": [[1], [2, "x"]]}, "prompt[1][1]"),
        ("completions", {"prompt": ["a", [1]]}, "prompt[1]"),
        ("completions", {"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ("completions", {"prompt": "a", "min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ("completions", {"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias"),
        ("completions", {"prompt": "a", "metadata": {"a" * 65: "b"}}, "metadata"),
        (
            "completions",
            {"prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ("completions", {"prompt": [1.0]}, "prompt[0]"),
        ("completions", {"prompt": "a", "messages": [USER]}, "messages"),
        ("completions", {"prompt": "a", "max_completion_tokens": 5}, "max_completion_tokens"),
        ("completions", {"prompt": "a", "stream": True, "stream_options": {"usage": 1}}, "stream_options.usage"),
        ("chat", {}, "messages"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": "hi"}, "messages"),
        ("chat", {"messages": ["hi"]}, "messages[0]"),
        ("chat", {"messages": [USER, {"role": "robot", "content": "a"}]}, "messages[1].role"),
        ("chat", {"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ("chat", {"messages": [{**USER, "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
        ("chat", {"messages": [USER], "echo": True}, "echo"),
        (
            "chat",
            {"messages": [USER], "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ("chat", {"messages": [{**USER, "content": ""}], "continue_final_message": True}, "continue_final_message"),
        ("chat", {"messages": [USER], "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0]"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "messages[0]"),
        ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ("chat", {"messages": [{**USER, "name": 5}]}, "messages[0].name"),
        ("chat", {"messages": [{**USER, "mood": "x"}]}, "messages[0].mood"),
        ("chat", {"messages": [{**USER, "content": [{"type": "text", "a": 1}]}]}, "messages[0].content[0].a"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ("chat", {"messages": [USER], "prompt": "a"}, "prompt"),
        ("chat", {"messages": [USER], "max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ("chat", {"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_wrong_prompts_and_contradictions(endpoint, document, param):
    error = refused(endpoint, **document)
    assert error.param == param and str(error).startswith(param)


def test_a_message_may_say_that_it_is_text():
    """As lm-evaluation-harness does in every chat."""
    plain, typed = (parse_call("chat", {"messages": [message]}) for message in (USER, USER | {"type": "text"}))
    assert plain == typed


def test_an_unknown_role_is_told_the_known_ones():
    error = refused("chat", messages=[{"role": "robot", "content": "a"}])
    assert str(error).endswith("one of system, developer, user, assistant, tool")


@pytest.mark.parametrize(
    ("endpoint", "field", "remedy"),
    [
        ("completions", "max_completion_tokens", "it belongs to /v1/chat/completions"),
        ("completions", "top_logprobs", "it belongs to /v1/chat/completions"),
        ("completions", "messages", "it belongs to /v1/chat/completions"),
        ("chat", "prompt", "it belongs to /v1/completions, /v1/generate"),
        ("generate", "stream", "it belongs to /v1/completions, /v1/chat/completions"),
        ("chat", "logits", "it belongs to /v1/generate"),
        ("chat", "tools", "leave it out"),
        ("chat", "logits_processors", "leave it out"),
        ("chat", "mm_processor_kwargs", "leave it out"),
        ("chat", "thinking_token_budget", "leave it out"),
        ("completions", "prompt_embeds", "leave it out"),
        ("completions", "max_token", "did you mean max_tokens?"),
    ],
)
def test_a_field_that_is_not_the_endpoints_is_refused_with_a_remedy(endpoint, field, remedy):
    """A field of another endpoint is not taken for a misspelt one."""
    error = refused(endpoint, **{field: 1})
    assert error.param == field and str(error).startswith(f"{field}: ") and str(error).endswith(f"; {remedy}")


@pytest.mark.parametrize(
    ("message", "param", "remedy"),
    [
        ({"mood": "b"}, "messages[0].mood", "leave it out"),
        ({"content": [{"type": "image_url"}]}, "messages[0].content[0].type", "only text is supported"),
        ({"type": "image_url"}, "messages[0].type", "only text is supported"),
        ({"tool_calls": [CALL | {"type": "custom"}]}, "messages[0].tool_calls[0].type", "only function is supported"),
    ],
)
def test_what_a_message_may_not_have_is_refused_with_a_remedy(message, param, remedy):
    error = refused("chat", messages=[USER | message])
    assert error.param == param and str(error).endswith(f"; {remedy}")


def test_a_chat_is_not_told_to_echo():
    assert "echo with logprobs" in str(refused("completions", prompt="a", max_tokens=0))
    assert "echo" not in str(refused("chat", messages=[USER], max_tokens=0))


def test_two_names_of_one_length():
    for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}):
        assert parse_call("chat", {"messages": [USER], **fields}).max_tokens == 5


@pytest.mark.parametrize(
    ("endpoint", "fields", "param", "text"),
    [
        ("completions", {"logprobs": True}, "logprobs", "expected `int`, got `bool`"),
        ("completions", {"logprobs": 21}, "logprobs", "<= 20"),
        ("completions", {"top_logprobs": 2}, "top_logprobs", "not supported"),
        ("completions", {"max_tokens": 0, "logprobs": 1}, "max_tokens", "prompt_logprobs"),
        ("completions", {"max_tokens": 0, "top_k_logprobs": 1}, "max_tokens", "prompt_logprobs"),
        ("completions", {"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", "more than max_tokens = 0"),
        ("chat", {"logprobs": 1}, "logprobs", "expected `bool`, got `int`"),
        ("chat", {"top_logprobs": 2}, "top_logprobs", "only together with logprobs: true"),
        ("chat", {"top_logprobs": 1, "logprobs": False, "profile": "rl_sample"}, "top_logprobs", "only together"),
        ("chat", {"top_logprobs": 21, "logprobs": True}, "top_logprobs", "<= 20"),
        ("chat", {"echo": True}, "echo", "not supported"),
        *[
            (endpoint, {"stream": True, "profile": name}, "stream", f"profile {name} does not stream")
            for endpoint in ("completions", "chat")
            for name in ("online_distill", "rl_sample", "eval_exact", "offline_distill")
        ],
    ],
)
def test_contradictions_about_outputs(endpoint, fields, param, text):
    error = refused(endpoint, **({"prompt": "a"} if endpoint == "completions" else {"messages": [USER]}), **fields)
    assert error.param == param and text in str(error) and error.status == 400


@pytest.mark.parametrize(
    ("endpoint", "fields", "returns"),
    [
        ("completions", {}, Returns()),
        ("completions", {"logprobs": 0}, Returns(True)),
        ("completions", {"logprobs": 3, "top_k_logprobs": 100, "prompt_logprobs": 5}, Returns(True, True, 100)),
        ("completions", {"logprobs": 3, "echo": True}, Returns(True, True, 3)),
        ("completions", {"echo": True, "prompt_logprobs": None}, Returns()),
        ("completions", {"logprob_token_ids": [9, 2]}, Returns(True, False, 0, (9, 2))),
        ("completions", {"logprob_token_ids": []}, Returns()),
        ("completions", {"return_routed_experts": True}, Returns(routing=True)),
        ("completions", {"max_tokens": 0, "echo": True, "logprobs": 1}, Returns(True, True, 1)),
        ("completions", {"max_tokens": 0, "profile": "eval_exact"}, Returns(True, True)),
        ("completions", {"profile": "rl_sample"}, Returns(True)),
        ("completions", {"profile": "online_distill"}, Returns(True, False, 10)),
        ("completions", {"profile": "offline_distill", "top_k_logprobs": 64}, Returns(True, False, 64)),
        ("completions", {"profile": "eval_exact", "logprobs": 2}, Returns(True, True, 2)),
        ("chat", {"logprobs": True}, Returns(True)),
        ("chat", {"logprobs": True, "top_logprobs": 20}, Returns(True, False, 20)),
        ("chat", {"logprobs": False, "top_logprobs": None}, Returns()),
        ("chat", {"logprobs": False, "top_logprobs": 0}, Returns()),
        ("chat", {"profile": "rl_sample"}, Returns(True)),
        ("chat", {"profile": "rl_sample", "top_logprobs": 4}, Returns(True, False, 4)),
        ("chat", {"profile": "rl_sample", "logprobs": False}, Returns()),
        ("chat", {"profile": "eval_exact", "max_tokens": 0}, Returns(True, True)),
    ],
)
def test_what_has_to_come_back(endpoint, fields, returns):
    prompt = {"prompt": "a"} if endpoint == "completions" else {"messages": [USER]}
    assert parse_call(endpoint, {**prompt, **fields}).returns == returns


def test_null_is_absent():
    nothing = dict.fromkeys([*FIELDS["completions"], "top_logprobs", "tools"])
    assert parse_call("completions", {**nothing, "prompt": "a"}) == parse_call("completions", {"prompt": "a"})


@pytest.mark.parametrize("endpoint", FIELDS)
def test_what_asks_for_nothing_is_taken(endpoint):
    """Many clients send these whether they mean anything by them or not; with another value they are refused."""
    prompt = {"messages": [USER]} if endpoint == "chat" else {"prompt": "a"}
    assert set(ASKS_NOTHING) <= FOREIGN
    for field, values in ASKS_NOTHING.items():
        for value in values:
            assert parse_call(endpoint, {**prompt, field: value}) == parse_call(endpoint, prompt)
        if field not in FIELDS[endpoint]:
            assert refused(endpoint, **prompt, **{field: "else"}).param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "text", "schema": {}}),
        ("store", True),
        ("best_of", 2),
        ("best_of", True),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
    ],
)
def test_what_asks_for_something_is_not(field, value):
    error = refused("chat", messages=[USER], **{field: value})
    assert error.param == field and str(error) == f"{field}: not supported; leave it out"


def test_as_many_stop_strings_as_clients_send():
    """Harnesses for code send more than the 4 that OpenAI takes, and editors' completion up to DeepSeek's 16."""
    stops = [f"\n{place}" for place in range(16)]
    assert parse_call("completions", {"prompt": "a", "stop": stops}).stop == tuple(stops)


def test_stop_may_be_one_string():
    assert parse_call("completions", {"prompt": "a", "stop": "x"}).stop == ("x",)
    assert parse_call("completions", {"prompt": "a", "stop": ["x", "y"]}).stop == ("x", "y")
    assert parse_call("completions", {"prompt": "a", "stop": []}).stop == ()


# --------------------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object, not an array"),
        (b"null", "not null"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a":' + b"[" * 100_000, "depth"),
        (b'{"a":' * 100_000, "depth"),
        (b'{"a": 1, "a": 1}', "^a: appears more than once"),
        (b'{"b": [{"a": 1, "c": ":", "\\u0061": 2}]}', r"^b\[0\].a: appears more than once"),
        (b'{"n": 1e400, "logit_bias": {"1": 1, "1": 2}}', "not valid JSON"),
        (b'{"logit_bias": {"1": 1, "1": 2}}', r"^logit_bias\.1: appears more than once"),
        (b'{"a": 1, "a": ' + b"[" * 1000 + b"]" * 1000 + b"}", "more than once"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_bodies_that_are_refused(body, says):
    with pytest.raises(RequestError, match=says) as caught:
        parse_object(body)
    assert caught.value.status == 400


def test_a_nested_body_is_taken():
    depth = 1000
    assert parse_object(b'{"a":' * depth + b"1" + b"}" * depth)


def test_huge_integers_are_refused_by_their_field():
    document = parse_object(b'{"prompt": [1%s]}' % (b"0" * 30))
    error = refused("completions", **document)
    assert error.param == "prompt[0]" and "64 bits" in str(error)
    assert "got `float`" in str(refused("completions", prompt=[[5, 1.0]]))


@pytest.mark.parametrize(
    ("endpoint", "field", "more"),
    [
        ("completions", "logprobs", {}),
        ("completions", "prompt_logprobs", {}),
        ("chat", "top_logprobs", {"logprobs": True}),
        ("chat", "top_k_logprobs", {}),
    ],
)
def test_a_small_vocabulary_has_fewer_likeliest_tokens(endpoint, field, more):
    document = {"prompt": "a"} if endpoint == "completions" else {"messages": [USER]}
    assert parse_call(endpoint, {**document, **more, field: 8}, 8).returns.top_k == 8
    with pytest.raises(RequestError, match=f"^{field} = 9: .* has 8 tokens") as caught:
        parse_call(endpoint, {**document, **more, field: 9}, 8)
    assert caught.value.param == field


def test_what_a_profile_brings_unasked_fits_the_vocabulary():
    assert parse_call("completions", {"prompt": "a", "profile": "online_distill"}, 8).top_k_logprobs == 8
    assert parse_call("completions", {"prompt": "a", "profile": "online_distill"}, 300).top_k_logprobs == 10


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@properties
@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_no_object_is_taken_for_one_with_repeated_keys(document):
    for ascii_only in (False, True):
        text = json.dumps(document, ensure_ascii=ascii_only)
        try:
            body = text.encode()
        except UnicodeEncodeError:  # a lone surrogate
            continue
        try:
            parse_object(body)
        except RequestError as error:
            assert "more than once" not in str(error)


@properties
@given(
    st.sampled_from(["completions", "chat"]),
    st.dictionaries(st.sampled_from([*FIELDS["completions"], *FIELDS["chat"], "n", "x"]), json_values, max_size=5),
)
def test_any_object_is_taken_or_refused(endpoint, document):
    try:
        call = parse_call(endpoint, document)
    except RequestError as error:
        assert error.status == 400 and error.param
    else:
        assert call.prompts or call.conversation


@properties
@given(st.binary(max_size=40))
def test_any_bytes_are_taken_or_refused(body):
    try:
        assert isinstance(parse_object(body), dict)
    except RequestError as error:
        assert error.status == 400


def readme_fields():
    """The README's table of fields: the names that begin a row, and all that are named in it."""
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [row.split("|") for row in readme.split("### Fields")[1].split("\n### ")[0].splitlines() if row[:3] == "| `"]
    names = re.compile("`([a-z_]+)`")
    first = {name: row[2].strip() for row in rows for name in names.findall(row[1])}
    return first, {name for row in rows for name in names.findall("|".join(row))}


def test_the_readme_has_every_field_and_no_other():
    first, named = readme_fields()
    fields = {name for each in FIELDS.values() for name in each}
    assert set(first) <= fields
    assert fields - named == {"logits"}  # of /v1/generate, see docs/generate.md


def test_the_readme_tells_the_defaults():
    defaults = {}
    for name, told in readme_fields()[0].items():
        with contextlib.suppress(json.JSONDecodeError):
            defaults[name] = json.loads(told)
    call = Call(endpoint="completions")
    actual = {name: getattr(call, name) for name in defaults if hasattr(call, name)}
    assert len(actual) >= 12
    assert actual == {name: tuple(told) if told == [] else told for name, told in defaults.items() if name in actual}


def test_all_that_a_template_may_write_counts_as_text():
    """What decides which thread tokenizes it, so that a few long ones do not keep the short ones waiting."""
    long = "x" * 1000
    called = {"id": "1", "function": {"name": "f", "arguments": long}}
    for fields in (
        {"messages": [{"role": "user", "content": long}]},
        {"messages": [{**USER, "name": long}]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [called]}]},
        {"messages": [USER], "chat_template_kwargs": {"a": {"b": [1, [long]]}}},
    ):
        assert 1000 <= parse_call("chat", fields).text_length <= 1010
        asked = {name: value for name, value in fields.items() if name != "chat_template_kwargs"}
        assert parse_tokenize(asked | {"chat_template_kwargs": {"c": long}}).text_length >= 1000
