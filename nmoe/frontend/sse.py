"""Server-sent events of one request, written directly where tokens arrive: no task per event.

The response's head is sent the usual way. After that, each event is one write to the transport, in HTTP/1.1 chunk
framing.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11

from nmoe.errors import RequestError
from nmoe.frontend.replies import Answer, Choice, Chunks, OutputChunks, error_body
from nmoe.frontend.streams import Stream
from nmoe.one_line import on_one_line

_log = logging.getLogger("nmoe.frontend")
# At most this much waits for a client that reads more slowly than its tokens come; later tokens gather in the stream
# and go out together in fewer events.
_MAX_UNSENT = 1 << 18  # bytes
# A client that lets this many tokens gather is dropped, and so is one that does not read the end of its answer in time.
_MAX_BEHIND = 8192  # tokens
_UNREAD_S = 60.0
# Tokens' outputs are slow to render, so no more of them gather than this: then they are rendered whether the client
# reads or not, and the client is dropped once too much is unread.
_RENDERED_AT_ONCE = 64  # tokens
_MAX_UNSENT_OUTPUTS = 1 << 24  # bytes
_DONE = b"[DONE]"
_BETWEEN = b"\n\ndata: "  # separates two events in one chunk


class EventStream:
    """Created once the answer has started without an error; `follow` writes it to the end."""

    def __init__(
        self,
        response: web.StreamResponse,
        transport: asyncio.Transport,
        answer: Answer,
        drain: Callable[[], Awaitable[None]],
    ) -> None:
        """`drain` waits until little of what was written is unsent. Raises ConnectionError if the client leaves."""
        self._response = response
        self._transport = transport
        self._drain = drain
        self._chunked = response.chunked
        self._answer = answer
        self._ended: asyncio.Queue[tuple[Choice, Chunks]] = asyncio.Queue()

    @classmethod
    async def open(cls, request: web.BaseRequest, headers: dict[str, str], answer: Answer) -> "EventStream":
        """Send the response's head and what precedes the first text; from here on tokens are sent as they come."""
        # By default nginx holds a response back until a buffer is full; it takes the second header as its own setting.
        response = web.StreamResponse(headers={**headers, hdrs.CACHE_CONTROL: "no-cache", "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        response.charset = "utf-8"  # requests, among others, takes text without one for Latin-1
        if request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        else:
            response.force_close()  # HTTP/1.0 has no chunked encoding: closing the connection ends the response
        await response.prepare(request)
        if request.transport is None:
            raise ConnectionResetError("the client left")
        events = cls(response, request.transport, answer, request.writer.drain)
        for choice in answer.choices:
            await events._room()  # an opening may hold the prompt
            if choice.formats is None:
                events._begin(choice, Chunks(answer, choice))
            else:
                events._begin_outputs(choice, OutputChunks(answer, choice, choice.formats))
        return events

    def _begin(self, choice: Choice, chunks: Chunks) -> None:
        stream = choice.stream
        if (opening := chunks.opening()) is not None:
            self._write(opening)
        if stream.num_tokens:
            self._on_tokens(stream, chunks)
        stream.on_tokens = functools.partial(self._on_tokens, stream, chunks)
        stream.ended.add_done_callback(lambda _: self._ended.put_nowait((choice, chunks)))

    def _begin_outputs(self, choice: Choice, chunks: OutputChunks) -> None:
        stream = choice.stream
        self._on_outputs(stream, chunks)
        stream.on_outputs = functools.partial(self._on_outputs, stream, chunks)
        stream.ended.add_done_callback(lambda _: self._ended.put_nowait((choice, chunks)))

    async def follow(self) -> web.StreamResponse:
        """Close each choice as it ends, then the answer; the first error ends the whole answer."""
        for left in reversed(range(len(self._answer.choices))):
            choice, chunks = await self._ended.get()
            choice.stream.on_tokens = choice.stream.on_outputs = None
            await self._room()  # a closing chunk has everything held back, and may include the prompt
            if choice.stream.error is not None:
                self._write(error_body(choice.stream.error))  # no [DONE] follows: the answer is not complete
                break
            if isinstance(chunks, OutputChunks):
                self._open(chunks)
            last = [chunks.closing(*choice.stream.take())]
            if not left:
                last += [self._answer.usage(), _DONE] if self._answer.call.include_usage else [_DONE]
            self._write(_BETWEEN.join(last))
        for choice in self._answer.choices:
            choice.stream.on_tokens = choice.stream.on_outputs = None
        await self._end()
        return self._response

    async def _room(self) -> None:
        """Wait while too much of what was written is unread, but not forever."""
        if self._transport.get_write_buffer_size() < _MAX_UNSENT:
            return
        try:
            async with asyncio.timeout(_UNREAD_S):
                await self._drain()
        except TimeoutError:
            self._drop()
            raise ConnectionResetError("the client does not read") from None

    async def _end(self) -> None:
        if not self._transport.get_write_buffer_size():
            await self._response.write_eof()
            return
        try:
            async with asyncio.timeout(_UNREAD_S):
                await self._response.write_eof()
        except TimeoutError:
            self._drop()

    def give_up(self, error: RequestError) -> web.StreamResponse:
        """End with an error, whatever state the stream is in; the connection is not reused."""
        self._write(error_body(error))
        self._response.force_close()
        return self._response

    def _on_tokens(self, stream: Stream, chunks: Chunks) -> None:
        if self._transport.get_write_buffer_size() < _MAX_UNSENT:
            text, ids = stream.take()
            self._write(chunks.text(text, ids))
        elif stream.num_untaken > _MAX_BEHIND:
            self._drop()

    def _on_outputs(self, stream: Stream, chunks: OutputChunks) -> None:
        """Log-probabilities are sent with the text of their tokens, so wait while any of it is held back."""
        if not stream.num_untaken or stream.holds_text:
            return
        unsent = self._transport.get_write_buffer_size()
        if unsent > _MAX_UNSENT_OUTPUTS:
            self._drop()
        elif unsent < _MAX_UNSENT or stream.num_untaken >= _RENDERED_AT_ONCE:
            self._open(chunks)
            self._write(chunks.text(*stream.take()))

    def _open(self, chunks: OutputChunks) -> None:
        if (opening := chunks.opening()) is not None:
            self._write(opening)

    def _drop(self) -> None:
        """The client does not read: drop the connection and all that waits for it; its handler is then cancelled."""
        _log.info("a client that does not read its stream was dropped")
        self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._transport.is_closing():  # the handler is about to be cancelled
            return
        data = on_one_line(data)  # httpx's iter_lines splits at other line ends too
        if self._chunked:
            self._transport.write(b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data))
        else:
            self._transport.write(b"data: %b\n\n" % data)
