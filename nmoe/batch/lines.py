"""The input of a batch: OpenAI's batch JSONL, one request per line, read as a stream.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hello", "max_tokens": 4}}

Source: OpenAI's Batch API reference; `/v1/generate` is nmoe's own (docs/generate.md), its body as JSON.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, BinaryIO, Literal

import msgspec

from nmoe.keys import count_keys, repeated_key, written_keys

GENERATE = "/v1/generate"
_ENVELOPE_BYTES = 1 << 16  # of a line, besides its body


class Line(msgspec.Struct, frozen=True):
    """A request: its line number in the file, from 1, and the body to be sent."""

    number: int
    custom_id: str
    url: str
    body: bytes  # JSON; msgpack for /v1/generate
    weight: int  # how many answers it asks for


class BadLine(msgspec.Struct, frozen=True):
    """A line that is not a valid request, and why."""

    number: int
    custom_id: str | None
    problem: str


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/generate"]
    body: msgspec.Raw


class _Named(msgspec.Struct, frozen=True):
    custom_id: str


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_named = msgspec.json.Decoder(_Named).decode
_decode_body: Callable[[msgspec.Raw], dict[str, Any]] = msgspec.json.Decoder(dict[str, Any]).decode
_FORM = (
    'a line is {"custom_id": a text, "method": "POST", "url": "/v1/chat/completions", "/v1/completions" or'
    ' "/v1/generate", "body": an object} in UTF-8 without a byte order mark'
)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def longest_line(max_body_mb: int) -> int:
    """The most bytes in a line whose body a server with this limit accepts."""
    return (max_body_mb << 20) + _ENVELOPE_BYTES


def read_lines(file: BinaryIO, longest: int, seen: Callable[[bytes], None]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers; `seen` is called with all bytes of the file.

    Of a line longer than `longest` bytes, only the first `longest` + 1 are yielded, so it is still seen to be too long.
    """
    number = 0
    while data := file.readline(longest + 1):
        number += 1
        seen(data)
        piece = data
        while not piece.endswith(b"\n") and (piece := file.readline(longest + 1)):
            seen(piece)
        if not data.isspace():
            yield number, data


def custom_id_of(data: bytes) -> str | None:
    """A line's custom_id, or None if it has none."""
    try:
        return _decode_named(data).custom_id
    except _UNREADABLE:
        return None


def parse_line(number: int, data: bytes, longest: int, profile: str | None) -> Line | BadLine:
    """A line as a request; a body that names no profile gets `profile`, unless that is None."""
    if len(data) > longest:
        return BadLine(number, None, f"longer than {longest} bytes; raise [server] max_body_mb")
    try:
        envelope = _decode_envelope(data)
        body = _decode_body(envelope.body)
    except _UNREADABLE as error:
        return BadLine(number, custom_id_of(data), f"not a request of OpenAI's batch format: {error}; {_FORM}")
    if written_keys(data) != len(_Envelope.__struct_fields__) + count_keys(body):
        path = repeated_key(data) or "a key of the line"
        return BadLine(number, envelope.custom_id, f"{path}: appears more than once; leave one of them")
    if body.get("stream"):
        return BadLine(number, envelope.custom_id, "body.stream: a batch does not stream; leave it out")
    try:
        request = _request(envelope.url, envelope.body, body, profile)
    except OverflowError:
        return BadLine(number, envelope.custom_id, "body: has a number that no field takes; integers have 64 bits")
    return Line(number, envelope.custom_id, envelope.url, request, _weight(body))


def _request(url: str, raw: msgspec.Raw, body: dict[str, Any], profile: str | None) -> bytes:
    """The body to be sent. JSON stays as it is, so that the server sees, for example, how numbers are written."""
    if profile is not None and body.get("profile") is None:
        if url != GENERATE and body and "profile" not in body:
            start = bytes(raw).lstrip()
            return b'{"profile":%b,' % msgspec.json.encode(profile) + start[1:]
        body["profile"] = profile
    elif url != GENERATE:
        return bytes(raw)
    return msgspec.msgpack.encode(body) if url == GENERATE else msgspec.json.encode(body)


def _weight(body: dict[str, Any]) -> int:
    prompt, n = body.get("prompt"), body.get("n")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    return prompts * (n if type(n) is int and n > 0 else 1)
