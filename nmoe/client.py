"""A client for `POST /v1/generate`, synchronous and asynchronous; tensors are numpy arrays.

    from nmoe.client import Client

    with Client("http://127.0.0.1:8000") as client:
        answer = client.generate("The answer is", max_tokens=0, prompt_logprobs=0, logits=True)
        answer.choices[0].prompt_logits  # float32 [prompt tokens - 1, vocabulary]

`generate` returns the whole answer; `parts` yields it piece by piece, for logits that do not fit in memory. Both take
the request's fields as keyword arguments (docs/generate.md). A rejection or an error raises RequestError; a connection
that ends early raises ConnectionError.
"""

import http.client
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import aiohttp
import msgspec
import numpy as np

from nmoe.errors import RequestError
from nmoe.native import (
    CONTENT_TYPE,
    FRAME_HEAD,
    FRAMES_CONTENT_TYPE,
    Answer,
    Choice,
    Failure,
    Logits,
    Tensor,
    frame_length,
)

PATH = "/v1/generate"
_LIMIT = 1 << 20  # bytes of an answer buffered until its parts are read
_NO_HEADERS: Mapping[str, str] = {}
T = TypeVar("T")
Array = np.ndarray[Any, Any]
Part = Answer[Array] | Logits[Array]


def as_array(tensor: Tensor) -> Array:
    """A read-only view of the elements, without copying."""
    return np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.shape)


def _array_hook(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        return as_array(msgspec.convert(value, Tensor))
    raise NotImplementedError(kind)


# Decode a part into arrays, or into bytes for callers that pass it on.
decode_arrays: Callable[[bytes], Part | Failure] = msgspec.msgpack.Decoder(
    Answer[np.ndarray] | Logits[np.ndarray] | Failure, dec_hook=_array_hook
).decode
decode_tensors: Callable[[bytes], Answer[Tensor] | Logits[Tensor] | Failure] = msgspec.msgpack.Decoder(
    Answer[Tensor] | Logits[Tensor] | Failure
).decode


def request_body(fields: Mapping[str, Any]) -> bytes:
    """The msgpack encoding of a request. A prompt's token ids (a list of numbers or an array) travel as int32 bytes.
    Anything that is not a prompt is passed through, and the server reports what is wrong with it."""
    return msgspec.msgpack.encode({**fields, "prompt": _packed_prompt(fields["prompt"])})


def _packed_prompt(prompt: Any) -> Any:
    if isinstance(prompt, str | bytes) or not isinstance(prompt, np.ndarray | Sequence):
        return prompt
    if isinstance(prompt, np.ndarray) or (prompt and all(_is_id(item) for item in prompt)):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"prompt: one prompt's token ids are one row of integers, not {ids.dtype} {ids.shape}")
        if ids.size and not (ids.min() >= 0 and ids.max() < 1 << 31):
            raise ValueError("prompt: token ids are from 0 to 2**31 - 1")
        return ids.astype("<i4").tobytes()
    return [_packed_prompt(item) for item in prompt]


def _is_id(item: Any) -> bool:
    return isinstance(item, int | np.integer) and not isinstance(item, bool)


def error_of(status: int, error: Mapping[str, Any]) -> RequestError:
    """The RequestError that the server raised."""
    return RequestError(str(error.get("message")), status=status, param=error.get("param"), code=error.get("code"))


