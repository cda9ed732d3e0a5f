"""What crosses process boundaries on the CPU side, and how.

Requests and steps travel over ZeroMQ `ipc://` sockets in the server's private run directory: the scheduler binds one
ROUTER for frontends and one for workers; every peer connects a DEALER whose identity is its index. Supervision
(progress, up, failed, drain, deaths) uses an inherited socketpair per child, the `Control`: its end-of-file signals
the parent's death, and it needs no ZeroMQ threads in the launcher, which must be able to fork.
"""

import ctypes
import mmap
import os
import pathlib
import select
import signal
import socket
from typing import Literal

import msgspec
import zmq

from nmoe.config import Config
from nmoe.errors import LaunchError
from nmoe.metrics import Board

Role = Literal["frontend", "scheduler", "worker"]

# Messages wait here while a peer is busy. The traffic is bounded elsewhere (queue limit, two steps in flight), so
# reaching the mark means that the peer has stopped reading; the sender then gets zmq.Again instead of silently losing
# messages.
HIGH_WATER_MARK = 1 << 16
# Plain ints, because combining zmq's enum members takes longer than sending.
_NOWAIT = int(zmq.NOBLOCK)
_MORE_NOWAIT = int(zmq.NOBLOCK | zmq.SNDMORE)
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the signals that tell the launcher to drain and stop
_MAP_NORESERVE = 0x4000  # Linux; Python's mmap has no name for it
_PR_SET_NAME = 15
_PR_SET_PDEATHSIG = 1


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Child -> launcher: `done` of `total` bytes of `what` are loaded."""

    what: str
    done: int
    total: int


class Up(msgspec.Struct, frozen=True, tag="up"):
    """Child -> launcher: this process is up (for a frontend: the whole path to the workers is open)."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Child -> launcher: this process cannot continue; `message` is for the operator. The child exits next."""

    message: str


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Launcher -> frontend: reject new requests, finish the running ones, then answer with Drained."""


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """Frontend -> launcher: no request is open any longer."""


class Gone(msgspec.Struct, frozen=True, tag="gone"):
    """Launcher -> child: this life of this process has ended and lost its state; it may be restarted."""

    role: Role
    index: int
    generation: int


ControlMessage = Progress | Up | Failed | Drain | Drained | Gone


class Control:
    """One end of the launcher's link to a child: whole messages, non-blocking receive, end-of-file when a side dies."""

    _encoder = msgspec.msgpack.Encoder()
    _decoder: msgspec.msgpack.Decoder[ControlMessage] = msgspec.msgpack.Decoder(ControlMessage)

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def pair(cls) -> "tuple[Control, Control]":
        """Both ends; the launcher keeps the first, the child the second."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """For select and event loops: readable when there is a message or end-of-file."""
        return self._sock.fileno()

    def send(self, message: ControlMessage) -> None:
        """Send one message. A dead peer is not an error here; its death is detected elsewhere."""
        try:
            self._sock.send(self._encoder.encode(message), socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> ControlMessage | None:
        """The next message, or None if there is none yet. Raises EOFError if the peer is gone."""
        try:
            data = self._sock.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        return self._decoder.decode(data)

    def shut(self) -> None:
        """Signal end-of-file to the peer; what it has sent can still be received."""
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end."""
        self._sock.close()


class Boot(msgspec.Struct, frozen=True):
    """Everything a child process starts with; inherited by fork, never sent."""

    role: Role
    index: int  # a worker's rank, a frontend's index, 0 for the scheduler
    generation: int  # the number of this life of the process, starting at 1
    config: Config
    run_dir: pathlib.Path
    control: Control
    board: Board
    http_socket: socket.socket | None = None  # bound and listening; frontends only
    slabs: mmap.mmap | None = None  # memory of all ranks (nmoe/slab.py); workers of a world larger than 1
    arena: mmap.mmap | None = None  # logits in transit to a frontend (nmoe/arena.py); workers and frontends

    @property
    def title(self) -> str:
        """Short name for logs and `top`."""
        return self.role if self.role == "scheduler" else f"{self.role} {self.index}"


def sparse_memory(size: int) -> mmap.mmap:
    """Anonymous memory of `size` bytes, zeroed, inherited by fork.

    Not reserved: limits call for more than traffic will ever touch, and only pages that are touched use memory. Raises
    LaunchError if even the address space is unavailable.
    """
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except (OSError, OverflowError) as error:
        raise LaunchError(
            f"processes cannot share {size / (1 << 30):.1f} GiB of addresses ({error}); lower [engine]"
            " max_prefill_tokens and max_batch_size, or lift `ulimit -v` and vm.overcommit_memory = 2"
        ) from None


def frontend_address(run_dir: pathlib.Path) -> str:
    """Where the scheduler listens for frontends."""
    return f"ipc://{run_dir}/frontends"


def worker_address(run_dir: pathlib.Path) -> str:
    """Where the scheduler listens for workers."""
    return f"ipc://{run_dir}/workers"


def identity(index: int) -> bytes:
    """The ROUTER identity of frontend or worker `index`; never starts with a zero byte, which ZeroMQ reserves."""
    return b"%d" % index


def _configure(sock: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    sock.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    sock.setsockopt(zmq.HEARTBEAT_IVL, 0)  # the launcher checks liveness, by pidfd and heartbeats on the board
    return sock


def bind_router(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """The scheduler's end of a link. Sending to an unconnected peer raises zmq.ZMQError (EHOSTUNREACH); a peer that
    reconnects under its identity replaces its previous life."""
    sock = _configure(context.socket(zmq.ROUTER))
    sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
    sock.bind(address)
    return sock


def connect_dealer(context: zmq.Context[zmq.Socket[bytes]], address: str, index: int) -> zmq.Socket[bytes]:
    """A frontend's or worker's end of its link; connects once the scheduler has bound."""
    sock = _configure(context.socket(zmq.DEALER))
    sock.setsockopt(zmq.IDENTITY, identity(index))
    sock.setsockopt(zmq.RECONNECT_IVL, 20)
    sock.connect(address)
    return sock


def route(router: zmq.Socket[bytes], index: int, data: bytes) -> Literal["sent", "gone", "full"]:
    """Send to one peer of a ROUTER without blocking: "gone" if it is not connected, "full" if it is alive but has not
    read for a long time."""
    try:
        router.send(identity(index), _MORE_NOWAIT)  # raises if the peer is unreachable
        router.send(data, _NOWAIT)
    except zmq.ZMQError as error:
        if error.errno == zmq.EHOSTUNREACH:
            return "gone"
        if error.errno == zmq.EAGAIN:
            return "full"
        raise
    return "sent"


def settle_in(boot: Boot) -> None:
    """The first thing every child does: set its name, and arrange to die when the launcher dies.

    Signals that a terminal sends to the whole group are left to the launcher, which stops its children in order.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, f"nmoe {boot.title}"[:15].encode(), 0, 0, 0)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    poller = select.poll()
    poller.register(boot.control.fileno(), select.POLLHUP)
    if poller.poll(0):  # the launcher died before PR_SET_PDEATHSIG took effect
        os._exit(1)
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
