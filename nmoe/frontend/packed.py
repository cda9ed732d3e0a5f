"""Parses a msgpack body into the object that the JSON checks take (nmoe/frontend/openai.py): ids sent as bytes
become lists. As with JSON (nmoe/frontend/body.py), the values of a large body are counted before they are created,
piece by piece.
"""

import array
from typing import Any

import msgspec

from nmoe.errors import RequestError
from nmoe.frontend.body import MAX_VALUES
from nmoe.keys import count_keys, inside

_SMALL = 1 << 15  # bytes; a body up to this size is harmless
_MOST_IDS = 1 << 20  # in a body; creating and checking this many takes about 50 ms
# How many bytes a value of each type takes beyond those its length counts, and how many of them hold the length.
# Source: the specification of msgpack.
_PLAIN = {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5}
_PLAIN |= {0xD3: 9, 0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18}
_SIZED = {0xC4: (2, 1), 0xC5: (3, 2), 0xC6: (5, 4), 0xC7: (3, 1), 0xC8: (4, 2), 0xC9: (6, 4)}
_SIZED |= {0xD9: (2, 1), 0xDA: (3, 2), 0xDB: (5, 4)}
_MAP_OF_ONE, _NIL = b"\x81", b"\xc0"
_HOLDING = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # bytes of the length, values per item


def unpack_object(body: bytes) -> dict[str, Any]:
    """The object in `body`. Raises RequestError saying what is wrong: 413 if there is too much, else 400."""
    if len(body) > _SMALL:
        _look_through(body)
    try:
        document = msgspec.msgpack.decode(body)
        if isinstance(document, dict) and (len(document) < _num_keys(body) or count_keys(document) > len(document)):
            _refuse_repeated_key(body, 0)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid msgpack: {error}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise RequestError("the body must be a map whose keys are strings")
    _read_ids(document)
    return document


def _read_ids(document: dict[str, Any]) -> None:
    """Turn ids sent as bytes into lists. Each list is created, and later checked, in a call that nothing else can
    interrupt, so their number is limited."""
    prompt = document.get("prompt")
    packed = [item for item in (prompt if isinstance(prompt, list) else [prompt]) if isinstance(item, bytes)]
    if sum(map(len, packed)) > 4 * _MOST_IDS:
        message = f"prompt: more than {_MOST_IDS} token ids in one body; send fewer prompts at once"
        raise RequestError(message, status=413, param="prompt", code="body_too_large")
    if isinstance(prompt, bytes):
        document["prompt"] = _ids(prompt, "prompt")
    elif isinstance(prompt, list):
        for place, item in enumerate(prompt):
            if isinstance(item, bytes):
                prompt[place] = _ids(item, f"prompt[{place}]")


def _ids(data: bytes, field: str) -> list[int]:
    if len(data) % 4:
        raise RequestError(f"{field}: {len(data)} bytes are not int32 token ids, four bytes each", param=field)
    return array.array("i", data).tolist()


def _num_keys(body: bytes) -> int:
    """The number of keys of the map that the body is."""
    return _head(body, 0)[1] // 2


def _refuse_repeated_key(body: bytes, place: int, path: str = "") -> int:
    """Check the value at `place` of valid msgpack. Returns where it ends.

    Raises RequestError (400) for a key that appears twice in a map, and RecursionError.
    """
    place, held, is_map = _head(body, place)
    if not is_map:
        for item in range(held):
            place = _refuse_repeated_key(body, place, f"{path}[{item}]")
        return place
    seen = set()
    for _ in range(held // 2):
        end = _refuse_repeated_key(body, place)
        (key,) = msgspec.msgpack.decode(_MAP_OF_ONE + body[place:end] + _NIL)  # as a key: an array is a tuple there
        name = inside(path, key)
        if key in seen:
            raise RequestError(f"{name}: appears more than once", param=name)
        seen.add(key)
        place = _refuse_repeated_key(body, end, name)
    return place


def _look_through(body: bytes) -> None:
    """Raises RequestError (413) if there are too many values. Malformed bytes are left to the parser."""
    left, values, place = 1, 0, 0
    while left and place < len(body):
        values += 1
        if values > MAX_VALUES:
            message = f"the body has more than {MAX_VALUES} values; send token ids as the bytes of int32s"
            raise RequestError(message, status=413, code="body_too_large")
        place, held, _ = _head(body, place)
        left += held - 1


def _head(body: bytes, place: int) -> tuple[int, int, bool]:
    """Where the value at `place` ends, or its contents begin; how many values it holds; whether it is a map."""
    kind = body[place]
    if kind < 0x80 or kind >= 0xE0:  # a small number
        return place + 1, 0, False
    if kind < 0x90:  # a small map
        return place + 1, 2 * (kind & 0xF), True
    if kind < 0xA0:  # a small array
        return place + 1, kind & 0xF, False
    if kind < 0xC0:  # a short string
        return place + 1 + (kind & 0x1F), 0, False
    if kind in _SIZED:
        size, length = _SIZED[kind]
        return place + size + int.from_bytes(body[place + 1 : place + 1 + length]), 0, False
    if kind in _HOLDING:
        length, each = _HOLDING[kind]
        return place + 1 + length, each * int.from_bytes(body[place + 1 : place + 1 + length]), each == 2
    return place + _PLAIN.get(kind, len(body)), 0, False  # past the end, if there is no such type
