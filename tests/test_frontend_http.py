"""What the frontend says when something is not right: statuses, errors, health, drain, timeouts, keys."""

import asyncio
import gzip
import io
import json
import time

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import test_utils
from prometheus_client.parser import text_string_to_metric_families

from nmoe import ipc
from nmoe.config import Config, Model, Parallel, Server
from nmoe.errors import CheckpointError
from nmoe.frontend.http import Router
from nmoe.frontend.prompt import load_prompts
from nmoe.messages import Abort, Serving, Submit
from nmoe.metrics import row_index
from tests.scripted import MAX_SEQ_LEN, VOCAB_SIZE, Rig, events, run, write_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module")
async def rig(model):
    async with Rig(model) as running:
        yield running


def beat(rig, age=0.0):
    """Heartbeats of the scheduler and the worker, `age` seconds ago."""
    for role in ("scheduler", "worker"):
        rig.board.rows[row_index(role, 0, 1)].set("nmoe:heartbeat_seconds", time.monotonic() - age)


async def get(rig, path, **options):
    async with rig.session.get(path, **options) as response:
        return response.status, await response.read()


async def refusal(response):
    """The error of a response, which must be OpenAI's object."""
    document = await response.json()
    assert list(document) == ["error"] and set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["message"]
    return document["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/", 404, "no such path"),
        ("POST", "/v1/embeddings", 404, "/v1/completions"),
        ("GET", "/v1/completions", 405, "send POST"),
        ("PUT", "/v1/chat/completions", 405, "send POST"),
        ("POST", "/v1/models", 405, "send GET"),
        ("DELETE", "/v1/models/tiny", 405, "send GET"),
        ("POST", "/health", 405, "send GET"),
        ("GET", "/v1/models/other", 404, "does not exist"),
        ("GET", "/v1/models/org/other", 404, "does not exist"),
        ("GET", "/v1/models/", 404, "does not exist"),
        ("GET", "/%2e%2e/etc", 404, "no such path"),
    ],
)
async def test_wrong_paths_and_methods(rig, method, path, status, says):
    async with rig.session.request(method, path) as response:
        assert response.status == status and ("Allow" in response.headers) == (status == 405)
        error = await refusal(response)
        assert says in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"prompt": "a", "max_tokens": NaN}', "JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "prompt"),
        (b'{"prompt": "a", "max_tokens": 1000000000000000000000000000000}', "max_tokens"),
        (b'{"prompt": "a", "tools": [{}]}', "tools: not supported"),
        (b'{"prompt": "' + b"a" * 100_000 + b'", "seed": "x"}', "seed"),  # large enough for a thread
    ],
)
async def test_wrong_bodies(rig, body, says):
    async with rig.session.post(COMPLETIONS, data=body, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 400 and says in (await refusal(response))["message"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": [0, VOCAB_SIZE]}, "prompt[1]", f"from 0 to {VOCAB_SIZE - 1}"),
        ({"prompt": [-1]}, "prompt[0]", "= -1"),
        (
            {"prompt": [5] * 190, "max_tokens": 11},
            "max_tokens",
            "max_tokens = 11: with a prompt of 190 tokens at most 10",
        ),
        ({"prompt": [5] * MAX_SEQ_LEN}, "prompt", "200 tokens leave no room"),
        ({"prompt": [5] * 5000}, "prompt", "5000 tokens leave no room"),
        ({"prompt": "a" * 300}, "prompt", "301 tokens leave no room"),
        ({"prompt": "a" * 5000}, "prompt", "5000 characters are at least 454 tokens"),
    ],
)
async def test_prompts_that_do_not_fit(rig, body, param, says):
    status, _, document = await rig.ask(COMPLETIONS, **body)
    assert status == 400 and document["error"]["param"] == param and says in document["error"]["message"]


async def test_unknown_model(rig):
    status, _, document = await rig.ask(COMPLETIONS, prompt="a", model="gpt-4")
    assert status == 404 and document["error"]["code"] == "model_not_found" and document["error"]["param"] == "model"


