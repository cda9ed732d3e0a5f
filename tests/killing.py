"""Deaths under load: open streams, a kill, how each stream ends, and when the server answers again."""

import asyncio
import signal
import time

import aiohttp

from tests.serving import Server

STREAMS = 32
BACK_S = 20.0  # from a death to the next answer, at most


async def stream(session: aiohttp.ClientSession, server: Server, started: asyncio.Event) -> str:
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


async def recovered(session: aiohttp.ClientSession, server: Server, since: float, back_s: float = BACK_S) -> float:
    """Seconds until the server answers a new request and says that it is healthy."""
    body = {"model": server.model, "prompt": [5], "max_tokens": 1, "temperature": 0}
    while True:
        assert time.monotonic() - since < back_s, server.output
        try:
            async with session.post(f"{server.url}/v1/completions", json=body) as response:
                if response.status == 200 and server.healthy():
                    assert (await response.json())["usage"]["completion_tokens"] == 1
                    return time.monotonic() - since
        except aiohttp.ClientError:
            pass  # the frontend is the one that died
        await asyncio.sleep(0.05)


async def kill(
    server: Server, name: str, signum: signal.Signals, back_s: float = BACK_S
) -> tuple[list[str], float, float]:
    """Kill under load; the streams' ends, the seconds to the last of them and to the first new answer."""
    started = asyncio.Event()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        streams = [asyncio.create_task(stream(session, server, started)) for _ in range(STREAMS)]
        await started.wait()
        victim = server.find(name)
        killed_at = time.monotonic()
        victim.send_signal(signum)
        ends = await asyncio.gather(*streams)
        ended = time.monotonic() - killed_at
        return ends, ended, await recovered(session, server, killed_at, back_s)
