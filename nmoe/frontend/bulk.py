"""The answers of `POST /v1/generate` (nmoe/native.py): one msgpack object, or frames of logits as they are computed.

Logits stay in the arena until they are written to the client, one frame at a time, so this process holds no more than
one frame plus its transport's buffer. A client that reads slowly holds on to its cells and so stalls its own request.
Since cells are scarce, this is limited in time: then the client is dropped and its cells go to others.
"""

import array
import asyncio
import collections
import functools
import logging
import mmap
import time
from collections.abc import Callable, Iterator, Sequence

import orjson
from aiohttp import web
from aiohttp.http import HttpVersion11

from nmoe.arena import ArenaLayout
from nmoe.errors import RequestError
from nmoe.frontend import replies
from nmoe.frontend.http import Headers
from nmoe.frontend.openai import Call
from nmoe.frontend.outputs import Outputs
from nmoe.frontend.replies import Choice
from nmoe.frontend.requests import Requests
from nmoe.frontend.streams import Streams
from nmoe.native import CONTENT_TYPE, FRAMES_CONTENT_TYPE, Answer, Failure, ItemType, Logits, Tensor, frame, pack
from nmoe.native import Choice as Packed
from nmoe.outputs import Returns, RoutingLayout

_log = logging.getLogger("nmoe.frontend")
_FRAME_BYTES = 1 << 20  # of logits in a frame, but at least one row
_UNREAD_S = 30.0  # how long cells may wait for a client to read


