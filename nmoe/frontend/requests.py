"""Turns a request's bytes into a checked request without blocking the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from nmoe.errors import RequestError
from nmoe.frontend.body import parse_object
from nmoe.frontend.http import read_body
from nmoe.frontend.packed import unpack_object
from nmoe.native import CONTENT_TYPE

T = TypeVar("T")

_INLINE_BYTES = 1 << 15  # a body up to this size is decoded faster than a thread can be reached
_LONG_TEXT = 1 << 18  # characters; longer texts take long enough to tokenize that they get their own thread


class Requests:
    """The first steps of every endpoint that takes a body.

    `threads` runs work that would block the event loop, `slow_thread` work that would block the threads: a few huge
    texts must not hold up everybody else's short ones.
    """

    def __init__(self, model_name: str, max_body_bytes: int, threads: Executor, slow_thread: Executor) -> None:
        self._model_name = model_name
        self._max_body_bytes = max_body_bytes
        self._threads = threads
        self._slow_thread = slow_thread

    async def read(self, request: web.BaseRequest, parse: Callable[[dict[str, Any]], T]) -> T:
        """Read and check a JSON request. Raises RequestError."""
        return await self._read(request, "application/json", parse_object, parse)

    async def read_packed(self, request: web.BaseRequest, parse: Callable[[dict[str, Any]], T]) -> T:
        """Read and check a msgpack request. Raises RequestError."""
        return await self._read(request, CONTENT_TYPE, unpack_object, parse)

    async def _read(
        self,
        request: web.BaseRequest,
        content_type: str,
        load: Callable[[bytes], dict[str, Any]],
        parse: Callable[[dict[str, Any]], T],
    ) -> T:
        body = await read_body(request, self._max_body_bytes, content_type)
        if len(body) <= _INLINE_BYTES:
            return parse(load(body))
        thread = self._slow_thread if len(body) > _LONG_TEXT else self._threads
        return await self._in(thread, lambda: parse(load(body)))

    async def run(self, work: Callable[[], T], text_length: int) -> T:
        """Run `work`, which takes too long for the event loop and tokenizes `text_length` characters."""
        return await self._in(self._slow_thread if text_length > _LONG_TEXT else self._threads, work)

    def check_model(self, name: str) -> None:
        """Raises RequestError (404) for a model that this server does not serve."""
        if name not in ("", self._model_name):
            message = f"model {name[:200]!r} does not exist; this server has {self._model_name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    @staticmethod
    async def _in(executor: Executor, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, partial(function, *args))
