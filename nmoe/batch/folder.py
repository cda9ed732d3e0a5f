"""What a batch's output folder holds, and which of that still counts after an interruption at any moment.

    batch.json            which input, profile and model the folder belongs to; written before anything is finished
    output.jsonl          OpenAI's batch output, one line per finished request; its `id` has the input line's number
    tensors-N.safetensors tensors of requests to /v1/generate, whose output lines name this shard
    index.jsonl           one line per shard: the requests in it and the names of their tensors
    lock                  held while a batch runs

A line of output.jsonl counts as finished if it names no shard, or one that is in the index. Shards are committed in
this order: the shard under its final name, the output lines that name it, its line in the index. So what an
interruption leaves behind lies at the files' ends: a torn line, output lines whose shard is not in the index, a shard
that nothing names. `recover` removes all of this, and the requests are computed again.
"""

import contextlib
import fcntl
import os
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import msgspec

from nmoe.batch.shards import NAME, TEMPORARY, sync_folder
from nmoe.batch.survey import Survey
from nmoe.config import Config
from nmoe.errors import NmoeError

OUTPUT, INDEX = "output.jsonl", "index.jsonl"
_MANIFEST, _LOCK = "batch.json", "lock"
_ID_PREFIX = "batch_req_"
_ENGINE_LEAVES_S = 15.0  # how long an engine may take to end after its batch was killed
_LOOK_S = 0.1


class Manifest(msgspec.Struct, frozen=True):
    """What must be unchanged for a batch to resume."""

    sha256: str  # of the input
    profile: str | None
    model: dict[str, Any]  # the configuration's section
    world_size: int
    format: int = 1


class Finished(msgspec.Struct, frozen=True):
    """What is finished: a flag per input line, and totals over the finished lines."""

    lines: bytearray  # [last line + 1]: 1 where finished
    num_lines: int = 0
    num_errors: int = 0
    num_tokens: int = 0  # of prompts and outputs
    num_shards: int = 0


class _Body(msgspec.Struct, frozen=True):
    shard: str = ""
    usage: dict[str, Any] = {}


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    body: _Body


class _Written(msgspec.Struct, frozen=True):
    id: str
    response: _Response | None


class Kept(msgspec.Struct):
    """How much of output.jsonl counts."""

    num_bytes: int = 0
    numbers: list[int] = []  # of the input lines, in the output's order
    num_errors: int = 0
    num_tokens: int = 0


_decode_written = msgspec.json.Decoder(_Written).decode


def output_id(number: int) -> str:
    """The `id` of input line `number` in the output."""
    return f"{_ID_PREFIX}{number}"


def total_tokens(usage: dict[str, Any]) -> int:
    """Tokens of prompt and output together."""
    count = usage.get("total_tokens")
    return count if isinstance(count, int) else 0


def committed_shards(index: Iterable[bytes]) -> tuple[int, list[str]]:
    """How many bytes of the index count, and the names of the shards in them.

    Raises ValueError for a line that no batch wrote.
    """
    num_bytes, names = 0, []
    for line in index:
        if not line.endswith(b"\n"):
            break
        names.append(str(msgspec.json.decode(line)["shard"]))
        num_bytes += len(line)
    return num_bytes, names


def kept_output(output: Iterable[bytes], shards: set[str]) -> Kept:
    """The part of the output that counts: whole lines, up to the first that names a shard which is not in `shards`.

    Raises ValueError for a line that no batch wrote.
    """
    kept = Kept()
    for line in output:
        if not line.endswith(b"\n"):
            break
        written = _decode_written(line)
        response = written.response
        if response is not None and response.body.shard and response.body.shard not in shards:
            break
        kept.numbers.append(int(written.id.removeprefix(_ID_PREFIX)))
        kept.num_bytes += len(line)
        if response is None or response.status_code != 200:
            kept.num_errors += 1
        else:
            kept.num_tokens += total_tokens(response.body.usage)
    return kept


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    """Turn what the system refuses (a full disk, files of another user) into a message for the operator."""
    try:
        yield
    except OSError as error:
        raise NmoeError(f"{error.filename or folder}: cannot be written: {error.strerror}") from error


