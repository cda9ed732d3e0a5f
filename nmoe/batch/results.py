"""Finished requests, written so that no interruption loses or duplicates any (see nmoe/batch/folder.py).

Everything here runs in one thread, in the order in which requests finish. Lines without tensors are written at once;
the others wait for their shard, which is complete when it is large or old enough.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from nmoe.batch.folder import INDEX, OUTPUT, Finished, output_id
from nmoe.batch.shards import MAX_BYTES, Shard, Stored
from nmoe.one_line import on_one_line

_MAX_AGE_S = 60.0  # of a shard; after an interruption, the requests in an incomplete one are computed again


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an input line. `error` is set for a line that was never answered."""

    number: int
    custom_id: str | None
    status: int = 0
    body: msgspec.Raw | dict[str, Any] = {}
    error: dict[str, Any] | None = None
    tensors: list[Stored] = []
    num_tokens: int = 0

    @property
    def ok(self) -> bool:
        """Whether the request was answered without an error."""
        return self.error is None and self.status == 200

    def line(self, shard: str = "") -> bytes:
        """The output line, in OpenAI's batch format."""
        name = output_id(self.number)
        body = {**self.body, "shard": shard} if isinstance(self.body, dict) and shard else self.body
        response = {"status_code": self.status, "request_id": name, "body": body}
        whole = {
            "id": name,
            "custom_id": self.custom_id,
            "response": response if self.error is None else None,
            "error": self.error,
        }
        return on_one_line(msgspec.json.encode(whole)) + b"\n"


class Results:
    """The files of a running batch."""

    def __init__(self, folder: pathlib.Path, finished: Finished, max_shard_bytes: int = MAX_BYTES) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._num_shards = finished.num_shards
        self._output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._index = os.open(folder / INDEX, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._shard: Shard | None = None
        self._shard_begun = 0.0
        self._broken = False  # a write has failed, or is in progress
        self._waiting: list[Result] = []  # for the shard to be completed

    def add(self, result: Result) -> None:
        """Write a result. Raises OSError if that fails, and in every later call."""
        with self._intact():
            if result.tensors:
                self._add_tensors(result)
            else:
                _write(self._output, result.line())

    @contextlib.contextmanager
    def _intact(self) -> Iterator[None]:
        """Refuse to write after a failed write, which may be there in part: `recover` cuts off only the files' ends."""
        if self._broken:
            raise OSError("an earlier result could not be written")
        self._broken = True
        yield
        self._broken = False

    def _add_tensors(self, result: Result) -> None:
        if self._shard is not None and not self._shard.has_room(result.tensors):
            self._commit(self._shard)
        if self._shard is None:
            self._num_shards += 1
            self._shard = Shard(self._folder, self._num_shards, self._max_shard_bytes)
            self._shard_begun = time.monotonic()
        self._shard.add(result.tensors)
        for tensor in result.tensors:
            tensor.data.close()
        self._waiting.append(result)
        if self._shard.is_full:
            self._commit(self._shard)

    def commit_if_old(self) -> None:
        """Complete the shard if its first request has waited too long."""
        if self._shard is not None and time.monotonic() - self._shard_begun > _MAX_AGE_S:
            with self._intact():
                self._commit(self._shard)

    def _commit(self, shard: Shard) -> None:
        """Complete the shard: its file, its requests' output lines, its line in the index, in this order."""
        waiting = self._waiting
        shard.finish()
        _write(self._output, b"".join(result.line(shard.name) for result in waiting))
        os.fsync(self._output)
        keys = {str(result.custom_id): [tensor.key for tensor in result.tensors] for result in waiting}
        entry = {"shard": shard.name, "num_bytes": shard.num_bytes, "tensors": keys}
        _write(self._index, on_one_line(msgspec.json.encode(entry)) + b"\n")
        os.fsync(self._index)
        self._shard, self._waiting = None, []

    def close(self) -> None:
        """Complete what can be completed, and sync it to disk."""
        try:
            if self._shard is not None and not self._broken:
                with self._intact():
                    self._commit(self._shard)
            os.fsync(self._output)
        finally:
            if self._shard is not None:
                self._shard.close()
            os.close(self._output)
            os.close(self._index)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
