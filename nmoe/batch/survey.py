"""One pass over a batch's input before anything is computed: its hash, its number of requests, and whether every
custom_id names only one request. Of each line, only a hash of the custom_id is kept in memory.
"""

import hashlib
import pathlib

import msgspec

from nmoe.batch.lines import custom_id_of, read_lines
from nmoe.errors import NmoeError

_SHOWN = 10  # duplicates that the message lists


class Survey(msgspec.Struct, frozen=True):
    """A batch's input."""

    sha256: str
    num_bytes: int
    num_lines: int  # that are not blank
    last_line: int  # the number of the last line that is not blank


def survey(path: pathlib.Path, longest: int) -> Survey:
    """Read the whole input. Raises NmoeError when it cannot be read, or when custom_ids are not unique."""
    whole = hashlib.sha256()
    num_lines = last = 0
    known: set[int] = set()
    repeated: set[int] = set()
    try:
        if path.exists() and not path.is_file():
            raise NmoeError(f"{path}: is no regular file, and it is read twice; write the requests to a file first")
        with path.open("rb") as file:
            for number, data in read_lines(file, longest, whole.update):
                num_lines, last = num_lines + 1, number
                if (custom_id := custom_id_of(data)) is not None:
                    digest = _digest(custom_id)
                    (repeated if digest in known else known).add(digest)
            size = file.tell()
    except OSError as error:
        raise NmoeError(f"{path}: cannot be read: {error.strerror}") from error
    if repeated:
        _refuse_repeated(path, longest, repeated)
    return Survey(whole.hexdigest(), size, num_lines, last)


def _digest(custom_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=8).digest())


def _refuse_repeated(path: pathlib.Path, longest: int, repeated: set[int]) -> None:
    places: dict[str, list[int]] = {}
    with path.open("rb") as file:
        for number, data in read_lines(file, longest, lambda _: None):
            custom_id = custom_id_of(data)
            if custom_id is not None and _digest(custom_id) in repeated:
                places.setdefault(custom_id, []).append(number)
    twice = {custom_id: numbers for custom_id, numbers in places.items() if len(numbers) > 1}
    shown = [
        f"  - {custom_id!r} is on lines {', '.join(map(str, numbers[:_SHOWN]))}"
        for custom_id, numbers in list(twice.items())[:_SHOWN]
    ]
    if twice:
        raise NmoeError(
            "\n".join([f"{path}: {len(twice)} custom_id(s) name more than one request; rename all but one", *shown])
        )
