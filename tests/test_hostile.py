"""Input that means harm: answered with OpenAI's error object, without a traceback, without a stall for others."""

import asyncio
import http.client
import io
import json
import socket
import threading
import time

import pytest
import pytest_asyncio

from nmoe.errors import RequestError
from nmoe.frontend import http as frontend_http
from nmoe.frontend.body import MAX_OUTSIDE, MAX_VALUES, parse_object
from nmoe.messages import Submit
from tests.scripted import Rig, run, write_model

COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}
# Seconds between two tokens of a stream. Parsing holds the interpreter for some 0.06, the rest is for busy machines;
# unchecked, some of the bodies below would hold it for 1.5.
MOST_STALL = 0.7


@pytest_asyncio.fixture(scope="module")
async def rig(tmp_path_factory):
    async with Rig(write_model(tmp_path_factory.mktemp("model"))) as running:
        yield running


async def raw(rig, data):
    """What comes back for bytes on the wire."""
    host, port = rig.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: nonsense\r\n\r\n",
    ],
    ids=range(9),
)
async def test_what_is_no_http(rig, data, caplog):
    answer = await raw(rig, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 ")) and b"application/json" in head
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error" and "not valid HTTP" in error["message"]
    assert not caplog.records


async def test_a_broken_chunked_body(rig, caplog):
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    )
    answer = await raw(rig, head + b"Connection: close\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n")
    assert answer.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 ")) and b'"error"' in answer
    assert not caplog.records


async def test_a_slow_body_has_a_deadline(rig, monkeypatch):
    monkeypatch.setattr(frontend_http, "_BODY_S", 0.05)

    async def drip():
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.02)

    began = time.monotonic()
    async with rig.session.post(COMPLETIONS, data=drip(), headers=JSON) as response:
        assert response.status == 408 and (await response.json())["error"]["code"] == "timeout"
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("head", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"])
async def test_a_head_that_never_ends_has_a_deadline(tmp_path, monkeypatch, head):
    monkeypatch.setattr(frontend_http, "_IDLE_S", 0.1)
    async with Rig(write_model(tmp_path)) as rig:
        assert await raw(rig, head) == b""  # the end of the connection
        # A request that takes longer than that is not idle.
        asked = run(rig.ask(COMPLETIONS, prompt="a"))
        submit = await rig.next(Submit)
        await asyncio.sleep(0.3)
        await rig.tokens(submit, "x", "length")
        assert (await asked)[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "stop": ["x" * 100_000] * 5},
        {"prompt": "a", "x" * 100_000: 1},
        {"prompt": "a", "profile": "x" * 100_000},
        {"prompt": "a", "model": "x" * 100_000},
        {"prompt": "a", "metadata": {"x" * 100_000: "y"}},
        {"prompt": "a", "logit_bias": {"x" * 100_000: 1}},
    ],
    ids=range(6),
)
async def test_answers_to_long_nonsense_are_short(rig, body):
    async with rig.session.post(COMPLETIONS, json=body) as response:
        text = await response.text()
        assert response.status in (400, 404) and len(text) < 2000 and json.loads(text)["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": [' + b"1," * MAX_VALUES + b"1]}", 413),
        (b'{"prompt": [' + b'"",' * MAX_VALUES + b"1]}", 413),
        (b'{"prompt": [' + b"[]," * MAX_VALUES + b"1]}", 413),
        (b'{"prompt": ' + b" " * MAX_OUTSIDE + b"1}", 413),
        (b'{"prompt": "' + b"\\" * 70_001 + b'"}', 400),
        (b'{"prompt": "' + b"a" * 70_000, 400),
        (b'{"prompt": "' + b"a" * 70_000 + b"\\", 400),
        (b'{"prompt": "' + b"\xff" * 70_000 + b'"}', 400),
        (b'{"a": "' + b"a" * 70_000 + b'", "a": 1}', 400),
        (b"[" * 70_000, 400),
        (b'{"a":' * 70_000, 400),
        (b'{"max_tokens": ' + b"9" * 70_000 + b"}", 400),
        (b'{"prompt": "a", "chat_template_kwargs": ' + b"[" * 900 + b"]" * 900 + b"}", 400),
    ],
    ids=range(13),
)
async def test_large_nonsense(rig, body, status):
    async with rig.session.post(COMPLETIONS, data=io.BytesIO(body), headers=JSON) as response:
        error = (await response.json())["error"]
        assert response.status == status and error["message"]
    # Who asks next is served.
    asked = run(rig.ask(COMPLETIONS, prompt="a"))
    await rig.tokens(await rig.next(Submit), "x", "length")
    assert (await asked)[0] == 200