async def test_wrong_content_type(rig):
    async with rig.session.post(COMPLETIONS, data=b"prompt=a", headers={"Content-Type": "text/plain"}) as response:
        assert response.status == 415 and "application/json" in (await refusal(response))["message"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_too_large_a_body(model, chunked):
    async def pieces():
        for _ in range(40):
            yield b" " * (1 << 16)

    async with Rig(model, max_body_mb=1) as rig:
        data = pieces() if chunked else io.BytesIO(b" " * (2 << 20))
        async with rig.session.post(COMPLETIONS, data=data, headers={"Content-Type": "application/json"}) as response:
            assert response.status == 413 and "max_body_mb" in (await refusal(response))["message"]
        assert (await rig.ask(COMPLETIONS, prompt=""))[0] == 400


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(b'{"prompt": "a"}')])
async def test_compressed_bodies_are_refused(rig, data):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with rig.session.post(COMPLETIONS, data=data, headers=headers) as response:
        assert response.status == 415 and "Content-Encoding" in (await refusal(response))["message"]


async def test_request_ids(rig):
    for given, kept in (("abc-1", True), ("x" * 200, False), ("ü", False)):
        async with rig.session.get("/v1/models", headers={"X-Request-Id": given}) as response:
            assert (response.headers["X-Request-Id"] == given) == kept
    async with rig.session.get("/nowhere") as response:
        assert len(response.headers["X-Request-Id"]) == 32


async def test_models(rig):
    status, body = await get(rig, "/v1/models")
    (entry,) = json.loads(body)["data"]
    assert status == 200 and entry["id"] == "tiny" and entry["object"] == "model"
    assert entry["max_model_len"] == MAX_SEQ_LEN
    assert json.loads((await get(rig, "/v1/models/tiny"))[1]) == entry


async def test_expect_continue(rig):
    asked = run(rig.session.post(COMPLETIONS, json={"prompt": "a"}, expect100=True))
    await rig.tokens(await rig.next(Submit), "x", "length")
    async with await asked as response:
        assert response.status == 200


async def test_http_1_0_gets_its_stream_without_chunks(rig):
    host, port = rig.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"prompt": "a", "stream": true}'
    head = b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    await rig.tokens(await rig.next(Submit), "x", "length")
    answer = await reader.read()
    writer.close()
    assert b"Transfer-Encoding" not in answer and answer.endswith(b"\n\ndata: [DONE]\n\n")


async def test_a_connection_is_used_again_after_a_stream(rig):
    async def ask():
        async with rig.post(COMPLETIONS, prompt="a", stream=True) as response:
            return await events(response), response.connection

    for _ in range(3):
        asked = run(ask())
        await rig.tokens(await rig.next(Submit), "x", "length")
        assert (await asked)[0][-1] == "[DONE]"
    assert len(rig.session.connector._conns) == 1


# ------------------------------------------------------------------------------------------------- health and metrics


async def test_loading(model):
    async with Rig(model, serve=False) as rig:
        for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [{"role": "user", "content": "a"}]})):
            status, headers, document = await rig.ask(path, **body)
            assert status == 503 and int(headers["Retry-After"]) and "starting" in document["error"]["message"]
            assert "X-Should-Retry" not in headers
        beat(rig)
        assert (await get(rig, "/health"))[0] == 503
        assert (await get(rig, "/v1/models"))[0] == 200
        assert rig.launcher.receive() is None
        await rig.send(Serving(1, MAX_SEQ_LEN))
        await rig.told(ipc.Up)
        assert await get(rig, "/health") == (200, b'{"status":"ok"}')


async def test_health_is_every_process(rig):
    rows = {role: rig.board.rows[row_index(role, 0, 1)] for role in ("scheduler", "worker")}
    beat(rig)
    assert (await get(rig, "/health"))[0] == 200
    for role, row in rows.items():
        beat(rig)
        row.set("nmoe:heartbeat_seconds", time.monotonic() - 6)
        status, body = await get(rig, "/health")
        assert status == 503 and role in json.loads(body)["error"]["message"]
        row.set("nmoe:heartbeat_seconds", 0.0)
        assert "has not started" in json.loads((await get(rig, "/health"))[1])["error"]["message"]