def open_folder(folder: pathlib.Path) -> BinaryIO:
    """Create the folder if there is none, and lock it until the returned file is closed, here and in all processes
    forked meanwhile: the engine of a batch that was killed takes a moment to end, and the next batch needs its memory.
    Raises NmoeError if another batch is running in the folder, or if it is not a batch's or cannot be written."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        strangers = [path.name for path in folder.iterdir()] if not (folder / _MANIFEST).exists() else []
        if strangers := [name for name in strangers if name not in (_LOCK, _MANIFEST + TEMPORARY)]:
            raise NmoeError(
                f"{folder}: has {strangers[0]!r} and is no batch's folder; name a new folder, or one that was begun"
            )
        lock = (folder / _LOCK).open("wb")
    try:
        _wait_for(lock, folder)
    except BaseException:
        lock.close()
        raise
    return lock


def _wait_for(lock: BinaryIO, folder: pathlib.Path) -> None:
    deadline = time.monotonic() + _ENGINE_LEAVES_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise NmoeError(f"{folder}: another batch is running in it; wait for its end") from None
            time.sleep(_LOOK_S)
        else:
            return


def claim(folder: pathlib.Path, manifest: Manifest) -> None:
    """Start or resume. Raises NmoeError if the folder has results from another input or with other options."""
    path, output = folder / _MANIFEST, folder / OUTPUT
    with _writing(folder):
        if not path.exists() or not output.exists() or not output.stat().st_size:
            _write_manifest(folder, manifest)
            return
        written = path.read_bytes()
    try:
        before = msgspec.json.decode(written, type=Manifest)
    except msgspec.DecodeError as error:
        raise NmoeError(f"{path}: is not readable ({error}); name another folder") from None
    if before.sha256 != manifest.sha256:
        raise NmoeError(
            f"{folder}: was begun with another input, or the file has changed since; restore it, or name a new folder"
        )
    if changes := list(_changes(before, manifest)):
        raise NmoeError(f"{folder}: was begun with {'; '.join(changes)}; use the same, or name a new folder")


def _write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    temporary = folder / (_MANIFEST + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / _MANIFEST)
    sync_folder(folder)


def _changes(before: Manifest, now: Manifest) -> Iterable[str]:
    if before.profile != now.profile:
        yield f"--profile {before.profile}, not {now.profile}" if before.profile else "no --profile"
    for key in before.model.keys() | now.model.keys():
        if before.model.get(key) != now.model.get(key):
            yield f"[model] {key} = {before.model.get(key)!r}, not {now.model.get(key)!r}"
    if before.world_size != now.world_size:
        yield f"[parallel] world_size = {before.world_size}, not {now.world_size}"
    if before.format != now.format:
        yield f"format {before.format}, not {now.format}, of another version of nmoe"


def manifest_of(found: Survey, profile: str | None, config: Config) -> Manifest:
    """The manifest of a batch of this input with these options."""
    return Manifest(found.sha256, profile, msgspec.structs.asdict(config.model), config.parallel.world_size)


def recover(folder: pathlib.Path, last_line: int) -> Finished:
    """Remove what an interruption left behind, and return what is finished. Raises NmoeError if the files are not as a
    batch leaves them, or cannot be changed."""
    with _writing(folder):
        return _recover(folder, last_line)


def _recover(folder: pathlib.Path, last_line: int) -> Finished:
    index, output = folder / INDEX, folder / OUTPUT
    try:
        with _opened(index) as file:
            index_bytes, names = committed_shards(file)
        with _opened(output) as file:
            kept = kept_output(file, set(names))
        finished = _tally(kept, names, last_line)
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
        raise NmoeError(f"{folder}: {OUTPUT} or {INDEX} was changed by something else: {error}") from None
    if missing := [name for name in names if not (folder / name).exists()]:
        raise NmoeError(f"{folder}: {missing[0]} is in {INDEX} but not there; restore it, or name a new folder")
    for path, size in ((index, index_bytes), (output, kept.num_bytes)):
        os.truncate(path, size)
    for path in folder.iterdir():
        name = path.name.removesuffix(TEMPORARY)
        if NAME.fullmatch(name) and (name != path.name or name not in names):
            path.unlink()
    return finished


def _opened(path: pathlib.Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644), "rb")


def _tally(kept: Kept, names: list[str], last_line: int) -> Finished:
    lines = bytearray(last_line + 1)
    for number in kept.numbers:
        if not 0 < number <= last_line or lines[number]:
            raise ValueError(f"input line {number} is there twice, or the input has no such line")
        lines[number] = 1
    shards = max((int(match[1]) for name in names if (match := NAME.fullmatch(name))), default=0)
    return Finished(lines, len(kept.numbers), kept.num_errors, kept.num_tokens, shards)
