"""Deaths under load: every open request ends once and soon, what died restarts, and nothing piles up."""

import asyncio
import json
import pathlib
import shutil
import signal
import time
from collections.abc import Iterator

import aiohttp
import psutil
import pytest

from nmoe.supervision import MAX_TRIES
from tests.serving import Server

STREAMS = 32
END_S = 5.0  # from a death to the end of the last stream
BACK_S = 20.0  # from a death to the next answer


@pytest.fixture(scope="module")
def server(checkpoint: pathlib.Path) -> Iterator[Server]:
    """One server of two workers that survives all the deaths of this file."""
    parallel = {"world_size": 2, "device": "cpu"}
    with Server({"model": {"path": str(checkpoint)}, "parallel": parallel}) as running:
        yield running


async def _stream(session: aiohttp.ClientSession, server: Server, started: asyncio.Event) -> str:
    """How one stream ends: "error", "lost" (the connection), "done", or what else it says."""
    body = {"model": server.model, "prompt": [1, 2, 3], "max_tokens": 1000, "ignore_eos": True, "stream": True}
    events = []
    try:
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            if response.status != 200:
                return "error" if response.status >= 500 else str(response.status)
            async for line in response.content:
                started.set()
                if line.startswith(b"data: "):
                    events.append(line.removeprefix(b"data: ").strip())
    except aiohttp.ClientError:
        return "lost"
    errors = [event for event in events if b'"error"' in event]
    assert len(errors) <= 1 and events[-1:] in ([b"[DONE]"], errors)
    return "error" if errors else "done"


async def _recovered(session: aiohttp.ClientSession, server: Server, since: float) -> float:
    """Seconds until the server answers a new request and says that it is healthy."""
    body = {"model": server.model, "prompt": [5], "max_tokens": 1, "temperature": 0}
    while True:
        assert time.monotonic() - since < BACK_S, server.output
        try:
            async with session.post(f"{server.url}/v1/completions", json=body) as response:
                if response.status == 200 and server.healthy():
                    assert (await response.json())["usage"]["completion_tokens"] == 1
                    return time.monotonic() - since
        except aiohttp.ClientError:
            pass  # the frontend is the one that died
        await asyncio.sleep(0.05)


async def _kill(server: Server, name: str, signum: signal.Signals) -> tuple[list[str], float, float]:
    """Kill under load; the streams' ends, the seconds to the last of them and to the first new answer."""
    started = asyncio.Event()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        streams = [asyncio.create_task(_stream(session, server, started)) for _ in range(STREAMS)]
        await started.wait()
        victim = server.find(name)
        killed_at = time.monotonic()
        victim.send_signal(signum)
        ends = await asyncio.gather(*streams)
        ended = time.monotonic() - killed_at
        return ends, ended, await _recovered(session, server, killed_at)


@pytest.mark.parametrize("name", ["worker 1", "scheduler", "frontend 0"])
async def test_a_death_ends_every_stream_once_and_the_server_comes_back(server: Server, name: str) -> None:
    before = len(server.family())
    ends, ended, _ = await _kill(server, name, signal.SIGKILL)
    assert ends == ["lost" if name == "frontend 0" else "error"] * STREAMS
    assert ended < END_S
    assert len(server.family()) == before
    metrics = server.metrics()
    assert metrics["nmoe:num_requests_running"] == metrics["nmoe:num_requests_waiting"] == 0


async def test_a_worker_that_hangs_is_as_good_as_dead(server: Server) -> None:
    ends, ended, _ = await _kill(server, "worker 0", signal.SIGSTOP)
    assert ends == ["error"] * STREAMS
    assert ended < 2 * END_S


async def test_health_says_so_while_the_engine_restarts(server: Server) -> None:
    server.find("worker 0").kill()
    unhealthy = False
    deadline = time.monotonic() + BACK_S
    while not (unhealthy and server.healthy()):
        assert time.monotonic() < deadline
        unhealthy |= not server.healthy()


async def test_many_deaths_leave_nothing_behind(server: Server) -> None:
    def held() -> list[tuple[str, int]]:
        return sorted((process.name(), process.num_fds()) for process in server.family())

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        before = held()
        for _ in range(3):
            for name in ("worker 0", "scheduler", "frontend 0"):
                server.find(name).kill()
                await _recovered(session, server, time.monotonic())
                await asyncio.sleep(0.6)  # sooner would count as dying again at once
    assert held() == before


def test_what_keeps_dying_ends_the_server_with_the_reason(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    doomed = shutil.copytree(checkpoint, tmp_path / "doomed")
    server = Server({"model": {"path": str(doomed)}}).start()
    try:
        family = server.family()
        (doomed / "config.json").write_text(json.dumps({"model_type": "nothing"}))
        server.find("worker 0").kill()
        assert server.process.wait(30) == 1
        assert server.output.count("worker 0 exited with code 1") == MAX_TRIES
        assert f"gave up after {MAX_TRIES} restarts" in server.output
        assert "'nothing' is not supported" in server.output
        assert psutil.wait_procs(family, timeout=1)[1] == []
    finally:
        server.close()