async def test_health_after_a_death_and_in_an_overdue_step(rig):
    scheduler, worker = (rig.board.rows[row_index(role, 0, 1)] for role in ("scheduler", "worker"))
    beat(rig)
    rig.launcher.send(ipc.Gone("worker", 0, 1))
    async with asyncio.timeout(5):
        while (await get(rig, "/health"))[0] != 503:
            pass
    assert "worker 0 died" in json.loads((await get(rig, "/health"))[1])["error"]["message"]
    worker.set("nmoe:heartbeat_seconds", time.monotonic())
    assert (await get(rig, "/health"))[0] == 503  # alive again, but without its weights
    await rig.send(Serving(1, MAX_SEQ_LEN, 1))  # said before the death
    assert (await get(rig, "/health"))[0] == 503
    await rig.send(Serving(1, MAX_SEQ_LEN, 2))
    async with asyncio.timeout(5):
        while (await get(rig, "/health"))[0] != 200:
            pass
    scheduler.set("nmoe:step_deadline_seconds", time.monotonic() - 1)
    assert "overdue" in json.loads((await get(rig, "/health"))[1])["error"]["message"]
    scheduler.set("nmoe:step_deadline_seconds", time.monotonic() + 60)
    assert (await get(rig, "/health"))[0] == 200


async def test_the_frontend_has_a_heartbeat(rig):
    row = rig.board.rows[row_index("frontend", 0, 1)]
    assert time.monotonic() - row.get("nmoe:heartbeat_seconds") < 2


