"""One request to any OpenAI-compatible endpoint, streaming or not, and when its events arrived."""

import asyncio
import json
import time
from typing import Any

import aiohttp
import msgspec


class Outcome(msgspec.Struct):
    """Times in seconds: `began` on CLOCK_MONOTONIC, the others since then. `problem` is empty when all went well."""

    began: float
    prompt_tokens: int
    profile: str = ""
    arrivals: list[float] = []  # of the events with text, in order
    problem: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first event."""
        return self.arrivals[0]

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive events."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


async def first_model(session: aiohttp.ClientSession, url: str) -> str:
    """The id of the endpoint's first model, for requests to name."""
    async with session.get(f"{url}/v1/models") as response:
        response.raise_for_status()
        return str((await response.json())["data"][0]["id"])


async def complete(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], leave_after: int | None = None
) -> Outcome:
    """A streaming completion, read to its end, or abandoned once it has more than `leave_after` events."""
    began = time.monotonic()
    outcome = Outcome(began, len(body["prompt"]), body.get("profile", ""))
    try:
        async with session.post(f"{url}/v1/completions", json=body | {"stream": True}) as response:
            if response.status != 200:
                outcome.problem = f"{response.status} {(await response.text())[:200]}"
                return outcome
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    return outcome
                if problem := json.loads(line[6:]).get("error"):
                    outcome.problem = str(problem)
                    return outcome
                outcome.arrivals.append(time.monotonic() - began)
                if leave_after is not None and len(outcome.arrivals) > leave_after:
                    response.close()
                    return outcome
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.problem = f"{type(error).__name__}: {error}"
        return outcome
    outcome.problem = "the stream ended without [DONE]"
    return outcome


async def answer(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], leave_after: float | None = None
) -> Outcome:
    """A completion without streaming, so without arrivals; abandoned after `leave_after` seconds, if given."""
    outcome = Outcome(time.monotonic(), len(body["prompt"]), body.get("profile", ""))
    try:
        async with asyncio.timeout(leave_after), session.post(f"{url}/v1/completions", json=body) as response:
            text = await response.text()
            if response.status != 200:
                outcome.problem = f"{response.status} {text[:200]}"
    except TimeoutError:
        if leave_after is None:
            outcome.problem = "no answer in time"
    except aiohttp.ClientError as error:
        outcome.problem = f"{type(error).__name__}: {error}"
    return outcome
