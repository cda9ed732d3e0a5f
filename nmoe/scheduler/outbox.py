"""Messages to the frontends: one Tokens message per frontend and step, terminal entries included."""

from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from nmoe.messages import Ended, Tokens, make_uid, uid_frontend
from nmoe.scheduler.flight import Blocks
from nmoe.scheduler.slots import Ints

Uids = npt.NDArray[np.int64]

_STRIDE = make_uid(1, 0, 0)  # the uids of one frontend span a range of this length


class Outbox:
    """The results of steps, in order, and the terminal entries since.

    Messages are built only when they are about to be sent: the next Step goes out first and must not be delayed.
    """

    def __init__(self, generation: int) -> None:
        self._generation = generation
        self._landed: list[_Landed] = []
        self._ended: dict[int, list[Ended]] = {}  # by frontend

    def end(self, entry: Ended) -> None:
        """Add a request's terminal entry; its last tokens come with the next `tokens` call at the latest."""
        self._ended.setdefault(uid_frontend(entry.uid), []).append(entry)

    def tokens(self, uids: Uids, tokens: Ints, counts: Ints | None, blocks: Blocks | None = None) -> None:
        """Add one step's tokens and blocks, in row order; counts None: one per row."""
        self._landed.append(_Landed(uids, tokens, counts, blocks, self._ended))
        self._ended = {}

    def drain(self) -> list[tuple[int, Tokens]]:
        """Everything there is to send, as (frontend, message), oldest first."""
        messages = [message for landed in self._landed for message in self._messages(landed)]
        messages += self._rest(self._ended)
        self._landed, self._ended = [], {}
        return messages

    def _messages(self, landed: "_Landed") -> Iterator[tuple[int, Tokens]]:
        uids, tokens, counts, blocks = landed.uids, landed.tokens, landed.counts, landed.blocks
        frontends = uids // _STRIDE
        if uids.size and not np.count_nonzero(frontends != frontends[0]):
            yield self._message(int(frontends[0]), landed)
        else:
            of_token = frontends if counts is None else np.repeat(frontends, counts)
            for frontend in np.unique(frontends).tolist():
                mine = frontends == frontend
                part = None if counts is None else counts[mine]
                his = None if blocks is None else blocks.of(mine)
                row = _Landed(uids[mine], tokens[of_token == frontend], part, his, landed.ended)
                yield self._message(frontend, row)
        yield from self._rest(landed.ended)

    def _message(self, frontend: int, landed: "_Landed") -> tuple[int, Tokens]:
        """The message for `landed`, all of which is `frontend`'s except other frontends' terminal entries."""
        counts, blocks, ended = landed.counts, landed.blocks, tuple(landed.ended.pop(frontend, ()))
        packed = None if counts is None or bool((counts == 1).all()) else counts.tobytes()
        data, sizes = (blocks.data, blocks.sizes.tobytes()) if blocks and blocks.data else (b"", None)
        uids, tokens = landed.uids.tobytes(), landed.tokens.tobytes()
        return frontend, Tokens(self._generation, uids, tokens, packed, ended, data, sizes)

    def _rest(self, ended: dict[int, list[Ended]]) -> list[tuple[int, Tokens]]:
        """The terminal entries that are not accompanied by tokens."""
        return [(each, Tokens(self._generation, b"", b"", None, tuple(entries))) for each, entries in ended.items()]


class _Landed(msgspec.Struct, frozen=True):
    """The results of a step and the terminal entries that go with it, the latter by frontend."""

    uids: Uids
    tokens: Ints
    counts: Ints | None
    blocks: Blocks | None
    ended: dict[int, list[Ended]]
