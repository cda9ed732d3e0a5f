"""One input line's request, sent and answered: an HTTP answer becomes a `Result`."""

import io
import tempfile
from typing import IO, Any

import msgspec

from nmoe.batch.folder import output_id, total_tokens
from nmoe.batch.lines import GENERATE, BadLine, Line
from nmoe.batch.results import Result
from nmoe.batch.shards import Stored
from nmoe.client import AsyncClient
from nmoe.errors import RequestError
from nmoe.native import Answer, Choice, Logits, LogitsName, Tensor

_TENSORS = tuple(
    field.name
    for field in msgspec.structs.fields(Choice)
    if field.name not in ("index", "text", "finish_reason", "seed")
)


class _Usage(msgspec.Struct, frozen=True):
    usage: dict[str, Any] = {}


_decode_usage = msgspec.json.Decoder(_Usage).decode


def refused(bad: BadLine) -> Result:
    """The result of a line that is not a valid request."""
    error = {"code": "invalid_line", "message": f"line {bad.number}: {bad.problem}", "line": bad.number}
    return Result(number=bad.number, custom_id=bad.custom_id, error=error)


class Spool(msgspec.Struct, frozen=True):
    """Where logits wait until their answer is complete: tensors of up to `memory` bytes in memory, larger ones in
    unnamed files in `folder`."""

    folder: str
    memory: int


async def exchange(client: AsyncClient, line: Line, spool: Spool) -> Result:
    """Send a line's request once. Raises ConnectionError if the answer is cut short."""
    if line.url == GENERATE:
        return await _exchange_tensors(client, line, spool)
    status, body = await client.post_json(line.url, line.body, output_id(line.number))
    try:
        tokens = total_tokens(_decode_usage(body).usage)
    except msgspec.DecodeError:
        raise ConnectionError(f"{line.url} answered {body[:100]!r}, which is not JSON") from None
    return Result(
        number=line.number, custom_id=line.custom_id, status=status, body=msgspec.Raw(body), num_tokens=tokens
    )


async def _exchange_tensors(client: AsyncClient, line: Line, spool: Spool) -> Result:
    rows = _Rows(spool)
    try:
        async for part in client.raw_parts(line.body, output_id(line.number)):
            if isinstance(part, Logits):
                rows.add(part)
            else:
                return _stored(line, part, rows)
    except RequestError as error:
        rows.close()
        told = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
        return Result(number=line.number, custom_id=line.custom_id, status=error.status, body={"error": told})
    except BaseException:
        rows.close()
        raise
    raise AssertionError("parts end with an answer or an error")


class _Rows:
    """The logits of an answer as they arrive: the rows of each tensor, concatenated."""

    def __init__(self, spool: Spool) -> None:
        self._spool_of = spool
        self._tensors: dict[tuple[int, LogitsName], tuple[IO[bytes], int, int]] = {}  # data, rows, width

    def add(self, part: Logits[Tensor]) -> None:
        """Append rows, which must follow those already added."""
        count, width = part.rows.shape
        at = (part.index, part.name)
        file, rows, _ = self._tensors.get(at) or (self._spool(), 0, width)
        if rows != part.first:
            raise ConnectionError(f"row {part.first} of {part.name} came after {rows} rows")
        file.write(part.rows.data)
        self._tensors[at] = file, rows + count, width

    def _spool(self) -> IO[bytes]:
        return tempfile.SpooledTemporaryFile(self._spool_of.memory, dir=self._spool_of.folder)

    def of(self, index: int) -> dict[str, tuple[Tensor, IO[bytes]]]:
        """The tensors of a choice, ready to be read."""
        found: dict[str, tuple[Tensor, IO[bytes]]] = {}
        for (owner, name), (file, rows, width) in self._tensors.items():
            if owner == index:
                file.seek(0)
                found[name] = Tensor("float32", (rows, width), b""), file
        return found

    def close(self) -> None:
        """Close all files."""
        for file, _, _ in self._tensors.values():
            file.close()


def _seed(drawn: int | None) -> dict[str, int]:
    """The field for a drawn seed: in the answer or, if there are several prompts, in each choice."""
    return {} if drawn is None else {"seed": drawn}


def _stored(line: Line, answer: Answer[Tensor], rows: _Rows) -> Result:
    """The result of an answer, with its tensors under the keys that they will have in a shard."""
    stored: list[Stored] = []
    choices = []
    for choice in answer.choices:
        small = {name: tensor for name in _TENSORS if (tensor := getattr(choice, name)) is not None}
        tensors = {name: (tensor, io.BytesIO(tensor.data)) for name, tensor in small.items()} | rows.of(choice.index)
        described = {}
        for name, (tensor, data) in tensors.items():
            key = f"{line.custom_id}/{choice.index}/{name}"
            stored.append(Stored(key, tensor.dtype, tensor.shape, data))
            described[name] = {"key": key, "dtype": tensor.dtype, "shape": tensor.shape}
        choices.append(
            {
                "index": choice.index,
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                **_seed(choice.seed),
                "tensors": described,
            }
        )
    body = {
        "id": answer.id,
        "model": answer.model,
        "created": answer.created,
        **_seed(answer.seed),
        "choices": choices,
        "usage": answer.usage,
    }
    return Result(
        number=line.number,
        custom_id=line.custom_id,
        status=200,
        body=body,
        tensors=stored,
        num_tokens=total_tokens(answer.usage),
    )
