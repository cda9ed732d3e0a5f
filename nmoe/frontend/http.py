"""HTTP around the endpoints: routes, authentication, request bodies, error responses. Every failure gets OpenAI's
error object, never a traceback.
"""

import asyncio
import hmac
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import StreamReader, hdrs, web

from nmoe.config import Server
from nmoe.errors import RequestError
from nmoe.frontend.replies import error_body

Headers = dict[str, str]
Endpoint = Callable[[web.BaseRequest, Headers], Awaitable[web.StreamResponse]]

_log = logging.getLogger("nmoe.frontend")
_RETRY_AFTER = {429: "1", 503: "2"}  # seconds, by status
_FINAL = {500, 504}  # which would come again; OpenAI's clients send a request twice more unless told not to
_MAX_REQUEST_ID = 128  # characters
_HEAD_S = 60.0  # within which a new connection's first head must have arrived
_BODY_S = 60.0  # within which a body must have arrived in full
_IDLE_S = 75.0  # after which a connection that has not started a request, or not completed its head, is closed
_UNREAD_S = 60  # after which a client that reads nothing of what was sent to it is dropped
_PROBE_S = 60  # of silence, after which the kernel probes whether the peer still exists


class _Connection(web.RequestHandler):
    """Answers invalid HTTP with the usual error object, and never waits forever.

    The first request's head has its own deadline; between requests, the keep-alive timeout applies.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:  # the other end of a Unix socket cannot vanish unnoticed
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S // 4)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_UNREAD_S * 1000))
        self._head_due = self._loop.call_later(_HEAD_S, self._give_up_on_head)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client has disconnected."""
        self._head_due.cancel()
        super().connection_lost(exc)

    def _give_up_on_head(self) -> None:
        if not self._request_count and self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return OpenAI's error object and close the connection."""
        if status >= 500:
            _log.error("a connection failed", exc_info=exc)
        if request.writer is not None and request.writer.output_size > 0:
            raise ConnectionError("the response has begun")
        why = (message or "").strip().splitlines()
        text = (
            f"the request is not valid HTTP: {why[0][:200].rstrip(':')}" if status < 500 and why else "internal error"
        )
        response = error_response(RequestError(text, status=status), {hdrs.SERVER: "nmoe"})
        response.force_close()
        return response


class HttpServer(web.Server):
    """aiohttp's server with `router` as its handler; when a client disconnects, its request is cancelled."""

    def __init__(self, router: "Router") -> None:
        super().__init__(
            router, handler_cancellation=True, access_log=None, auto_decompress=False, keepalive_timeout=_IDLE_S
        )

    def __call__(self) -> web.RequestHandler:
        """The protocol of a new connection."""
        return _Connection(self, loop=self._loop, **self._kwargs)


class Router:
    """The handler of aiohttp's server: finds the endpoint and turns every failure into a response.

    `routes` maps a path to its method and endpoint; a path ending in "/" matches everything below it.
    """

    def __init__(self, server: Server, routes: dict[str, tuple[str, Endpoint]]) -> None:
        self._keys = [key.encode() for key in server.api_keys]
        self._routes = routes

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        headers = {"X-Request-Id": _request_id(request), hdrs.SERVER: "nmoe"}
        try:
            return await self._endpoint(request, headers)(request, headers)
        except RequestError as error:
            return error_response(error, headers)
        except ConnectionError:  # the client left: nobody reads this, and the log needs no traceback
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=499, headers=headers)
        except asyncio.CancelledError:  # the same
            raise
        except Exception:
            _log.exception("request %s failed", headers["X-Request-Id"])
            return error_response(RequestError("internal error", status=500), headers)

    def _endpoint(self, request: web.BaseRequest, headers: Headers) -> Endpoint:
        path = request.path
        route = self._routes.get(path) or self._route_below(path)
        if path.startswith("/v1/") or (route is not None and route[0] == hdrs.METH_POST):  # everything that is costly
            self._authenticate(request)
        if route is None:
            raise RequestError(f"{path[:200]}: no such path; there are {', '.join(self._routes)}", status=404)
        method, endpoint = route
        if request.method != method and not (request.method == hdrs.METH_HEAD and method == hdrs.METH_GET):
            headers[hdrs.ALLOW] = method
            raise RequestError(f"{request.method[:20]} {path[:200]}: send {method} instead", status=405)
        return endpoint

    def _route_below(self, path: str) -> tuple[str, Endpoint] | None:
        found = (route for prefix, route in self._routes.items() if prefix.endswith("/") and path.startswith(prefix))
        return next(found, None)

    def _authenticate(self, request: web.BaseRequest) -> None:
        if not self._keys:
            return
        scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")
        # All keys are compared, each in constant time, so that timing reveals nothing about them.
        if scheme.lower() != "bearer" or not sum(hmac.compare_digest(given, known) for known in self._keys):
            message = "send one of the server's API keys: Authorization: Bearer KEY"
            raise RequestError(message, status=401, code="invalid_api_key")


async def read_body(request: web.BaseRequest, max_bytes: int, content_type: str) -> bytes:
    """The body of a request. Raises RequestError: 415 for another type, 413 above `max_bytes`, 408 if it is slow."""
    if request.content_type != content_type:
        raise RequestError(f"Content-Type is {request.content_type!r}; send {content_type}", status=415)
    if (encoding := request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()) != "identity":
        # A small compressed body may expand to a large one that takes long to decompress.
        raise RequestError(f"Content-Encoding is {encoding[:40]!r}; send the body as it is", status=415)
    if (request.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        if request.content.is_eof():  # as for most, which arrive with their heads
            body = request.content.read_nowait()
        else:
            body = await _arriving(request.content, max_bytes)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {_BODY_S:g} s", status=408, code="timeout") from None
    except web.RequestPayloadError as error:
        raise RequestError(f"the body cannot be read: {error}") from None
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    return body


async def _arriving(content: StreamReader, max_bytes: int) -> bytes:
    """The body, or somewhat more than `max_bytes` of it. Raises TimeoutError."""
    chunks: list[bytes] = []
    left = max_bytes
    async with asyncio.timeout(_BODY_S):
        while left >= 0 and (chunk := await content.readany()):
            chunks.append(chunk)
            left -= len(chunk)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the body is larger than [server] max_body_mb = {max_bytes >> 20} MiB", status=413)


def json_response(body: bytes | dict[str, Any], headers: Headers) -> web.Response:
    """200 with a JSON body."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return web.Response(body=data, content_type="application/json", headers=headers)


def error_response(error: RequestError, headers: Headers) -> web.Response:
    """OpenAI's error object with its status."""
    extra = {"Retry-After": _RETRY_AFTER[error.status]} if error.status in _RETRY_AFTER else {}
    if error.status in _FINAL:
        extra["X-Should-Retry"] = "false"
    if error.status == 401:
        extra[hdrs.WWW_AUTHENTICATE] = "Bearer"
    body = error_body(error)
    return web.Response(body=body, status=error.status, content_type="application/json", headers={**headers, **extra})


def _request_id(request: web.BaseRequest) -> str:
    """The client's own id if it is fit for a header and a log line, else a new one."""
    given = request.headers.get("X-Request-Id", "")
    return (
        given if 0 < len(given) <= _MAX_REQUEST_ID and given.isascii() and given.isprintable() else os.urandom(16).hex()
    )
