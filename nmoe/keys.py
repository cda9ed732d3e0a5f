"""Finds keys that appear twice in an object. Parsers silently keep the last one.

Counting detects them at a fraction of the cost of a second parser; they are located only if there are any.
"""

import json
import re
from typing import Any

# An unterminated string matches too, and there is no backtracking: the search takes linear time, whatever the bytes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_CONTAINERS = {dict, list}
_MOST_SHOWN = 64  # characters of a key


class _Pairs(list[tuple[str, Any]]):
    """An object as written, repeated keys included."""


def written_keys(data: bytes) -> int:
    """Count the keys in JSON at any depth: outside strings, every colon belongs to a key."""
    return _STRING.sub(b"", data).count(b":")


def count_keys(document: dict[str, Any]) -> int:
    """Count the keys that remain after parsing, at any depth."""
    count = 0
    containers: list[Any] = [document]  # not recursive: the nesting is the client's
    while containers:
        container = containers.pop()
        if isinstance(container, dict):
            count += len(container)
            container = container.values()
        if not _CONTAINERS.isdisjoint(map(type, container)):  # a quick way past a prompt's ids
            containers.extend(item for item in container if type(item) in _CONTAINERS)
    return count


def inside(path: str, key: Any) -> str:
    """The path of a field within another: `logit_bias.1`, `messages[0].content`."""
    return f"{path}.{str(key)[:_MOST_SHOWN]}".removeprefix(".")


def repeated_key(data: bytes) -> str | None:
    """The path of a key that appears twice in valid JSON; None if it cannot be determined.

    The standard library's parser is slow and does not nest as deeply as others.
    """
    try:
        left = [("", json.loads(data, object_pairs_hook=_Pairs, parse_int=str, parse_float=str))]
    except RecursionError:
        return None
    while left:
        path, value = left.pop()
        if isinstance(value, _Pairs):
            seen = set()
            for key, _ in value:
                if key in seen:
                    return inside(path, key)
                seen.add(key)
            left += [(inside(path, key), part) for key, part in reversed(value)]
        elif isinstance(value, list):
            left += [(f"{path}[{place}]", part) for place, part in reversed([*enumerate(value)])]
    return None