async def test_metrics(rig):
    rig.board.rows[0].add("nmoe:generation_tokens", 7)
    asked = run(rig.ask(COMPLETIONS, prompt="a"))
    submit = await rig.next(Submit)
    await rig.tokens(submit, "ab")
    await rig.tokens(submit, "c", "length")
    await asked
    text = (await get(rig, "/metrics"))[1].decode()
    samples = {
        sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert samples["nmoe:generation_tokens_total"] == 7
    firsts = samples["nmoe:time_to_first_token_seconds_count"]
    assert firsts >= 1 and samples["nmoe:e2e_request_latency_seconds_count"] >= 1
    assert samples["nmoe:inter_token_latency_seconds_count"] >= 1


# ---------------------------------------------------------------------------------------------- keys, timeouts, leaving


async def test_a_defect_in_a_stream_ends_it_with_an_error(model, monkeypatch, caplog):
    async with Rig(model) as rig:

        async def read():
            async with rig.post(COMPLETIONS, prompt="a", stream=True) as response:
                return await events(response)

        monkeypatch.setattr("nmoe.frontend.replies.Chunks.closing", lambda *_: 1 / 0)
        reading = run(read())
        await rig.tokens(await rig.next(Submit), "x", "length")
        first, error = await reading
        assert first["choices"] and error["error"]["message"] == "internal error" and "ZeroDivisionError" in caplog.text


async def test_a_client_that_leaves_is_no_error(caplog):
    async def leave(request, headers):
        raise ConnectionResetError("the client left")

    router = Router(Server(), {"/x": ("GET", leave)})
    async with test_utils.RawTestServer(router) as server, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get(server.make_url("/x"))
    assert caplog.records == []


async def test_what_computes_asks_for_the_key_wherever_it_is(model):
    async with Rig(model, api_keys=("key",)) as rig:
        for path in ("tokenize", "detokenize"):
            async with rig.session.post(f"/{path}", json={"prompt": "a", "tokens": [1]}) as response:
                assert response.status == 401
        assert (await get(rig, "/version"))[0] == 200


async def test_api_keys(model):
    async with Rig(model, api_keys=("key-1", "schlüssel")) as rig:
        for header in (None, "Bearer wrong", "Basic key-1", "Bearer", "Bearer ", "key-1"):
            headers = {"Authorization": header} if header else {}
            for path in (COMPLETIONS, "/v1/models", "/v1/nowhere"):
                async with rig.session.post(path, json={}, headers=headers) as response:
                    assert response.status == 401 and (await refusal(response))["code"] == "invalid_api_key"
        for key in ("key-1", "schlüssel"):
            assert (await get(rig, "/v1/models", headers={"Authorization": f"Bearer {key}"}))[0] == 200
        beat(rig)
        assert (await get(rig, "/health"))[0] == 200 and (await get(rig, "/metrics"))[0] == 200


@pytest.mark.parametrize("is_stream", [False, True])
async def test_timeout_before_the_first_token(model, is_stream):
    async with Rig(model, request_timeout_s=0.05) as rig:
        asked = run(rig.ask(COMPLETIONS, prompt="a", stream=is_stream))
        submit = await rig.next(Submit)
        status, headers, document = await asked
        assert status == 504 and document["error"]["code"] == "timeout"
        assert headers["X-Should-Retry"] == "false"
        assert (await rig.next(Abort)).uid == submit.uid


async def test_timeout_in_a_stream(model):
    """What is on its way ends there, and says so."""
    async with Rig(model, request_timeout_s=0.1) as rig:

        async def read():
            async with rig.post(COMPLETIONS, prompt="a", stream=True, n=2, stop="zz") as response:
                return await events(response)

        reading = run(read())
        submit = await rig.next(Submit)
        await rig.tokens(submit, "xz")
        *chunks, done = await reading
        choices = [chunk["choices"][0] for chunk in chunks]
        assert done == "[DONE]" and "".join(choice["text"] for choice in choices) == "xz"
        assert sorted(choice["index"] for choice in choices if choice["finish_reason"] == "abort") == [0, 1]
        assert {(await rig.next(Abort)).uid for _ in range(2)} == {submit.uid, submit.uid + 1}


async def test_drain(model):
    async with Rig(model) as rig:
        asked = run(rig.ask(COMPLETIONS, prompt="a"))
        submit = await rig.next(Submit)
        rig.launcher.send(ipc.Drain())
        async with asyncio.timeout(5):
            while True:
                if (await rig.ask(COMPLETIONS, prompt="a", n=1))[0] == 503:
                    break
        beat(rig)
        assert (await get(rig, "/health"))[0] == 503
        assert rig.launcher.receive() is None  # one request is still open
        await rig.tokens(submit, "x", "length")
        assert (await asked)[0] == 200
        await rig.told(ipc.Drained)


async def test_drain_without_requests(model):
    async with Rig(model) as rig:
        rig.launcher.send(ipc.Drain())
        await rig.told(ipc.Drained)


async def test_the_end_of_the_launcher_ends_every_stream(model):
    async with Rig(model) as rig:

        async def read():
            async with rig.post(COMPLETIONS, prompt="a", stream=True) as response:
                return await events(response)

        reading, asked = run(read()), run(rig.ask(COMPLETIONS, prompt="b"))
        for _ in range(2):
            await rig.tokens(await rig.next(Submit), "x")
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await rig.stop()
        first, error = await reading
        assert first["choices"] and error["error"]["code"] == "shutting_down"
        assert (await asked)[0] == 503
        assert time.monotonic() - began < 2


# ------------------------------------------------------------------------------------------------- models without part


async def test_a_tokenizer_with_ids_that_the_model_lacks_is_refused(tmp_path):
    """One such id in a prompt would take the worker down."""
    config = Config(Model(path=str(write_model(tmp_path))), Parallel(1, "cpu"))
    assert load_prompts(config, (), VOCAB_SIZE).tokenizer is not None
    with pytest.raises(CheckpointError, match=r"vocab_size = 9 .* same repository"):
        load_prompts(config, (), 9)


async def test_random_weights_without_a_tokenizer(tmp_path):
    folder = write_model(tmp_path, tokenizer=False)
    async with Rig(folder, model={"weights": "random"}) as rig:
        for path, body in (
            (COMPLETIONS, {"prompt": "a"}),
            (CHAT, {"messages": [{"role": "user", "content": "a"}]}),
            (COMPLETIONS, {"prompt": [5], "stop": "a"}),
        ):
            status, _, document = await rig.ask(path, **body)
            assert status == 400 and "no tokenizer.json" in document["error"]["message"]
        asked = run(rig.ask(COMPLETIONS, prompt=[5, 6], return_token_ids=True))
        await rig.tokens(await rig.next(Submit), [7, 8], "length")
        choice = (await asked)[2]["choices"][0]
        assert choice["text"] == "" and choice["token_ids"] == [7, 8]


async def test_no_chat_template(tmp_path):
    async with Rig(write_model(tmp_path, template=None)) as rig:
        status, _, document = await rig.ask(CHAT, messages=[{"role": "user", "content": "a"}])
        assert status == 400 and "no chat template" in document["error"]["message"]


async def test_a_defect_is_a_500_without_its_traceback(model, monkeypatch, caplog):
    async with Rig(model) as rig:

        def fail(*_):
            raise ZeroDivisionError("secret")

        monkeypatch.setattr("nmoe.frontend.generation.make_submit", fail)
        status, headers, document = await rig.ask(COMPLETIONS, prompt="a")
        assert status == 500 and document["error"]["message"] == "internal error"
        assert headers["X-Should-Retry"] == "false"
        assert "ZeroDivisionError: secret" in caplog.text