def _refusal(status: int, body: bytes) -> RequestError:
    try:
        return error_of(status, msgspec.json.decode(body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return RequestError(f"status {status}: {body[:200].decode(errors='replace')}", status=status)


def _raise(failure: Failure) -> NoReturn:
    raise error_of(failure.status, failure.error)


class _Whole:
    """An answer assembled from its parts."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, str], list[Array]] = {}

    def add(self, part: Part) -> Answer[Array] | None:
        """Add a part. Returns the answer once its last part has arrived."""
        if isinstance(part, Logits):
            self._rows.setdefault((part.index, part.name), []).append(part.rows)
            return None
        return msgspec.structs.replace(part, choices=[self._complete(choice) for choice in part.choices])

    def _complete(self, choice: Choice[Array]) -> Choice[Array]:
        names = [name for index, name in self._rows if index == choice.index]
        return msgspec.structs.replace(
            choice, **{name: np.concatenate(self._rows.pop((choice.index, name))) for name in names}
        )


def _headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


_CUT_OFF = "the connection ended before the answer did"


class Client:
    """One connection, for one request at a time. `timeout` is in seconds and applies to each read; None: no limit."""

    def __init__(self, url: str, *, api_key: str = "", timeout: float | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.netloc, timeout=timeout)
        self._path = parts.path.rstrip("/") + PATH
        self._headers = _headers(api_key)

    def generate(self, prompt: Any, **fields: Any) -> Answer[Array]:
        """The whole answer."""
        whole = _Whole()
        for part in self.parts(prompt, **fields):
            if (answer := whole.add(part)) is not None:
                return answer
        raise ConnectionError(_CUT_OFF)

    def parts(self, prompt: Any, **fields: Any) -> Iterator[Part]:
        """Yield logits as they arrive, then the answer without them. Stopping early closes the connection."""
        complete = False
        try:
            payloads = self._payloads(request_body({"prompt": prompt, **fields}))
            for payload in payloads:
                part = decode_arrays(payload)
                if isinstance(part, Failure):
                    _raise(part)
                complete = isinstance(part, Answer) and next(payloads, None) is None
                yield part
            if not complete:
                raise ConnectionError(_CUT_OFF)
        except http.client.HTTPException as error:
            raise ConnectionError(f"{_CUT_OFF}: {error!r}") from error
        finally:
            if not complete:
                self.close()

    def _payloads(self, body: bytes) -> Iterator[bytes]:
        headers = {"Content-Type": CONTENT_TYPE, **self._headers}
        self._connection.request("POST", self._path, body, headers)
        response = self._connection.getresponse()
        if response.status != 200:
            raise _refusal(response.status, response.read())
        if response.headers.get_content_type() != FRAMES_CONTENT_TYPE:
            yield response.read()
            return
        while head := response.read(FRAME_HEAD.size):
            if len(head) < FRAME_HEAD.size or len(payload := response.read(length := frame_length(head))) < length:
                raise ConnectionError(_CUT_OFF)
            yield payload

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """Any number of concurrent requests. `unix_socket` is the path of a socket to use instead of the URL's host;
    `timeout` is in seconds and applies to each read; None: no limit."""

    def __init__(
        self,
        url: str = "http://localhost",
        *,
        api_key: str = "",
        unix_socket: str = "",
        timeout: float | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._unix_socket = unix_socket
        self._timeout = aiohttp.ClientTimeout(total=None, sock_read=timeout)
        self._headers = _headers(api_key)
        self._session: aiohttp.ClientSession

    async def generate(self, prompt: Any, **fields: Any) -> Answer[Array]:
        """The whole answer."""
        whole = _Whole()
        async for part in self.parts(prompt, **fields):
            if (answer := whole.add(part)) is not None:
                return answer
        raise ConnectionError(_CUT_OFF)

    async def parts(self, prompt: Any, **fields: Any) -> AsyncIterator[Part]:
        """Yield logits as they arrive, then the answer without them."""
        async for part in self._parts(request_body({"prompt": prompt, **fields}), decode_arrays):
            yield part

    async def raw_parts(self, body: bytes, request_id: str) -> AsyncIterator[Answer[Tensor] | Logits[Tensor]]:
        """`parts` for an already encoded request, leaving tensors in wire format."""
        async for part in self._parts(body, decode_tensors, {"X-Request-Id": request_id}):
            yield part

    async def post_json(self, path: str, body: bytes, request_id: str) -> tuple[int, bytes]:
        """POST to another endpoint. Returns the status and body of the answer."""
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        try:
            async with self._session.post(self._url + path, data=body, headers=headers) as response:
                return response.status, await response.read()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise ConnectionError(f"{_CUT_OFF}: {error!r}") from error

    async def is_healthy(self) -> bool:
        """Whether the server is serving."""
        try:
            async with self._session.get(self._url + "/health") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def _parts(
        self,
        body: bytes,
        decode: Callable[[bytes], Answer[T] | Logits[T] | Failure],
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> AsyncIterator[Answer[T] | Logits[T]]:
        complete = False
        try:
            async with self._session.post(
                self._url + PATH, data=body, headers={"Content-Type": CONTENT_TYPE, **headers}
            ) as response:
                payloads = _payloads(response)
                async for payload in payloads:
                    part = decode(payload)
                    if isinstance(part, Failure):
                        _raise(part)
                    complete = isinstance(part, Answer) and await anext(payloads, None) is None
                    yield part
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, EOFError) as error:
            raise ConnectionError(f"{_CUT_OFF}: {error!r}") from error
        if not complete:
            raise ConnectionError(_CUT_OFF)

    async def __aenter__(self) -> Self:
        connector = (
            aiohttp.UnixConnector(self._unix_socket, limit=0) if self._unix_socket else aiohttp.TCPConnector(limit=0)
        )
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=self._timeout, headers=self._headers, read_bufsize=_LIMIT
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()


async def _payloads(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The msgpack objects of an answer. Raises EOFError if it ends in the middle of one."""
    if response.status != 200:
        raise _refusal(response.status, await response.read())
    if response.content_type != FRAMES_CONTENT_TYPE:
        yield await response.read()
        return
    while not response.content.at_eof():
        head = await response.content.read(FRAME_HEAD.size)
        if not head:
            return
        if len(head) < FRAME_HEAD.size:
            head += await response.content.readexactly(FRAME_HEAD.size - len(head))
        yield await response.content.readexactly(frame_length(head))
