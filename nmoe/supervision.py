"""How the launcher handles deaths: what restarts together, after what delay, and when to give up.

Processes restart in groups. All workers form one group, because peer addresses and epochs do not survive a death; the
scheduler and each frontend are groups of their own. Everybody else is told of a death at once (`ipc.Gone`):

    frontend i   its connections close by themselves; the scheduler ends its requests
    scheduler    frontends end their streams with an error; workers keep their weights and reconnect
    any worker   the other workers are killed; the scheduler ends every request with an error and waits for new Readys

A group that dies again before it is up, or right after, is restarted with growing delays; after `MAX_TRIES` restarts in
a row the server gives up.
A process whose heartbeat stops, or a worker that misses a step's deadline, is killed, which makes it a death. While the
launcher itself is stopped (Ctrl-Z, a paused container), so are the others: that time is nobody's silence.
"""

import logging
import math
import os
import signal
import time
from collections.abc import Callable

from nmoe.children import Child, Children, Died, Event, Said, Signalled
from nmoe.errors import LaunchError
from nmoe.ipc import Failed, Gone, Role, Up
from nmoe.metrics import Board, row_index

_log = logging.getLogger("nmoe.launch")
MAX_TRIES = 5
_AT_ONCE_S = 0.5  # a group that stays up longer has recovered from whatever killed it
_FIRST_PAUSE_S = 0.2
_MAX_SILENCE_S = 5.0  # heartbeats come every second
# The first heartbeat follows the imports, perhaps from a cold disk; only workers import torch.
_MAX_LOADING_SILENCE_S: dict[Role, float] = {"worker": 60.0, "scheduler": 20.0, "frontend": 20.0}
LOOK_S = 0.5  # how often heartbeats and deadlines are checked
_STOPPED_S = 2.0  # a launcher that has not looked for so long was stopped

Fork = Callable[[Role, int], None]


def group_of(role: Role, index: int) -> str:
    """The name of the group that a process belongs to."""
    return f"frontend {index}" if role == "frontend" else "the workers" if role == "worker" else "the scheduler"


class _Group:
    """A group of processes that restart together."""

    def __init__(self, members: list[tuple[Role, int]]) -> None:
        self.members = members
        self.up_at = time.monotonic()  # when all its members came up; infinity before that
        self.failures = 0  # consecutive deaths
        self.restart_at: float | None = None  # None while it is running

    def died(self, why: str, now: float) -> float:
        """Count a death. Returns the delay before the restart. Raises LaunchError after too many."""
        self.failures = self.failures + 1 if now - self.up_at < _AT_ONCE_S else 1
        if self.failures > MAX_TRIES:
            raise LaunchError(f"{why}; gave up after {MAX_TRIES} restarts in a row")
        pause = 0.0 if self.failures == 1 else _FIRST_PAUSE_S * 2 ** (self.failures - 2)
        self.restart_at = now + pause
        return pause


class Supervisor:
    """Watches the children of a server that is up, and restarts those that die. `fork` starts one process."""

    def __init__(self, children: Children, board: Board, world_size: int, fork: Fork) -> None:
        self._children = children
        self._board = board
        self._world_size = world_size
        self._fork = fork
        self._groups: dict[str, _Group] = {}
        for child in children:
            group = self._groups.setdefault(group_of(child.role, child.index), _Group([]))
            group.members.append((child.role, child.index))
        self._loading: set[str] = set()  # titles of restarted processes that are not up yet
        self._failures: dict[int, str] = {}  # pid -> its failure message
        self._killed: set[int] = set()  # pids that have been killed but not reaped
        self._looked_at = time.monotonic()
        self._awake_since = 0.0  # silence and delays count from here, if it is later

    def run(self) -> None:
        """Supervise until a signal arrives. Raises LaunchError if a group keeps dying."""
        while True:
            events = self._children.events(self._timeout())
            for event in events:
                self.handle(event)  # including those that arrive with a signal: a death must be announced
            if any(isinstance(event, Signalled) for event in events):
                return
            self._restart_due()
            self.kill_silent()

    def handle(self, event: Event) -> None:
        """Handle a child's message or death."""
        match event:
            case Said(child, Up()):
                self._note_up(child)
            case Said(child, Failed(message)):
                self._failures[child.pid] = message
            case Died(child, how):
                self._lost(child, how)

    def _note_up(self, child: Child) -> None:
        self._loading.discard(child.title)
        name = group_of(child.role, child.index)
        if not any(group_of(other.role, other.index) == name for other in self._children if self._is_loading(other)):
            self._groups[name].up_at = time.monotonic()
            _log.info("%s: up again", name)

    def _is_loading(self, child: Child) -> bool:
        return child.title in self._loading

    def _alive(self) -> set[str]:
        """The groups that still have a live process."""
        return {group_of(child.role, child.index) for child in self._children}

    def _timeout(self) -> float:
        """How long to wait for an event, such as the death of a group's last process, before something is due."""
        alive, now = self._alive(), time.monotonic()
        dead = [group.restart_at for name, group in self._groups.items() if name not in alive]
        return max(0.0, min([LOOK_S, *(at - now for at in dead if at is not None)]))

    def _lost(self, child: Child, how: str) -> None:
        name = group_of(child.role, child.index)
        group = self._groups[name]
        self._killed.discard(child.pid)
        message = self._failures.pop(child.pid, "")
        if group.restart_at is not None:
            return  # killed with the rest of its group
        why = f"{child.title} {how}" + (f": {message}" if message else "")
        pause = group.died(why, time.monotonic())
        _log.error("%s; restarting %s%s", why, name, f" in {pause:.1f} s" if pause else "")
        for other in list(self._children):
            if group_of(other.role, other.index) == name:
                os.kill(other.pid, signal.SIGKILL)
            else:
                other.control.send(Gone(child.role, child.index, child.generation))

    def _restart_due(self) -> None:
        alive = self._alive()
        for name, group in self._groups.items():
            if group.restart_at is not None and group.restart_at <= time.monotonic() and name not in alive:
                group.restart_at, group.up_at = None, math.inf
                for role, index in group.members:
                    self._fork(role, index)
                self._loading |= {child.title for child in self._children if group_of(child.role, child.index) == name}

    def kill_silent(self) -> None:
        """Kill hung processes: a death is something that everybody already handles."""
        now = self._look()
        due = self._board.rows[row_index("scheduler", 0, self._world_size)].get("nmoe:step_deadline_seconds")
        if due:
            due = max(due, self._awake_since + _MAX_SILENCE_S)
        for child in self._children:
            if child.pid in self._killed:
                continue  # a process with much memory takes a while to die
            row = self._board.rows[row_index(child.role, child.index, self._world_size)]
            silence = now - max(row.get("nmoe:heartbeat_seconds"), self._awake_since)
            is_loading = self._is_loading(child)
            overdue = child.role == "worker" and 0 < due < now and not is_loading
            if overdue or silence > (_MAX_LOADING_SILENCE_S[child.role] if is_loading else _MAX_SILENCE_S):
                what = "has a step overdue" if overdue else f"has not answered for {silence:.0f} s"
                _log.error("%s %s: killed", child.title, what)
                os.kill(child.pid, signal.SIGKILL)
                self._killed.add(child.pid)

    def _look(self) -> float:
        """The time, noting whether this process has just been stopped for a while."""
        now = time.monotonic()
        if now - self._looked_at > _STOPPED_S:
            self._awake_since = now
        self._looked_at = now
        return now
