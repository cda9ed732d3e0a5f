"""The engine behind a batch: the very processes of `nmoe serve`, on a socket of their own.

The launcher is forked before this process imports or starts anything that a fork would not survive. It leads a session
of its own, so that Ctrl-C reaches the batch alone, which ends it in order; and it is told to stop when the batch dies.
"""

import asyncio
import ctypes
import os
import pathlib
import signal
import sys
from typing import NoReturn

from nmoe.config import Config
from nmoe.errors import LaunchError, NmoeError
from nmoe.launch import serve_privately

_PR_SET_PDEATHSIG = 1
_LEAVE_S = 20.0  # how long it may take to end when nothing is running


class Engine:
    """A launcher that was forked. `path` is where it serves, once `ready` has returned."""

    def __init__(self, config: Config) -> None:
        """Fork the launcher. Call it while this process has only one thread."""
        parent = os.getpid()
        self._news, theirs = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._news)
            _become(config, theirs, parent)
        os.close(theirs)
        self._pidfd = os.pidfd_open(self._pid)
        self._status: int | None = None
        self.ended = asyncio.Event()
        self.path = ""

    async def ready(self) -> None:
        """Wait until it serves. Raises LaunchError if it ends instead, after it said why."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pidfd, self._reap)
        told = asyncio.Event()
        loop.add_reader(self._news, told.set)
        await told.wait()
        loop.remove_reader(self._news)
        self.path = os.read(self._news, 4096).decode()
        os.close(self._news)
        if not self.path:
            await self.ended.wait()
            raise LaunchError(f"the engine did not start ({self.how}); its last message says why")

    @property
    def how(self) -> str:
        """How it ended, in words."""
        status = self._status or 0
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"

    async def stop(self) -> None:
        """Stop it, and wait for it to exit."""
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.ended.is_set():
                return
            signal.pidfd_send_signal(self._pidfd, signum)
            try:
                async with asyncio.timeout(_LEAVE_S):
                    await self.ended.wait()
            except TimeoutError:
                continue

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._pidfd)
        self.ended.set()


def _become(config: Config, news: int, parent: int) -> NoReturn:
    """The launcher's whole life."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above took effect
            os._exit(1)

        def announce(path: pathlib.Path) -> None:
            os.write(news, os.fsencode(path))
            os.close(news)

        serve_privately(config, announce)
        code = 0
    except NmoeError as error:
        sys.stderr.write(f"nmoe: {error}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
