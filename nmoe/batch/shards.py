"""Tensors of many requests in safetensors files of bounded size, each of which appears only once it is complete.

A shard grows in unnamed files, of which an interruption leaves nothing behind. Its header comes first in the file but
is known last, so everything is copied once when the shard is complete. Tensors are concatenated: those with items of
less than 4 bytes come last, so that all others are aligned. Source: the format's description in the safetensors
repository.
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
MAX_BYTES = 256 << 20  # a shard with this many is complete
_MAX_HEADER_BYTES = 16 << 20  # likewise; whoever opens the file parses the whole header
_ENTRY_BYTES = 100  # of a tensor in the header besides its name, roughly
_ALIGNMENT = 8
_TAIL_BYTES = 16 << 20  # of tensors with small items, which wait in memory; more go to a file
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
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Shard:
    """A shard that grows until `finish` makes it a file."""

    def __init__(self, folder: pathlib.Path, number: int, max_bytes: int = MAX_BYTES) -> None:
        self.name = shard_name(number)
        self._folder = folder
        self._max_bytes = max_bytes
        self._body = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - both live as long as this
        self._tail = tempfile.SpooledTemporaryFile(_TAIL_BYTES, dir=str(folder))  # noqa: SIM115
        self._entries: dict[str, tuple[Stored, int]] = {}  # key -> tensor, offset in the body or in the tail
        self._body_bytes = self._tail_bytes = 0
        self._header_bytes = 0  # an estimate

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return self._body_bytes + self._tail_bytes

    @property
    def is_full(self) -> bool:
        """Whether the shard should be finished now."""
        return self.num_bytes >= self._max_bytes or self._header_bytes >= _MAX_HEADER_BYTES

    def has_room(self, tensors: list[Stored]) -> bool:
        """Whether these tensors still fit; an empty shard takes tensors of any size."""
        return not self._entries or self.num_bytes + sum(map(_size, tensors)) <= self._max_bytes

    def add(self, tensors: list[Stored]) -> None:
        """Append the tensors of one request."""
        for tensor in tensors:
            if ITEM_BYTES[tensor.dtype] < 4:
                self._tail_bytes += self._append(self._tail, tensor, self._tail_bytes)
            else:
                self._body_bytes += self._append(self._body, tensor, self._body_bytes)

    def _append(self, file: IO[bytes], tensor: Stored, offset: int) -> int:
        before = file.tell()
        shutil.copyfileobj(tensor.data, file, _CHUNK)
        if (size := file.tell() - before) != _size(tensor):
            raise ValueError(f"{tensor.key}: {size} bytes are no {tensor.dtype} {tensor.shape}")
        self._entries[tensor.key] = tensor, offset
        self._header_bytes += _ENTRY_BYTES + len(tensor.key)
        return size

    def finish(self) -> None:
        """Write the complete shard to a file with its name; the file survives a loss of power."""
        header = msgspec.json.encode({key: self._describe(*entry) for key, entry in self._entries.items()})
        header += b" " * (-len(header) % _ALIGNMENT)
        temporary = self._folder / (self.name + TEMPORARY)
        with temporary.open("wb") as file:
            file.write(_LENGTH.pack(len(header)) + header)
            for part in (self._body, self._tail):
                part.seek(0)
                shutil.copyfileobj(part, file, _CHUNK)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._folder / self.name)
        sync_folder(self._folder)
        self.close()

    def close(self) -> None:
        """Close the unnamed files."""
        self._body.close()
        self._tail.close()

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
