"""The engine behind a batch: the same processes as with `nmoe serve`, on a private socket.

The launcher is forked before this process imports or starts anything that would not survive a fork. It leads a session
of its own, so that Ctrl-C reaches only the batch, which then stops the launcher in order; if the batch dies, the kernel
sends the launcher SIGTERM.
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
_LEAVE_S = 20.0  # how long the launcher may take to end when nothing is running


class Engine:
    """A forked launcher. `path` is the socket on which it serves, once `ready` has returned."""

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
    """Run the launcher in the forked process, to its end."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the line above took effect
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
