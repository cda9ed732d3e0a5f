"""The launcher: runs the doctor, binds the port, forks the processes, supervises, drains.

    doctor -> bind HTTP port -> fork scheduler, workers, frontends -> every child Up -> ready line
           -> supervise until SIGTERM, SIGINT or SIGHUP -> drain -> stop

A process that fails before the ready line aborts the start with its message; for deaths after it, see
`nmoe/supervision.py`.
"""

import logging
import mmap
import os
import pathlib
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from nmoe import doctor, envs, ipc
from nmoe.arena import ArenaLayout
from nmoe.checkpoint import open_checkpoint
from nmoe.children import Child, Children, Died, Said, Signalled
from nmoe.config import Config
from nmoe.config_json import read_architecture
from nmoe.errors import LaunchError
from nmoe.metrics import Board, row_index
from nmoe.printing import printing
from nmoe.run_dir import run_dir
from nmoe.slab import ControlLayout, SlabLayout, make_slabs
from nmoe.supervision import LOOK_S, Supervisor

_log = logging.getLogger("nmoe.launch")
_BACKLOG = 4096  # pending connections while a frontend is busy
_SOCKET_PATH = 107  # bytes in the path of a Unix socket (sun_path)
_GRACE_S = 5.0  # how long a child may take to exit when told to


