"""[trace] record: one JSON line per finished request, for benchmarks/replay.py.

Several frontends append to one file: it is opened with O_APPEND and each line is a single write, so lines never mix.
Writing happens in a separate thread, because a disk may block; records beyond a bound on the backlog are dropped, and
the log says so.
"""

import errno
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from nmoe.errors import NmoeError
from nmoe.messages import Reason, Sampling

_log = logging.getLogger("nmoe.trace")
_ALWAYS = ("temperature", "top_k", "top_p", "seed")
_MOST_WAITING = 10_000  # records, each of which holds its request's tokens
_INTERNAL = ("barred_ids", "bias_ids", "biases")  # named differently in the API


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """The contents of a line. `arrived` is seconds since the epoch; the other times are seconds since `arrived`."""

    arrived: float
    prompt_token_ids: list[int]
    sampling: dict[str, Any]  # temperature, top_k, top_p, seed, max_tokens, and anything that is not the default
    output_tokens: int
    finish_reason: Reason
    ttft: float | None  # None: timed out before the first token
    e2e: float
    user: str = ""
    metadata: dict[str, str] = {}


def sampling_fields(sampling: Sampling, max_tokens: int) -> dict[str, Any]:
    """The request's sampling options, under the names of the API's fields."""
    plain = Sampling()
    fields = {
        name: value
        for name, value in msgspec.structs.asdict(sampling).items()
        if name in _ALWAYS or (value != getattr(plain, name) and name not in _INTERNAL)
    }
    if sampling.bias_ids:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    return fields | {"max_tokens": max_tokens}


class Recorder:
    """Appends records to a file. Raises NmoeError if it cannot be opened."""

    def __init__(self, path: str) -> None:
        try:
            # Without waiting: a named pipe that nobody reads is an error.
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
            os.set_blocking(self._fd, True)
        except OSError as error:
            raise NmoeError(
                f"[trace] record = {path!r}: cannot be opened: {error.strerror}; set it to a file that you may write"
            ) from error
        self._path = path
        self._records: queue.Queue[Callable[[], Record] | None] = queue.Queue()
        self._dropped = 0  # since the last one was queued
        self._torn = False  # the last write was incomplete
        self._thread = threading.Thread(target=self._write, name="trace", daemon=True)
        self._thread.start()

    def add(self, make: Callable[[], Record]) -> None:
        """Queue a record, to be built in the recorder's thread: one with many biases takes a while. Never blocks."""
        if self._records.qsize() >= _MOST_WAITING:
            self._dropped += 1
            return
        if self._dropped:
            _log.error("%s: too slow: %d requests were not recorded", self._path, self._dropped)
            self._dropped = 0
        self._records.put(make)

    def close(self) -> None:
        """Write what is queued, then close the file."""
        if self._dropped:
            _log.error("%s: too slow: %d requests were not recorded", self._path, self._dropped)
        self._records.put(None)
        self._thread.join()
        os.close(self._fd)

    def _write(self) -> None:
        encoder = msgspec.json.Encoder()
        while (make := self._records.get()) is not None:
            try:
                self._append(encoder.encode(make()) + b"\n")
            except OSError as error:
                _log.error("%s: a request could not be recorded: %s", self._path, error.strerror)
            except Exception:
                _log.exception("%s: a request could not be recorded", self._path)

    def _append(self, line: bytes) -> None:
        """One write, if the disk has room; the next one ends a line that was cut off."""
        if self._torn:
            line = b"\n" + line
        written = os.write(self._fd, line)
        self._torn = self._torn if not written else written < len(line)
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
