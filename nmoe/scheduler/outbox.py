"""What goes to the frontends: one Tokens message per frontend and step, terminal entries included."""

import numpy as np
import numpy.typing as npt

from nmoe.messages import Ended, Tokens, make_uid, uid_frontend
from nmoe.scheduler.flight import Blocks
from nmoe.scheduler.slots import Ints

Uids = npt.NDArray[np.int64]

_STRIDE = make_uid(1, 0, 0)  # the uids of one frontend are a range of this length


class Outbox:
    """Messages in order, and the terminal entries that wait for the next one to their frontend."""

    def __init__(self, generation: int) -> None:
        self._generation = generation
        self._messages: list[tuple[int, Tokens]] = []
        self._ended: dict[int, list[Ended]] = {}

    def end(self, entry: Ended) -> None:
        """The terminal entry of a request, whose last tokens are in the next `tokens` at the latest."""
        self._ended.setdefault(uid_frontend(entry.uid), []).append(entry)

    def tokens(self, uids: Uids, tokens: Ints, counts: Ints | None, blocks: Blocks | None = None) -> None:
        """One step's tokens and blocks, in row order; counts None: one per row."""
        frontends = uids // _STRIDE
        if uids.size and not np.count_nonzero(frontends != frontends[0]):
            self._put(int(frontends[0]), uids, tokens, counts, blocks)
        else:
            of_token = frontends if counts is None else np.repeat(frontends, counts)
            for frontend in np.unique(frontends).tolist():
                mine = frontends == frontend
                part = None if counts is None else counts[mine]
                his = None if blocks is None else blocks.of(mine)
                self._put(frontend, uids[mine], tokens[of_token == frontend], part, his)
        self._flush()

    def _put(self, frontend: int, uids: Uids, tokens: Ints, counts: Ints | None, blocks: Blocks | None) -> None:
        ended = tuple(self._ended.pop(frontend, ()))
        packed = None if counts is None or bool((counts == 1).all()) else counts.tobytes()
        data, sizes = (blocks.data, blocks.sizes.tobytes()) if blocks and blocks.data else (b"", None)
        message = Tokens(self._generation, uids.tobytes(), tokens.tobytes(), packed, ended, data, sizes)
        self._messages.append((frontend, message))

    def _flush(self) -> None:
        for frontend, entries in self._ended.items():
            self._messages.append((frontend, Tokens(self._generation, b"", b"", None, tuple(entries))))
        self._ended.clear()

    def drain(self) -> list[tuple[int, Tokens]]:
        """All that is to be sent, as (frontend, message), oldest first."""
        self._flush()
        messages, self._messages = self._messages, []
        return messages