def serve(config: Config) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP. Raises NmoeError if the server cannot start or keeps losing a process."""
    doctor.require(config)
    envs.set_for_children(config)
    host, port = config.server.host, config.server.port
    with _bind(host, port) as http_socket, run_dir() as folder:
        address = f"{f'[{host}]' if ':' in host else host}:{http_socket.getsockname()[1]}"
        _serve_on(config, http_socket, folder, lambda: print_line(f"nmoe ready on http://{address}\n"))


def serve_privately(config: Config, announce: Callable[[pathlib.Path], None]) -> None:
    """Like `serve`, on a Unix socket in the run directory, which only this user can reach. `announce` is called with
    its path once it serves. [server] host, port and api_keys have no effect."""
    server = msgspec.structs.replace(config.server, port=0, api_keys=())
    config = msgspec.structs.replace(config, server=server)
    doctor.require(config)
    envs.set_for_children(config)
    with run_dir() as folder, socket.socket(socket.AF_UNIX) as http_socket:
        _check_run_dir(folder)
        path = folder / "http"
        http_socket.bind(str(path))
        http_socket.listen(_BACKLOG)
        _serve_on(config, http_socket, folder, lambda: announce(path))


def _serve_on(config: Config, http_socket: socket.socket, folder: pathlib.Path, announce: Callable[[], None]) -> None:
    _check_run_dir(folder)
    server = _Server(config, http_socket, folder)
    try:
        server.run(announce)
    finally:
        server.children.stop(_GRACE_S)


def print_line(line: str) -> None:
    """Print a line for anyone waiting for it; failing to print must end neither a server nor a batch."""
    try:
        with printing():
            sys.stdout.write(line)
    except OSError as error:
        _log.warning("standard output cannot be written (%s): %s", error.strerror, line.strip())


def _check_run_dir(folder: pathlib.Path) -> None:
    address = ipc.frontend_address(folder).removeprefix("ipc://")
    if len(os.fsencode(address)) > _SOCKET_PATH:
        raise LaunchError(
            f"{folder}: too long a path for a socket in it; set TMPDIR to a shorter folder, /tmp for example"
        )


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise LaunchError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; set [server] host and port to a free address"
        ) from None


def slabs_for(config: Config) -> mmap.mmap | None:
    """The memory shared by several workers: on the CPU they exchange tokens through it; on GPUs they only use it to
    learn of failures."""
    if config.parallel.world_size == 1:
        return None
    if config.parallel.device == "cuda":
        return ControlLayout(config.parallel.world_size).make()
    checkpoint = open_checkpoint(config)
    return make_slabs(SlabLayout.of(checkpoint.architecture, checkpoint.dtype, config))


class _Server:
    """One server's processes, from the first fork to the last reap."""

    def __init__(self, config: Config, http_socket: socket.socket, run_dir: pathlib.Path) -> None:
        self.children = Children()
        self._config = config
        self._http_socket = http_socket
        self._run_dir = run_dir
        self._board = Board(1 + config.parallel.world_size + config.server.processes)
        self._slabs = slabs_for(config)
        self._arena = ArenaLayout.of(read_architecture(config.model.path), config.parallel.world_size).make()
        self._lives: Counter[tuple[ipc.Role, int]] = Counter()

    def run(self, announce: Callable[[], None]) -> None:
        """The server's whole life; returns once it has been told to stop and has drained."""
        self._fork("scheduler", 0)
        for rank in range(self._config.parallel.world_size):
            self._fork("worker", rank)
        for index in range(self._config.server.processes):
            self._fork("frontend", index)
        if not self._wait_until_up():
            return
        announce()
        supervisor = Supervisor(self.children, self._board, self._config.parallel.world_size, self._fork)
        supervisor.run()
        self._drain(supervisor)

    def _fork(self, role: ipc.Role, index: int) -> None:
        """Start a process's next life. Raises LaunchError if it could reach nobody."""
        if not self._run_dir.exists():
            raise LaunchError(
                f"{self._run_dir} is gone, and {role} {index} could not reach the others without the sockets in it;"
                " keep what cleans this folder away, or set TMPDIR to another"
            )
        self._lives[role, index] += 1
        ours, theirs = ipc.Control.pair()
        boot = ipc.Boot(
            role=role,
            index=index,
            generation=self._lives[role, index],
            config=self._config,
            run_dir=self._run_dir,
            control=theirs,
            board=self._board,
            http_socket=self._http_socket if role == "frontend" else None,
            slabs=self._slabs if role == "worker" else None,
            arena=None if role == "scheduler" else self._arena,
        )
        # Count its silence from now, not from its predecessor's last heartbeat.
        row = self._board.rows[row_index(role, index, self._config.parallel.world_size)]
        row.set("nmoe:heartbeat_seconds", time.monotonic())
        self.children.spawn(boot, ours)

    def _wait_until_up(self) -> bool:
        """True once every child is up, False if a signal comes first. Raises LaunchError on a failure or death."""
        missing = {child.title for child in self.children}
        with _LoadingBars() as bars:
            while missing:
                for event in self.children.events(None):
                    match event:
                        case Signalled():
                            return False
                        case Said(_, ipc.Failed(message)):
                            raise LaunchError(message)
                        case Died(child, how):
                            raise LaunchError(f"{child.title} {how} while starting")
                        case Said(child, ipc.Up()):
                            missing.discard(child.title)
                        case Said(child, ipc.Progress() as progress):
                            bars.show(child, progress)
        return True

    def _drain(self, supervisor: Supervisor) -> None:
        """Reject new requests and let running ones finish; a second signal or the timeout ends the wait."""
        timeout = self._config.server.drain_timeout_s
        _log.info("draining: running requests have %.0f s to finish; a second signal ends at once", timeout)
        draining = [child for child in self.children if child.role == "frontend"]
        for child in draining:
            child.control.send(ipc.Drain())
        deadline = time.monotonic() + timeout
        while draining and (left := deadline - time.monotonic()) > 0:
            events = self.children.events(min(left, LOOK_S))
            supervisor.kill_silent()  # else its requests, or a frontend, would keep the others waiting
            for event in events:
                match event:
                    case Signalled():
                        return
                    case Said(child, ipc.Drained()) if child in draining:
                        draining.remove(child)
                    case Died(child, _) if child in draining:
                        draining.remove(child)
                    case _:
                        supervisor.handle(event)  # other processes must still be told of a death


class _LoadingBars:
    """One progress bar per loading worker, on standard error if it is a terminal. Otherwise only the full bars would
    show, and a write that fails (disk full, pipe without a reader) must not abort the start."""

    def __init__(self) -> None:
        # No refresh thread: the launcher forks, so it must stay single-threaded.
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_LoadingBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, child: Child, progress: ipc.Progress) -> None:
        """Update the bar of `child`."""
        key = f"{child.title}: {progress.what}"
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(key, total=progress.total)
        self._progress.update(self._tasks[key], completed=progress.done)
        self._progress.refresh()