class Bulk:
    """Answers the bulk requests of one frontend."""

    def __init__(
        self,
        model_name: str,
        arena: mmap.mmap | None,
        layout: ArenaLayout,
        routing: RoutingLayout,
        streams: Streams,
        requests: Requests,
    ) -> None:
        self._model_name = model_name
        self._arena = memoryview(arena) if arena is not None else memoryview(b"")
        self._layout = layout
        self._routing = routing
        self._streams = streams
        self._requests = requests
        self._rows = max(1, _FRAME_BYTES // layout.cell_bytes)

    async def respond_whole(self, call: Call, choices: Sequence[Choice], headers: Headers) -> web.StreamResponse:
        """The answer, once all streams have ended."""
        body = await self._requests.run(lambda: pack(self._answer(call, choices)), 0)
        return web.Response(body=body, content_type=CONTENT_TYPE, headers=headers)

    async def respond_in_frames(
        self, call: Call, choices: Sequence[Choice], request: web.BaseRequest, headers: Headers
    ) -> web.StreamResponse:
        """The answer of running streams, with logits. Raises RequestError if one fails before any have come."""
        flow = _Flow(choices)
        await flow.news()
        error = flow.error
        if error is not None:
            raise error
        response = await _open(request, headers)
        try:
            while error is None:
                for part in flow.parts(self._rows, self._copy):
                    await self._send(response, frame(part))
                    flow.check_age()
                error = flow.error
                if flow.is_over:
                    break
                await flow.news()
            if error is None:
                body = await self._requests.run(lambda: frame(self._answer(call, choices)), 0)
            else:
                body = frame(Failure(error.status, orjson.loads(replies.error_body(error))["error"]))
            await self._send(response, body)
            async with asyncio.timeout(_UNREAD_S):
                await response.write_eof()
        except TimeoutError:
            _log.info("a client that does not read its logits was dropped")
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the client does not read") from None
        return response

    @staticmethod
    async def _send(response: web.StreamResponse, data: bytes) -> None:
        async with asyncio.timeout(_UNREAD_S):
            await response.write(data)
        await asyncio.sleep(0)  # a client that reads fast must not starve the others

    def _copy(self, cells: Sequence[int]) -> Tensor:
        """Copy the logits out of some cells and release the cells."""
        data = b"".join(self._arena[self._layout.cell(cell)] for cell in cells)
        self._streams.release(cells)
        return Tensor("float32", (len(cells), self._layout.vocab_size), data)

    def _answer(self, call: Call, choices: Sequence[Choice]) -> Answer[Tensor]:
        """Build the answer, once all streams have ended."""
        first = choices[0]
        return Answer(
            id=f"gen-{first.stream.uid:x}",
            model=self._model_name,
            created=int(time.time()),
            choices=[self._choice(call, choice) for choice in choices],
            usage=replies.usage(choices, call.n),
            seed=first.seed if len(call.prompts) == 1 else None,
        )

    def _choice(self, call: Call, choice: Choice) -> Packed[Tensor]:
        stream = choice.stream
        text, ids = stream.take()
        tensors: dict[str, Tensor] = {}
        if choice.index % call.n == 0:
            tensors["prompt_token_ids"] = _int32(choice.prompt.ids)
        if (outputs := stream.outputs) is not None:
            if outputs.returns.records:
                tensors |= _columns(outputs.take(), outputs.returns, "")
            if outputs.returns.prompt:
                tensors |= _columns(bytes(outputs.prompt), outputs.returns, "prompt_")
            if outputs.returns.routing:
                tensors["routed_experts"] = self._routed(outputs)
        return Packed(
            index=choice.index,
            text=choice.prompt.text + text,
            finish_reason=str(stream.reason),
            token_ids=_int32(ids),
            seed=choice.seed if len(call.prompts) > 1 else None,
            **tensors,
        )

    def _routed(self, outputs: Outputs) -> Tensor:
        layout = self._routing
        shape = (len(outputs.routing) // layout.position_bytes, layout.layers, layout.top_k)
        return Tensor("uint8" if layout.item_bytes == 1 else "uint16", shape, bytes(outputs.routing))


class _Flow:
    """The logits of a request's choices: what has arrived, what is next, and how long cells have been waiting."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._choices = choices
        self._taken = [0] * len(choices)  # cells taken, per choice
        self._arrivals: list[collections.deque[tuple[int, float]]] = [collections.deque() for _ in choices]
        self._changed = asyncio.Event()
        for place, choice in enumerate(choices):
            choice.stream.on_outputs = functools.partial(self._note, place)
            choice.stream.ended.add_done_callback(lambda _: self._changed.set())

    @property
    def error(self) -> RequestError | None:
        """The first error of a choice."""
        return next((choice.stream.error for choice in self._choices if choice.stream.error is not None), None)

    @property
    def is_over(self) -> bool:
        """Whether every choice has ended; `parts` may still yield some rows."""
        return all(choice.stream.ended.done() for choice in self._choices)

    async def news(self) -> None:
        """Wait until something arrives or ends."""
        await self._changed.wait()
        self._changed.clear()

    def parts(self, most: int, copy: Callable[[Sequence[int]], Tensor]) -> Iterator[Logits[Tensor]]:
        """The rows that have arrived, at most `most` at a time, choices taking turns; stops at the first error."""
        found = True
        while found and self.error is None:
            found = False
            for place, choice in enumerate(self._choices):
                if (part := self._next(place, choice, most, copy)) is not None:
                    found = True
                    yield part

    def _next(
        self, place: int, choice: Choice, most: int, copy: Callable[[Sequence[int]], Tensor]
    ) -> Logits[Tensor] | None:
        outputs = choice.stream.outputs
        assert outputs is not None
        first, of_prompt = self._taken[place], outputs.num_prompt_records
        if first < of_prompt:
            most = min(most, of_prompt - first)
        cells = outputs.take_cells(most)
        if not cells:
            return None
        self._taken[place] += len(cells)
        if first < of_prompt:
            return Logits(choice.index, "prompt_logits", first, copy(cells))
        return Logits(choice.index, "logits", first - of_prompt, copy(cells))

    def _note(self, place: int) -> None:
        outputs = self._choices[place].stream.outputs
        assert outputs is not None
        self._arrivals[place].append((self._taken[place] + outputs.num_untaken_cells, time.monotonic()))
        self._changed.set()

    def check_age(self) -> None:
        """Raises TimeoutError if cells have waited too long."""
        for taken, arrivals in zip(self._taken, self._arrivals, strict=True):
            while arrivals and arrivals[0][0] <= taken:
                arrivals.popleft()
            if arrivals and time.monotonic() - arrivals[0][1] > _UNREAD_S:
                raise TimeoutError


async def _open(request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
    response = web.StreamResponse(headers=headers)
    response.content_type = FRAMES_CONTENT_TYPE
    if request.version >= HttpVersion11:
        response.enable_chunked_encoding()
    else:
        response.force_close()  # HTTP/1.0 has no chunked encoding: closing the connection ends the response
    await response.prepare(request)
    return response


def _int32(values: Sequence[int]) -> Tensor:
    return Tensor("int32", (len(values),), array.array("i", values).tobytes())


def _columns(records: bytes, returns: Returns, prefix: str) -> dict[str, Tensor]:
    """Records (nmoe/outputs.py) as one tensor per field."""
    size, k, s = returns.record_bytes, returns.top_k, len(returns.scored_ids)
    count = len(records) // size

    def column(start: int, dtype: ItemType, width: int) -> Tensor:
        data = b"".join(records[at : at + 4 * width] for at in range(start, len(records), size))
        return Tensor(dtype, (count, width), data)

    def single(start: int, dtype: ItemType) -> Tensor:
        return Tensor(dtype, (count,), column(start, dtype, 1).data)

    tensors = {"logprobs": single(0, "float32"), "drawn_logprobs": single(4, "float32"), "ranks": single(8, "int32")}
    if prefix:
        del tensors["drawn_logprobs"]  # a prompt was not drawn
    if k:
        tensors["top_k_ids"] = column(12, "int32", k)
        tensors["top_k_logprobs"] = column(12 + 4 * k, "float32", k)
    if s:
        tensors["token_id_logprobs"] = column(12 + 8 * k, "float32", s)
    return {prefix + name: tensor for name, tensor in tensors.items()}
