"""Random requests against a whole server: valid ones are answered, mutated ones refused, none ends in a 5xx."""

import http.client
import json

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from nmoe.profiles import PROFILES
from tests.serving import Server

MAX_SEQ_LEN = 48
VOCAB = 512
quick = settings(
    derandomize=True, deadline=None, max_examples=30, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def server(checkpoint):
    """A short context, so that nothing takes long."""
    model = {"path": str(checkpoint), "name": "tiny", "max_seq_len": MAX_SEQ_LEN}
    with Server({"model": model, "engine": {"num_pages": 256, "page_size": 16, "max_batch_size": 64}}) as running:
        yield running
        assert "Traceback" not in running.output


@pytest.fixture(scope="module")
def post(server):
    """Sends a body; gives the status and the answer's text."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)

    def post(path, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()

    yield post
    connection.close()


def some(strategy):
    """null means absent."""
    return st.none() | strategy


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
shared = {
    "model": some(st.just("tiny")),
    "n": some(st.integers(1, 3)),
    "temperature": some(st.floats(0, 2)),
    "top_p": some(st.floats(0, 1, exclude_min=True)),
    "top_k": some(st.integers(-1, 600)),
    "min_p": some(st.floats(0, 1)),
    "presence_penalty": some(st.floats(-2, 2)),
    "frequency_penalty": some(st.floats(-2, 2)),
    "repetition_penalty": some(st.floats(0.01, 2)),
    "logit_bias": some(st.dictionaries(st.integers(0, VOCAB - 1).map(str), st.floats(-100, 100), max_size=5)),
    "seed": some(st.integers(-(2**63), 2**63 - 1)),
    "stop": some(texts | st.lists(texts, max_size=16)),
    "stop_token_ids": some(st.lists(st.integers(0, VOCAB - 1), max_size=16)),
    "min_tokens": some(st.integers(0, 4)),
    "max_tokens": some(st.integers(4, 8)),
    "ignore_eos": some(st.booleans()),
    "stream": some(st.booleans()),
    "return_token_ids": some(st.booleans()),
    "return_tokens_as_token_ids": some(st.booleans()),
    "priority": some(st.integers(-(2**31), 2**31 - 1)),
    "profile": some(st.sampled_from([*PROFILES])),
    "prompt_logprobs": some(st.integers(0, 20)),
    "top_k_logprobs": some(st.integers(1, 128)),
    "logprob_token_ids": some(st.lists(st.integers(0, VOCAB - 1), max_size=128, unique=True)),
    "return_routed_experts": some(st.booleans()),
    "user": some(st.text(max_size=20)),
    "metadata": some(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)),
}
completions = st.fixed_dictionaries(
    {"prompt": texts | ids | st.lists(texts, min_size=1, max_size=3) | st.lists(ids, min_size=1, max_size=3)},
    optional={"echo": some(st.booleans()), "logprobs": some(st.integers(0, 20)), **shared},
)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
contents = st.text(max_size=3) | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=2)}), max_size=2
)
chats = st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), min_size=1, max_size=1)},
    optional={
        "add_generation_prompt": some(st.booleans()),
        "chat_template_kwargs": some(st.just({"x": 1})),
        "logprobs": some(st.booleans()),
        "top_logprobs": some(st.integers(0, 20)),
        **shared,
    },
)


def consistent(request):
    """Without what contradicts the rest."""
    path, body = request
    if not PROFILES[body.get("profile") or "production_generate"].streams:
        body.pop("stream", None)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    return path, body


requests = (st.tuples(st.just("/v1/completions"), completions) | st.tuples(st.just("/v1/chat/completions"), chats)).map(
    consistent
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def test_valid_requests_are_answered(post):
    @quick
    @given(requests)
    def check(request):
        path, body = request
        status, text = post(path, body)
        assert status == 200, text
        if body.get("stream"):
            assert text.endswith("data: [DONE]\n\n")
        else:
            assert len(json.loads(text)["choices"]) >= (body.get("n") or 1)

    check()


@st.composite
def mutated(draw):
    """A valid request with some of its fields replaced, or its bytes broken."""
    path, body = draw(requests)
    for name in draw(st.lists(st.sampled_from([*shared, *body, "tools", "x"]), max_size=2)):
        body[name] = draw(anything)
    data = json.dumps(body).encode()
    if draw(st.booleans()):
        place = draw(st.integers(0, len(data) - 1))
        piece = draw(st.binary(max_size=3))
        data = data[:place] + piece + data[place + draw(st.integers(0, 3)) :]
    return path, data


def test_mutated_requests_are_answered_or_refused(post):
    seen = set()

    @settings(quick, max_examples=70)
    @given(mutated())
    def check(request):
        status, text = post(*request)
        seen.add(status)
        assert 200 <= status < 500, text
        if status != 200:
            error = json.loads(text)["error"]
            assert error["message"] and set(error) == {"message", "type", "param", "code"}

    check()
    assert {200, 400} <= seen


@schemathesis.serializer("application/msgpack")
def pack(_, value):
    """As msgpack; what it has no form for (huge numbers, say) is sent as JSON, which is bytes too."""
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, TypeError):
        return json.dumps(value, default=str).encode()


OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/generate", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
    ("/version", "GET"),
]


@pytest.fixture(scope="module")
def description(server):
    """What the server says about itself, as schemathesis reads it."""
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_the_description_has_every_path(description):
    assert {path for path, _ in OPERATIONS} | {"/openapi.json"} == set(description.raw_schema["paths"])


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        (path, method, mode)
        for path, method in OPERATIONS
        for mode in GenerationMode
        if method == "POST" or mode is GenerationMode.POSITIVE  # a GET has nothing that could be wrong
    ],
)
def test_schemathesis_finds_no_5xx(server, description, path, method, mode):
    operation = description[path][method]

    @settings(quick, max_examples=10 if method == "POST" else 2)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.validate_response(case.call(base_url=server.url, timeout=20), checks=(not_a_server_error,))

    check()
