"""Clients that do not read, do not write, or leave: bounded memory, no delay for others, nothing left behind."""

import asyncio
import json
import socket
import struct
import time

import psutil
import pytest
import pytest_asyncio

from nmoe.frontend import http as frontend_http
from nmoe.frontend import sse
from nmoe.frontend.logprobs import ChoiceFormats
from nmoe.messages import Abort, Submit
from nmoe.outputs import pack
from tests.scripted import TIMEOUT, Rig, ids_of, write_model

BODY = {"prompt": "hi", "max_tokens": 190, "stream": True}
MANY = ids_of("x") * 40_000  # tokens of one message, so that few of them fill the buffers between the processes


@pytest_asyncio.fixture
async def rig(tmp_path, monkeypatch):
    monkeypatch.setattr(frontend_http, "_HEAD_S", 0.2)
    monkeypatch.setattr(sse, "_UNREAD_S", 0.2)
    monkeypatch.setattr(frontend_http, "_UNREAD_S", 0.2)
    async with Rig(write_model(tmp_path)) as running:
        yield running


def connect(rig, receive_buffer=None):
    """A connected socket that reads only when told to."""
    host, port = rig.url.removeprefix("http://").split(":")
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect((host, int(port)))
    sock.setblocking(False)
    return sock


async def ask(rig, sock, **fields):
    """Send the request for a stream; its Submit."""
    data = json.dumps(BODY | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    await asyncio.get_running_loop().sock_sendall(sock, head.encode() + b"\r\n\r\n" + data)
    return await rig.next(Submit)


async def closed(sock):
    """Read what is left, up to the end of the connection."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(TIMEOUT):
        try:
            while await loop.sock_recv(sock, 1 << 16):
                pass
        except ConnectionResetError:
            pass
    sock.close()


async def until(condition):
    """Look every now and then: nothing tells when a task or a descriptor is gone."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_reader_that_stops_is_dropped_and_delays_nobody(rig, monkeypatch):
    monkeypatch.setattr(sse, "_MAX_UNSENT", 1 << 14)
    stalled = connect(rig, receive_buffer=4096)
    submit = await ask(rig, stalled)
    reader = connect(rig)
    other = await ask(rig, reader)
    slowest = 0.0
    sent = 0
    while True:  # until the frontend gives the stalled one up: its Abort ends the loop
        await rig.tokens(submit, MANY)
        sent += len(MANY)
        began = time.monotonic()
        await rig.tokens(other, "y")
        async with asyncio.timeout(TIMEOUT):
            await asyncio.get_running_loop().sock_recv(reader, 1 << 16)
        slowest = max(slowest, time.monotonic() - began)
        assert sent < 40_000_000
        if await rig.router.poll(0):
            break
    assert (await rig.next(Abort)).uid == submit.uid
    assert slowest < 0.5
    await rig.tokens(other, "", reason="length")
    await closed(stalled)
    reader.close()


async def test_log_probabilities_are_rendered_before_many_gather(rig, monkeypatch):
    """A client that pauses must not make the event loop render thousands of tokens at once."""
    monkeypatch.setattr(frontend_http, "_UNREAD_S", 60)
    monkeypatch.setattr(sse, "_MAX_UNSENT", 1 << 14)
    stalled = connect(rig, receive_buffer=4096)
    submit = await ask(rig, stalled, top_k_logprobs=128)
    sizes = []
    take = ChoiceFormats.take
    monkeypatch.setattr(ChoiceFormats, "take", lambda self, ids: (sizes.append(len(ids)), take(self, ids))[1])
    record = struct.pack("<2fi128i128f", -1, -1, 1, *range(128), *[-1.5] * 128)
    await rig.tokens(submit, "x", block=pack(b"", record, 1, b"", 0))
    await until(lambda: sizes == [1])
    for _ in range(1000):
        await rig.tokens(submit, "x" * 8, block=pack(b"", record * 8, 8, b"", 0))
    await until(lambda: sum(sizes) > 8001 - 64)
    assert 8 < max(sizes) <= 64  # some had to wait
    stalled.close()
    assert (await rig.next(Abort)).uid == submit.uid


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_shuts_down_its_sending_side_has_left(rig, is_stream):
    sock = connect(rig)
    submit = await ask(rig, sock, stream=is_stream)
    sock.shutdown(socket.SHUT_WR)
    assert (await rig.next(Abort)).uid == submit.uid
    await closed(sock)


async def test_an_answer_whose_end_nobody_reads_does_not_stay(rig):
    stalled = connect(rig, receive_buffer=4096)
    submit = await ask(rig, stalled)
    for _ in range(200):
        await rig.tokens(submit, MANY)
    await rig.tokens(submit, "", reason="length")
    tasks = len(asyncio.all_tasks())
    await until(lambda: len(asyncio.all_tasks()) < tasks)
    await closed(stalled)


@pytest.mark.parametrize("size", [1, 200])  # in the kernel's buffers, and beyond
async def test_a_whole_answer_that_nobody_reads_does_not_stay(rig, size):
    stalled = connect(rig, receive_buffer=4096)
    submit = await ask(rig, stalled, stream=False)
    tasks, descriptors = len(asyncio.all_tasks()), psutil.Process().num_fds()
    for _ in range(size):
        await rig.tokens(submit, MANY)
    await rig.tokens(submit, "", reason="length")
    await until(lambda: psutil.Process().num_fds() < descriptors and len(asyncio.all_tasks()) < tasks)
    stalled.close()


async def test_a_head_that_does_not_come_has_a_deadline(rig):
    silent, slow = connect(rig), connect(rig)
    slow.send(b"POST /v1/completions HTTP/1.1\r\nHo")
    await closed(silent)
    await closed(slow)


async def test_idle_connections_cost_little_and_go(rig, monkeypatch):
    monkeypatch.setattr(frontend_http, "_HEAD_S", 1.0)
    process = psutil.Process()
    descriptors, memory = process.num_fds(), process.memory_info().rss
    idle = [connect(rig) for _ in range(300)]
    await asyncio.sleep(0.2)
    assert process.memory_info().rss - memory < 300 * 60_000
    async with rig.session.get("/v1/models") as response:
        assert response.status == 200
    for sock in idle:
        await closed(sock)
    await asyncio.sleep(0.05)
    assert process.num_fds() <= descriptors + 2  # the session's own connection


async def test_clients_that_leave_together_leave_nothing(rig):
    tasks, descriptors = len(asyncio.all_tasks()), psutil.Process().num_fds()
    for _ in range(3):
        clients = [connect(rig) for _ in range(40)]
        submits = {(await ask(rig, client)).uid for client in clients}
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not goodbye
            client.close()
        assert {(await rig.next(Abort)).uid for _ in clients} == submits
    await until(lambda: len(asyncio.all_tasks()) <= tasks and psutil.Process().num_fds() <= descriptors)