async def test_deep_nesting_in_a_chat(rig):
    value = []
    for _ in range(900):
        value = [value]
    for extra in ({"chat_template_kwargs": {"x": value}}, {"metadata": value}, {"messages": value}):
        body = {"messages": [{"role": "user", "content": "a"}], **extra}
        asked = run(rig.ask("/v1/chat/completions", **body))
        if "chat_template_kwargs" in extra:
            await rig.tokens(await rig.next(Submit), "x", "length")
        assert (await asked)[0] == (200 if "chat_template_kwargs" in extra else 400)


def test_large_bodies_are_looked_through_as_small_ones_are():
    """Escapes, quotes and colons in strings fall on every border of the pieces."""
    for shift in range(6):
        text = "x" * (65_520 + shift) + '\\":,"[é' * 2000 + "\\"
        document = {"a": text, "b": {"c:": [1, "y,"], '"': text[::-1]}}
        body = json.dumps(document).encode()
        assert parse_object(body) == document
        assert parse_object(json.dumps(document, ensure_ascii=False).encode()) == document


@pytest.mark.parametrize(
    "body", [b'{"a":"' + b'\\"' * 16_000, b'{"a":' + b'"\\' * 16_000], ids=["quotes", "backslashes"]
)
def test_a_small_body_is_looked_through_in_linear_time(body):
    """It is parsed in the event loop, so no more than a few milliseconds may pass."""
    started = time.process_time()
    with pytest.raises(RequestError, match="not valid JSON"):
        parse_object(body)
    assert time.process_time() - started < 0.2


HOSTILE = {  # what is in front, what comes again and again, how often, what is behind
    "ids": (b'{"prompt":[', b"123,", 7_000_000, b"1]}"),
    "strings": (b'{"prompt":[', b'"a",', 7_000_000, b'"a"]}'),
    "escapes": (b'{"prompt":"', b"\\n", 14_000_000, b'"}'),
    "text": (b'{"prompt":"', b"a ", 14_000_000, b'"}'),
    "space": (b'{"prompt":', b" ", 28_000_000, b"1}"),
    "too much": (b'{"prompt":"', b"a", 64_000_000, b'"}'),
}


def post(url, body):
    """The status of a POST; the server may answer before it has read everything."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        connection.putrequest("POST", COMPLETIONS)
        for header in (("Content-Type", "application/json"), ("Content-Length", str(len(body)))):
            connection.putheader(*header)
        connection.endheaders()
        try:
            for start in range(0, len(body), 1 << 20):
                connection.send(body[start : start + (1 << 20)])
        except (BrokenPipeError, ConnectionResetError):
            pass
        return connection.getresponse().status
    finally:
        connection.close()


def test_huge_bodies_do_not_stall_a_running_stream(server):
    """The gaps between the events of a stream while others send 28 MB and more of everything."""
    gaps, statuses, done = {}, {}, threading.Event()
    now = [""]

    def listen():
        """Streams one after another: each is as long as the context allows."""
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "a", "max_tokens": 900, "stream": True, "ignore_eos": True, "temperature": 0})
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        while not done.is_set():
            with socket.create_connection((host, int(port)), timeout=30) as link:
                link.sendall(f"{head}\r\nConnection: close\r\n\r\n{body}".encode())
                last = time.monotonic()
                while link.recv(1 << 14) and not done.is_set():
                    at = time.monotonic()
                    gaps[now[0]] = max(gaps.get(now[0], 0.0), at - last)
                    last = at

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        time.sleep(0.3)
        for name, (front, again, times, behind) in HOSTILE.items():
            body = front + again * times + behind
            now[0] = name
            statuses[name] = post(server.url, body)
        now[0] = ""
    finally:
        done.set()
        listener.join()
    assert statuses == {"ids": 413, "strings": 413, "escapes": 400, "text": 400, "space": 413, "too much": 413}
    assert max(gaps[name] for name in HOSTILE) < MOST_STALL
    assert "Traceback" not in server.output
