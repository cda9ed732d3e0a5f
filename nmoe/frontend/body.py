"""From the bytes of a request body to a JSON object, whatever the bytes are.

orjson refuses deep nesting, invalid UTF-8, NaN and infinities; keys that appear twice are found by counting, which
costs a fraction of a second parser.
"""

import json
import re
from typing import Any

import orjson

from nmoe.errors import RequestError

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_CONTAINERS = {dict, list}


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises RequestError (400) that says what is wrong with it."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(document)}")
    # Outside of strings a colon stands for a key and nothing else.
    if _STRING.sub(b"", body).count(b":") != _count_keys(document):
        _refuse_repeated_key(body)
    return document


def _count_keys(document: dict[str, Any]) -> int:
    count = 0
    containers: list[Any] = [document]  # not recursive: the nesting is the client's
    while containers:
        container = containers.pop()
        if isinstance(container, dict):
            count += len(container)
            container = container.values()
        if not _CONTAINERS.isdisjoint(map(type, container)):  # a prompt's ids are passed by fast
            containers.extend(item for item in container if type(item) in _CONTAINERS)
    return count


def _refuse_repeated_key(body: bytes) -> None:
    def check(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise RequestError(f"{key!r} appears more than once", param=key)
            seen.add(key)

    try:
        json.loads(body, object_pairs_hook=check)
    except RecursionError:  # orjson nests deeper than the standard library
        raise RequestError("the body has a key that appears more than once") from None


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
