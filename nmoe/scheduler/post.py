"""The link to the frontends: what happens when one stops reading, and what it is sent when it reads again.

The link's queue is long (`ipc.HIGH_WATER_MARK`), so a full one means a frontend that is alive but has not read for a
long time. Messages that do not fit are lost, except terminal entries: they are owed, and go first once there is room.
A request must not continue after losing part of its output, so all of that frontend's requests end with an error:

    sent ---link full---> cut (nothing is sent) ---`settle`: its requests have ended---> owed ---all paid---> sent

The frontend's next life is owed nothing.
"""

from collections.abc import Callable

import msgspec
import zmq

from nmoe import ipc
from nmoe.errors import RequestError
from nmoe.messages import Ended, SchedulerToFrontend, Tokens
from nmoe.outputs import cells_of
from nmoe.scheduler.cells import LIFE, Cells

UNREAD = RequestError(
    "what this request produced was lost, because its frontend process had stopped reading; send it again",
    status=503,
    code="frontend_stalled",
)


class Post:
    """Sends to frontends. Calls `on_gone` with any frontend that is not connected."""

    def __init__(self, link: "zmq.Socket[bytes]", cells: Cells, on_gone: Callable[[int], None]) -> None:
        self._link, self._cells, self._on_gone = link, cells, on_gone
        self._encode = msgspec.msgpack.Encoder().encode
        self._owed: dict[int, list[SchedulerToFrontend]] = {}
        self._num_unread = 0
        self.cut: set[int] = set()  # frontends whose requests must end

    def send(self, frontend: int, message: SchedulerToFrontend) -> None:
        """Send a message, or keep the part of it that must not be lost."""
        if frontend not in self.cut and self._pay(frontend) and self._try(frontend, message):
            return
        self._num_unread += 1
        if isinstance(message, Tokens) and (message.uids or frontend in self.cut):
            self.cut.add(frontend)
            self._release_cells(message)
            ended = tuple(_failed(entry) for entry in message.ended)
            message = Tokens(message.generation, b"", b"", None, ended)
            if not ended:
                return
        self._owed.setdefault(frontend, []).append(message)

    def settle(self) -> None:
        """Call once the requests of every cut frontend have ended and been passed to `send`."""
        self.cut.clear()
        self.pay()

    def pay(self) -> None:
        """Send what is owed, as far as there is room."""
        for frontend in list(self._owed):
            self._pay(frontend)

    def forget(self, frontend: int) -> None:
        """The frontend is gone, or is starting over."""
        self._owed.pop(frontend, None)
        self.cut.discard(frontend)

    def take_unread(self) -> int:
        """The number of messages that found no room since the last call."""
        count, self._num_unread = self._num_unread, 0
        return count

    def _pay(self, frontend: int) -> bool:
        """Send what is owed to a frontend. Returns whether nothing is left."""
        while owed := self._owed.get(frontend):
            if not self._try(frontend, owed[0]):
                return False
            del owed[0]
        self._owed.pop(frontend, None)
        return True

    def _try(self, frontend: int, message: SchedulerToFrontend) -> bool:
        """Returns False if the link is full."""
        outcome = ipc.route(self._link, frontend, self._encode(message))
        if outcome == "gone":
            self.forget(frontend)
            self._on_gone(frontend)
        return outcome != "full"

    def _release_cells(self, message: Tokens) -> None:
        """Free the cells of these rows: nobody will read their logits."""
        blocks, start = memoryview(message.blocks), 0
        sizes = memoryview(message.block_sizes or b"").cast("i").tolist()
        for uid, size in zip(memoryview(message.uids).cast("q").tolist(), sizes, strict=False):
            if size:
                self._cells.release(cells_of(blocks[start : start + size]).tobytes(), uid // LIFE)
                start += size


def _failed(entry: Ended) -> Ended:
    """The terminal entry of a request whose last tokens may be lost."""
    if entry.reason == "error":
        return entry
    error = {"detail": str(UNREAD), "status": UNREAD.status, "code": UNREAD.code}
    return msgspec.structs.replace(entry, reason="error", **error)
