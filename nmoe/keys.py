"""Keys that an object has twice, of which parsers keep the last without a word.

They are found by counting, which costs a fraction of a second parser, and named only once there are some.
"""

import json
import re
from typing import Any

# Also one that does not end, and nothing is tried twice: looking for strings takes linear time, whatever the bytes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_CONTAINERS = {dict, list}
_MOST_SHOWN = 64  # characters of a key


class _Pairs(list[tuple[str, Any]]):
    """An object as it is written."""


def written_keys(data: bytes) -> int:
    """How many keys JSON has at any depth: outside of strings a colon stands for a key and nothing else."""
    return _STRING.sub(b"", data).count(b":")


def count_keys(document: dict[str, Any]) -> int:
    """How many keys are left of them."""
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


def inside(path: str, key: Any) -> str:
    """The path of a field within another: `logit_bias.1`, `messages[0].content`."""
    return f"{path}.{str(key)[:_MOST_SHOWN]}".removeprefix(".")


def repeated_key(data: bytes) -> str | None:
    """The path of a key that valid JSON has twice; None where it cannot be told.

    The standard library is slow, and does not nest as deep as other parsers.
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
