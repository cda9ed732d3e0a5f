"""The launcher: runs the doctor, binds the port, forks the processes, supervises, drains.

    doctor -> bind HTTP port -> fork scheduler, workers, frontends -> every child Up -> ready line
           -> SIGTERM or SIGINT -> drain -> stop

The death of any child ends the server: frontends close their streams with an error, every process leaves, and the
launcher exits non-zero with the reason.
"""

import logging
import pathlib
import socket
import sys
import tempfile
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from nmoe import doctor, envs, ipc
from nmoe.children import Child, Children, Died, Event, Said, Signalled
from nmoe.config import Config
from nmoe.errors import LaunchError
from nmoe.metrics import Board

_log = logging.getLogger("nmoe.launch")
_BACKLOG = 4096  # connections that may wait while a frontend is busy
_GRACE_S = 5.0  # how long a child may take to leave when told to


def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises NmoeError when the server cannot start or a process of it dies."""
    doctor.require(config)
    envs.set_for_children(config)
    with (
        _bind(config.server.host, config.server.port) as http_socket,
        tempfile.TemporaryDirectory(prefix="nmoe-") as run_dir,
    ):
        server = _Server(config, http_socket, pathlib.Path(run_dir))
        try:
            server.run()
        finally:
            server.children.stop(_GRACE_S)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise LaunchError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; set [server] host and port to a free address"
        ) from None


class _Server:
    """One server's processes, from the first fork to the last reap."""

    def __init__(self, config: Config, http_socket: socket.socket, run_dir: pathlib.Path) -> None:
        self.children = Children()
        self._config = config
        self._http_socket = http_socket
        self._run_dir = run_dir
        self._board = Board(1 + config.parallel.world_size + config.server.processes)

    def run(self) -> None:
        """The whole life of the server; returns when it was told to stop and has drained."""
        self._fork_all()
        if self._wait_until_up():
            host, port = self._config.server.host, self._http_socket.getsockname()[1]
            sys.stdout.write(f"nmoe ready on http://{f'[{host}]' if ':' in host else host}:{port}\n")
            sys.stdout.flush()
            self._supervise()
            self._drain()

    def _fork_all(self) -> None:
        self._fork("scheduler", 0)
        for rank in range(self._config.parallel.world_size):
            self._fork("worker", rank)
        for index in range(self._config.server.processes):
            self._fork("frontend", index)

    def _fork(self, role: ipc.Role, index: int) -> None:
        ours, theirs = ipc.Control.pair()
        boot = ipc.Boot(
            role=role,
            index=index,
            generation=1,
            config=self._config,
            run_dir=self._run_dir,
            control=theirs,
            board=self._board,
            http_socket=self._http_socket if role == "frontend" else None,
        )
        self.children.spawn(boot, ours)

    def _wait_until_up(self) -> bool:
        """True when every child does its work, False when a signal came first."""
        missing = {child.title for child in self.children}
        with _LoadingBars() as bars:
            while missing:
                for event in self._events():
                    match event:
                        case Signalled():
                            return False
                        case Said(child, ipc.Up()):
                            missing.discard(child.title)
                        case Said(child, ipc.Progress() as progress):
                            bars.show(child, progress)
        return True

    def _supervise(self) -> None:
        while not any(isinstance(event, Signalled) for event in self._events()):
            pass

    def _drain(self) -> None:
        """Refuse new requests and let the running ones finish; a second signal or the timeout ends the wait."""
        timeout = self._config.server.drain_timeout_s
        _log.info("draining: running requests have %.0f s to finish; a second signal ends at once", timeout)
        open_frontends = {child.title for child in self.children if child.role == "frontend"}
        for child in self.children:
            if child.role == "frontend":
                child.control.send(ipc.Drain())
        deadline = time.monotonic() + timeout
        while open_frontends and (left := deadline - time.monotonic()) > 0:
            for event in self._events(left):
                if isinstance(event, Signalled):
                    return
                if isinstance(event, Said) and isinstance(event.message, ipc.Drained):
                    open_frontends.discard(event.child.title)

    def _events(self, timeout: float | None = None) -> list[Event]:
        """The children's events; a failure or a death is raised."""
        events = self.children.events(timeout)
        for event in events:
            match event:
                case Said(_, ipc.Failed(message)):
                    raise LaunchError(message)
                case Died(child, how):
                    raise LaunchError(f"{child.title} {how}; the server stops")
        return events


class _LoadingBars:
    """One progress bar per worker that loads, on standard error."""

    def __init__(self) -> None:
        # No refresh thread: the launcher forks and must stay single-threaded.
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_LoadingBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, child: Child, progress: ipc.Progress) -> None:
        """Move the bar of `child`."""
        key = f"{child.title}: {progress.what}"
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(key, total=progress.total)
        self._progress.update(self._tasks[key], completed=progress.done)
        self._progress.refresh()
