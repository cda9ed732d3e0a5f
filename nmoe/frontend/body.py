"""Parses the bytes of a request body, whatever they are, into a JSON object.

orjson refuses deep nesting, invalid UTF-8, NaN and infinities; repeated keys are found by counting
(nmoe/keys.py).

Parsing holds the interpreter, and with it every stream of this process, until it is done. Text is fast (32 MiB take
about 50 ms) but many small values are not. So a large body is scanned first, piece by piece, and whatever is not text
is limited, in bytes and in values.
"""

import re
from typing import Any

import orjson

from nmoe.errors import RequestError
from nmoe.keys import count_keys, repeated_key, written_keys

_INSIDE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_SMALL = 1 << 15  # bytes; a body up to this size is harmless
_PIECE = 1 << 14  # bytes scanned without releasing the interpreter
MAX_VALUES = 1 << 18  # in a body: numbers, strings and so on, above all a prompt's token ids
MAX_OUTSIDE = 4 << 20  # bytes of a body outside its strings


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises RequestError saying what is wrong: 413 if there is too much, else 400."""
    keys = written_keys(body) if len(body) <= _SMALL else _look_through(body)
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(document)}")
    if keys != count_keys(document):
        _refuse_repeated_key(body)
    return document


def _look_through(body: bytes) -> int:
    """Count the colons outside strings. Raises RequestError (413) if there is too much outside strings."""
    colons = values = outside = place = 0
    while place < len(body):
        quote = body.find(b'"', place)
        end = len(body) if quote < 0 else quote
        outside += end - place
        if outside > MAX_OUTSIDE:
            message = f"the body has more than {MAX_OUTSIDE >> 20} MiB outside of its strings"
            raise RequestError(message, status=413, code="body_too_large")
        for start in range(place, end, _PIECE):
            stop = min(start + _PIECE, end)
            colons += body.count(b":", start, stop)
            values += sum(body.count(mark, start, stop) for mark in (b",", b"[", b"{"))
            if values > MAX_VALUES:
                message = f"the body has more than {MAX_VALUES} values; send long prompts as text, or fewer at once"
                raise RequestError(message, status=413, code="body_too_large")
        place = _after_string(body, end + 1)
    return colons


def _after_string(body: bytes, place: int) -> int:
    """The position just after the closing quote of the string that `place` is inside."""
    while place < len(body):
        match = _INSIDE.match(body, place, place + _PIECE)
        assert match is not None
        if match.end() == place:  # a quote, or a backslash at the end of the body
            return place + 1
        place = match.end()
    return place


def _refuse_repeated_key(body: bytes) -> None:
    path = repeated_key(body) if len(body) <= _PIECE else None
    if path is not None:
        raise RequestError(f"{path}: appears more than once", param=path)
    raise RequestError("the body has a key that appears more than once")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
