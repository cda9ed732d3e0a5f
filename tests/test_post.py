"""What a frontend that has stopped reading is told later: against a scripted link. The whole of it: a real process."""

import msgspec
import numpy as np
import pytest

from nmoe import ipc
from nmoe.messages import Ended, Rejected, SchedulerToFrontend, Serving, Tokens, make_uid
from nmoe.outputs import pack
from nmoe.scheduler.cells import LIFE, Cells
from nmoe.scheduler.post import Post

UID = make_uid(0, 3, 1)
SERVING, REJECTED = Serving(1, 100), Rejected(1, UID + 9, 429, "full")


class Link:
    """In place of ipc.route; `outcome` is what happens next, "sent" as long as there is `room`."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(ipc, "route", self.route)
        self.room, self.outcome, self.sent, self.gone = 100, "full", [], []
        self.cells = Cells(1, 8)
        self.post = Post(None, self.cells, self.gone.append)

    def route(self, link, index, data):
        if not self.room:
            return self.outcome
        self.room -= 1
        self.sent.append(msgspec.msgpack.decode(data, type=SchedulerToFrontend))
        return "sent"


@pytest.fixture
def link(monkeypatch):
    return Link(monkeypatch)


def row(uid=UID, ended=(), cells=()):
    block = pack(np.array(cells, np.int32).tobytes(), b"", 0, b"", 0)
    return Tokens(
        1, np.array([uid]).tobytes(), bytes(4), None, ended, block, np.array([len(block)], np.int32).tobytes()
    )


def ends(*entries):
    return Tokens(1, b"", b"", None, entries)


def test_what_loses_nothing_waits_in_its_order(link):
    link.room = 0
    told = [SERVING, ends(Ended(UID, "length")), REJECTED]
    for message in told:
        link.post.send(0, message)
    assert not link.post.cut and link.post.take_unread() == 3
    link.room = 2
    link.post.pay()
    assert link.sent == told[:2]
    link.room = 2
    link.post.send(0, row())
    assert link.sent == [*told, row()] and link.post.take_unread() == 0


def test_nothing_follows_on_a_gap_before_the_error(link):
    link.room = 0
    link.post.send(0, row(ended=(Ended(UID, "stop", 7),)))
    link.room = 100
    link.post.send(0, row(UID + 1))
    link.post.send(0, ends(Ended(UID + 2, "length")))
    assert not link.sent and link.post.cut == {0}
    link.post.send(1, row())
    assert link.sent.pop() == row()
    link.post.send(0, ends(Ended(UID + 1, "error", detail="unread")))
    link.post.settle()
    entries = [entry for message in link.sent for entry in message.ended]
    assert not any(message.uids for message in link.sent) and link.post.take_unread() == 4
    assert [(entry.uid - UID, entry.reason) for entry in entries] == [(0, "error"), (2, "error"), (1, "error")]
    assert (entries[0].status, entries[0].code, entries[0].cached_tokens) == (503, "frontend_stalled", 7)
    link.post.send(0, row())
    assert link.sent[-1] == row()


def test_cells_of_what_is_lost_are_free(link):
    taken = link.cells.take(0, 3)
    link.cells.deliver(np.array(taken, np.int32), np.full(3, UID))
    assert UID // LIFE and link.cells.num_free(0) == 5
    link.room = 0
    link.post.send(0, row(cells=taken))
    assert link.cells.num_free(0) == 8
    link.cells.check()


@pytest.mark.parametrize("goes", [True, False])
def test_who_is_gone_or_begins_anew_is_owed_nothing(link, goes):
    link.room = 0
    link.post.send(0, row(ended=(Ended(UID, "stop"),)))
    link.post.settle()
    if goes:
        link.outcome = "gone"
        link.post.pay()
        assert link.gone == [0]
    else:
        link.post.forget(0)
    link.room = 100
    link.post.send(0, SERVING)
    assert link.sent == [SERVING]
