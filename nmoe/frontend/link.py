"""The frontend's end of the link to the scheduler, on the event loop.

ZeroMQ's descriptor is edge-triggered: it becomes readable when the socket's state changes, and any use of the socket
may consume that edge. So every wake-up receives until nothing is left, and every send checks again.
"""

import asyncio
import logging
from collections.abc import Callable

import msgspec
import zmq

from nmoe import ipc
from nmoe.errors import RequestError
from nmoe.messages import FrontendToScheduler, SchedulerToFrontend

_log = logging.getLogger("nmoe.frontend")
# As plain numbers: zmq's enumerations take longer than the calls.
_NOWAIT, _EVENTS, _READABLE = int(zmq.NOBLOCK), int(zmq.EVENTS), int(zmq.POLLIN)
_BURST = 16  # messages per turn of the event loop, so that HTTP gets turns in between


class Link:
    """A DEALER socket that passes its messages to `receive`, in the event loop's thread."""

    def __init__(self, address: str, index: int, receive: Callable[[SchedulerToFrontend], None]) -> None:
        self._receive = receive
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(SchedulerToFrontend).decode
        self._address = address
        self._index = index
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.Handle | None = None  # the only pending call of `_drain`
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._connect()

    def send(self, message: FrontendToScheduler) -> None:
        """Send without waiting. Raises RequestError (503) if the scheduler has not taken messages for a long time."""
        try:
            self._socket.send(self._encode(message), _NOWAIT)
        except zmq.Again:
            raise RequestError("the engine does not answer", status=503, code="engine_unreachable") from None
        if int(self._socket.getsockopt(_EVENTS)) & _READABLE:
            self._drain_soon()

    def reconnect(self) -> None:
        """The scheduler died: messages queued for it must not reach its next life."""
        self._disconnect()
        self._socket = self._connect()

    def close(self) -> None:
        """Close the link, dropping what is still queued on it."""
        self._disconnect()
        self._context.term()

    def _connect(self) -> "zmq.Socket[bytes]":
        socket = ipc.connect_dealer(self._context, self._address, self._index)
        self._loop.add_reader(socket.fileno(), self._drain)
        return socket

    def _disconnect(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self._socket.close()

    def _drain(self) -> None:
        if self._again is not None:  # called by the reader, before its scheduled turn
            self._again.cancel()
            self._again = None
        for _ in range(_BURST):
            try:
                data = self._socket.recv(_NOWAIT)
            except zmq.Again:
                return
            try:
                self._handle(data)
            except BaseException:  # nothing would signal the messages behind this one again
                self._drain_soon()
                raise
        self._drain_soon()

    def _drain_soon(self) -> None:
        if self._again is None:
            self._again = self._loop.call_soon(self._drain)

    def _handle(self, data: bytes) -> None:
        """Handle a message. One that fails must not affect those behind it."""
        try:
            self._receive(self._decode(data))
        except Exception:
            _log.exception("a message from the scheduler could not be handled")
