"""Server-sent events of one request, written from wherever tokens arrive: no task per event.

The head of the response goes out the usual way. After it each event is one write to the transport, with HTTP/1.1's
chunk framing around it.
"""

import asyncio

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11

from nmoe.errors import RequestError
from nmoe.frontend.replies import Chunks, error_body
from nmoe.frontend.streams import Stream

# A client that reads slower than its tokens come has this much waiting; until then later tokens gather in the stream
# and go out together in fewer events.
_MAX_UNSENT = 1 << 18  # bytes
_DONE = b"[DONE]"


class EventStream:
    """Prepared once the stream has started without an error; `finish` ends it."""

    def __init__(
        self, response: web.StreamResponse, transport: asyncio.Transport, stream: Stream, chunks: Chunks
    ) -> None:
        self._response = response
        self._transport = transport
        self._chunked = response.chunked
        self._stream = stream
        self._chunks = chunks

    @classmethod
    async def open(
        cls, request: web.BaseRequest, headers: dict[str, str], stream: Stream, chunks: Chunks
    ) -> "EventStream":
        """Send the response's head and the chunk before the first text; from here on tokens go out as they come."""
        response = web.StreamResponse(headers={**headers, hdrs.CACHE_CONTROL: "no-cache"})
        response.content_type = "text/event-stream"
        if request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        else:
            response.force_close()  # HTTP/1.0 has no chunks: the end of the connection ends the response
        await response.prepare(request)
        if request.transport is None:
            raise ConnectionResetError("the client left")
        events = cls(response, request.transport, stream, chunks)
        if (opening := chunks.opening()) is not None:
            events._write(opening)
        if stream.num_tokens:
            events._on_tokens()
        stream.on_tokens = events._on_tokens
        return events

    async def finish(self, *, include_usage: bool) -> web.StreamResponse:
        """The end of the stream that has ended: its last chunks, or its error."""
        self._stream.on_tokens = None
        if self._stream.error is not None:
            self._write(error_body(self._stream.error))  # no [DONE] follows: the answer is not complete
        else:
            self._write(self._chunks.closing(*self._stream.take()))
            if include_usage:
                self._write(self._chunks.usage())
            self._write(_DONE)
        await self._response.write_eof()
        return self._response

    def give_up(self, error: RequestError) -> web.StreamResponse:
        """End with an error, whatever state the stream is in; the connection is not used again."""
        self._write(error_body(error))
        self._response.force_close()
        return self._response

    def _on_tokens(self) -> None:
        if self._transport.get_write_buffer_size() < _MAX_UNSENT:
            text, ids = self._stream.take()
            self._write(self._chunks.text(text, ids))

    def _write(self, data: bytes) -> None:
        if self._transport.is_closing():  # the handler is about to be cancelled
            return
        if self._chunked:
            self._transport.write(b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data))
        else:
            self._transport.write(b"data: %b\n\n" % data)
