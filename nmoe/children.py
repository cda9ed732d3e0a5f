"""The launcher's children: forked, watched through pidfds, reaped, stopped.

A child is forked without exec: it inherits the configuration, the listening socket and the shared memory, and starts in
milliseconds. In return, the launcher must stay single-threaded and must not import torch or numpy; each child imports
what it needs.
"""

import importlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import msgspec

from nmoe.errors import NmoeError
from nmoe.ipc import STOPPING, Boot, Control, ControlMessage, Failed, Role, settle_in

_log = logging.getLogger("nmoe.launch")
_ENTRY = {"frontend": "nmoe.frontend.server", "scheduler": "nmoe.scheduler.process", "worker": "nmoe.worker.process"}
_MOST_TOLD = 4000  # characters of a child's failure message, which must fit one control message


def _told(message: str) -> str:
    """The message as it can be sent: a path in it may have bytes that are no UTF-8."""
    return message[:_MOST_TOLD].encode("utf-8", "backslashreplace").decode()


class Child(msgspec.Struct):
    """A running child process, as its parent sees it."""

    role: Role
    index: int
    generation: int
    title: str
    pid: int
    pidfd: int
    control: Control
    hung_up: bool = False  # it has closed its end of the link and is about to die, which may take a while


class Said(msgspec.Struct, frozen=True):
    """A child has sent a control message."""

    child: Child
    message: ControlMessage


class Died(msgspec.Struct, frozen=True):
    """A child has ended; `how` describes how."""

    child: Child
    how: str


class Signalled(msgspec.Struct, frozen=True):
    """The launcher has received one of the STOPPING signals."""

    signum: int


Event = Said | Died | Signalled


class Children:
    """All live children, and the signals sent to the launcher, as one stream of events."""

    def __init__(self) -> None:
        self._alive: list[Child] = []
        self._signals, wakeup = os.pipe()
        for end in (self._signals, wakeup):
            os.set_blocking(end, False)
        self._wakeup = wakeup
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for signum in STOPPING:
            # SIGHUP stays ignored under nohup. SIGINT does not, because shells ignore it for all jobs started with `&`.
            if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, lambda *_: None)  # the wakeup pipe delivers it

    def __iter__(self) -> Iterator[Child]:
        return iter(self._alive)

    def spawn(self, boot: Boot, control: Control) -> Child:
        """Fork the child that `boot` describes; `control` is the launcher's end of its link."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become(boot, control)
        boot.control.close()
        child = Child(boot.role, boot.index, boot.generation, boot.title, pid, os.pidfd_open(pid), control)
        self._alive.append(child)
        _log.debug("%s is process %d", boot.title, pid)
        return child

    def _become(self, boot: Boot, control: Control) -> NoReturn:
        """Run the child's whole life."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for fd in (self._signals, self._wakeup, *(child.pidfd for child in self._alive)):
                os.close(fd)
            for link in (control, *(child.control for child in self._alive)):
                link.close()
            settle_in(boot)
            importlib.import_module(_ENTRY[boot.role]).main(boot)
            code = 0
        except NmoeError as error:
            boot.control.send(Failed(_told(str(error))))
        except BaseException as error:
            _log.exception("%s failed", boot.title)
            boot.control.send(Failed(_told(f"{type(error).__name__}: {error}")))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # not sys.exit: the parent's stack frames must not be unwound here

    def events(self, timeout: float | None) -> list[Event]:
        """All pending events; if there are none, waits up to `timeout` seconds (None: forever).

        A child's last messages come before its death.
        """
        poller = select.poll()
        poller.register(self._signals, select.POLLIN)
        for child in self._alive:
            if not child.hung_up:  # a closed link always polls as ready
                poller.register(child.control.fileno(), select.POLLIN)
            poller.register(child.pidfd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(None if timeout is None else max(0, timeout * 1000))}
        events: list[Event] = []
        if self._signals in ready:
            events += [Signalled(signum) for signum in os.read(self._signals, 256)]
        for child in list(self._alive):
            if child.control.fileno() in ready or child.pidfd in ready:
                events += self._heard(child)
            if child.pidfd in ready:
                events.append(Died(child, self._reap(child)))
        return events

    @staticmethod
    def _heard(child: Child) -> list[Event]:
        said: list[Event] = []
        try:
            while (message := child.control.receive()) is not None:
                said.append(Said(child, message))
        except EOFError:
            child.hung_up = True  # its death comes through the pidfd
        return said

    def _reap(self, child: Child) -> str:
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        os.close(child.pidfd)
        child.control.close()
        self._alive.remove(child)
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def stop(self, grace: float) -> None:
        """End every child: close its link, wait `grace` seconds for it to exit, then kill it.

        Returns once all are reaped.
        """
        for child in self._alive:
            child.control.shut()
        deadline = time.monotonic() + grace
        while self._alive and (left := deadline - time.monotonic()) > 0:
            self.events(left)
        for child in self._alive:
            _log.warning("%s did not leave within %.0f s: killed", child.title, grace)
            os.kill(child.pid, signal.SIGKILL)
        while self._alive:
            self.events(None)
