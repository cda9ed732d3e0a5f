"""Tensors of many requests in safetensors files of bounded size, each of which appears at once and complete.

A shard grows under a temporary name. Room for its header is reserved in front, since the header is known last; a header
may be padded with spaces. Tensors lie end to end, so those of small items come last: all others stay aligned.
Source: the format's description in the safetensors repository.
"""

import os
import pathlib
import re
import shutil
import struct
import tempfile
from typing import IO, Any

import msgspec

from nmoe.native import ITEM_BYTES, ItemType

NAME = re.compile(r"tensors-(\d{5,})\.safetensors")
TEMPORARY = ".part"
MAX_BYTES = 256 << 20  # a shard that has so many is complete
_HEADER_BYTES = 1 << 20  # multiple of 8
_BRACES = 2
_ENTRY_BYTES = 160  # of a tensor in the header, beside its name; more than ever needed
_TAIL_BYTES = 16 << 20  # of small items that wait in memory
_CHUNK = 1 << 20
_LENGTH = struct.Struct("<Q")
_DTYPES: dict[ItemType, str] = {"int32": "I32", "float32": "F32", "uint8": "U8", "uint16": "U16"}


class Stored(msgspec.Struct, frozen=True):
    """A tensor on its way into a shard: `data` is read from its position to its end."""

    key: str
    dtype: ItemType
    shape: tuple[int, ...]
    data: IO[bytes]


def shard_name(number: int) -> str:
    """The file of shard `number`."""
    return f"tensors-{number:05d}.safetensors"


def sync_folder(folder: pathlib.Path) -> None:
    """Make what was renamed in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Shard:
    """A shard that grows. `finish` makes it a file, `abandon` makes it as if it had never been."""

    def __init__(self, folder: pathlib.Path, number: int, first: list[Stored], max_bytes: int = MAX_BYTES) -> None:
        """`first`: the tensors that it is made for, which fit whatever their number; still to be added."""
        self.name = shard_name(number)
        self._folder = folder
        self._max_bytes = max_bytes
        self._header_bytes = max(_HEADER_BYTES, -(-(_BRACES + sum(map(_named, first))) // 8) * 8)
        self._file = (folder / (self.name + TEMPORARY)).open("wb")
        self._file.seek(_LENGTH.size + self._header_bytes)
        # Not in the folder's files until it is copied, so nothing of it is left behind.
        self._tail = tempfile.SpooledTemporaryFile(_TAIL_BYTES, dir=str(folder))  # noqa: SIM115 - it outlives this
        self._entries: dict[str, tuple[Stored, int]] = {}  # key -> tensor, offset in the body or in the tail
        self._body_bytes = self._tail_bytes = 0
        self._named = _BRACES  # bytes of header that are spoken for

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return self._body_bytes + self._tail_bytes

    @property
    def is_full(self) -> bool:
        """Whether it is time to finish it."""
        return self.num_bytes >= self._max_bytes or self._named > self._header_bytes // 2

    def has_room(self, tensors: list[Stored]) -> bool:
        """Whether these still belong here; an empty shard takes them however large they are."""
        size = sum(_size(tensor) for tensor in tensors)
        names = sum(_named(tensor) for tensor in tensors)
        return not self._entries or (
            self.num_bytes + size <= self._max_bytes and self._named + names <= self._header_bytes
        )

    def add(self, tensors: list[Stored]) -> None:
        """Append the tensors of one request."""
        for tensor in tensors:
            if ITEM_BYTES[tensor.dtype] < 4:
                self._tail_bytes += self._append(self._tail, tensor, self._tail_bytes)
            else:
                self._body_bytes += self._append(self._file, tensor, self._body_bytes)

    def _append(self, file: IO[bytes], tensor: Stored, offset: int) -> int:
        before = file.tell()
        shutil.copyfileobj(tensor.data, file, _CHUNK)
        if (size := file.tell() - before) != _size(tensor):
            raise ValueError(f"{tensor.key}: {size} bytes are no {tensor.dtype} {tensor.shape}")
        self._entries[tensor.key] = tensor, offset
        self._named += _named(tensor)
        return size

    def finish(self) -> None:
        """Complete the file and give it its name; it outlasts a loss of power."""
        self._tail.seek(0)
        shutil.copyfileobj(self._tail, self._file, _CHUNK)
        self._tail.close()
        header = msgspec.json.encode({key: self._describe(*entry) for key, entry in self._entries.items()})
        assert len(header) <= self._header_bytes
        self._file.seek(0)
        self._file.write(_LENGTH.pack(self._header_bytes) + header.ljust(self._header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        (self._folder / (self.name + TEMPORARY)).rename(self._folder / self.name)
        sync_folder(self._folder)

    def abandon(self) -> None:
        """Remove what is there."""
        self._tail.close()
        self._file.close()
        (self._folder / (self.name + TEMPORARY)).unlink()

    def _describe(self, tensor: Stored, offset: int) -> dict[str, Any]:
        start = offset + (self._body_bytes if ITEM_BYTES[tensor.dtype] < 4 else 0)
        return {
            "dtype": _DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, start + _size(tensor)),
        }


def _size(tensor: Stored) -> int:
    size = ITEM_BYTES[tensor.dtype]
    for length in tensor.shape:
        size *= length
    return size


def _named(tensor: Stored) -> int:
    return len(msgspec.json.encode(tensor.key)) + _ENTRY_BYTES
