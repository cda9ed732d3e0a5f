"""Deaths under load: every open request ends once and soon, what died restarts, and nothing piles up."""

import asyncio
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

import aiohttp
import psutil
import pytest

from nmoe.children import Child, Children, Died, Said, _told
from nmoe.ipc import Control, Failed, Role
from nmoe.metrics import Board, row_index
from nmoe.supervision import MAX_TRIES, Supervisor
from tests.forking import fork_call
from tests.killing import BACK_S, STREAMS, kill, recovered
from tests.serving import Server

END_S = 5.0  # from a death to the end of the last stream


@pytest.fixture(scope="module")
def server(checkpoint: pathlib.Path) -> Iterator[Server]:
    """One server of two workers that survives all the deaths of this file."""
    parallel = {"world_size": 2, "device": "cpu"}
    with Server({"model": {"path": str(checkpoint)}, "parallel": parallel}) as running:
        yield running


@pytest.mark.parametrize("name", ["worker 1", "scheduler", "frontend 0"])
async def test_a_death_ends_every_stream_once_and_the_server_comes_back(server: Server, name: str) -> None:
    before = len(server.family())
    ends, ended, _ = await kill(server, name, signal.SIGKILL)
    assert ends == ["lost" if name == "frontend 0" else "error"] * STREAMS
    assert ended < END_S
    assert len(server.family()) == before
    metrics = server.metrics()
    assert metrics["nmoe:num_requests_running"] == metrics["nmoe:num_requests_waiting"] == 0


async def test_a_worker_that_hangs_is_as_good_as_dead(server: Server) -> None:
    ends, ended, _ = await kill(server, "worker 0", signal.SIGSTOP)
    assert ends == ["error"] * STREAMS
    assert ended < 2 * END_S


async def test_health_says_so_while_the_engine_restarts(server: Server) -> None:
    server.find("worker 0").kill()
    unhealthy = False
    deadline = time.monotonic() + BACK_S
    while not (unhealthy and server.healthy()):
        assert time.monotonic() < deadline
        unhealthy |= not server.healthy()


async def test_many_deaths_leave_nothing_behind(server: Server) -> None:
    def held() -> list[tuple[str, int]]:
        return sorted((process.name(), process.num_fds()) for process in server.family())

    async def settled() -> list[tuple[str, int]]:
        """What is held for a second; a connection that has just been closed is gone by then."""
        seen = [held()]
        while len(seen) < 6 or len({tuple(each) for each in seen[-6:]}) > 1:
            assert len(seen) < 100
            await asyncio.sleep(0.2)
            seen.append(held())
        return seen[-1]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        before = await settled()
        for _ in range(3):
            for name in ("worker 0", "scheduler", "frontend 0"):
                server.find(name).kill()
                await recovered(session, server, time.monotonic())
                await asyncio.sleep(0.6)  # sooner would count as dying again at once
    assert await settled() == before


@pytest.mark.parametrize(
    ("role", "silence", "loading", "dies"),
    [
        ("worker", 4, False, False),
        ("worker", 6, False, True),
        ("worker", 50, True, False),
        ("worker", 70, True, True),
        ("frontend", 15, True, False),
        ("frontend", 25, True, True),
    ],
)
def test_who_says_nothing_is_killed_once(role: Role, silence: float, loading: bool, dies: bool) -> None:
    """Also while it loads, though a restart gives more time: others may be waiting for it, and clients for a frontend,
    which loads less."""
    with subprocess.Popen(["sleep", "60"]) as process:
        ours, theirs = Control.pair()
        child = Child(role, 0, 1, f"{role} 0", process.pid, os.pidfd_open(process.pid), ours)
        board = Board(3)
        supervisor = Supervisor([child], board, 1, lambda role, index: None)
        if loading:
            supervisor._loading.add(child.title)
        board.rows[row_index(role, 0, 1)].set("nmoe:heartbeat_seconds", time.monotonic() - silence)
        supervisor.kill_silent()
        assert (child.pid in supervisor._killed) == dies
        assert bool(select.select([child.pidfd], [], [], 5 if dies else 0.1)[0]) == dies
        process.kill()
        os.close(child.pidfd)
        ours.close()
        theirs.close()


def test_a_failure_that_names_no_utf8_is_told() -> None:
    ours, theirs = Control.pair()
    theirs.send(Failed(_told("/models/\udcff: cannot be read")))
    assert ours.receive() == Failed(r"/models/\udcff: cannot be read")
    ours.close()
    theirs.close()


def test_nobody_is_killed_for_the_time_in_which_all_were_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-Z, or in a container that is paused; when all go on, the launcher may be the first."""
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: killed.append(pid))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    ours, theirs = Control.pair()
    board = Board(3)
    supervisor = Supervisor([Child("worker", 0, 1, "worker 0", 1234, -1, ours)], board, 1, lambda role, index: None)
    board.rows[row_index("worker", 0, 1)].set("nmoe:heartbeat_seconds", now)
    board.rows[row_index("scheduler", 0, 1)].set("nmoe:step_deadline_seconds", now + 30)
    for pause in (600, 0.5, 1, 1, 1, 1):
        now += pause
        supervisor.kill_silent()
        assert not killed
    now += 1  # whoever still says nothing has had its time
    supervisor.kill_silent()
    assert killed == [1234]
    ours.close()
    theirs.close()


def test_a_restart_waits_for_the_last_of_the_dead_without_spinning() -> None:
    """Processes with much memory take seconds to die, and their deaths wake the launcher."""
    started: list[tuple[Role, int]] = []
    with subprocess.Popen(["sleep", "60"]) as process:
        ours, theirs = Control.pair()
        dead, dying = (Child("worker", rank, 1, f"worker {rank}", process.pid, -1, ours) for rank in (0, 1))
        children = [dead, dying]
        supervisor = Supervisor(children, Board(4), 2, lambda role, index: started.append((role, index)))
        children.remove(dead)
        supervisor.handle(Died(dead, "was killed by SIGKILL"))  # kills the other, which has not been reaped yet
        supervisor._restart_due()
        assert not started and supervisor._timeout() > 0.1
        children.remove(dying)
        assert supervisor._timeout() == 0
        supervisor._restart_due()
        assert started == [("worker", 0), ("worker", 1)]
        ours.close()
        theirs.close()


def test_a_child_that_takes_long_to_die_is_waited_for_asleep() -> None:
    """The kernel closes its end of the link before it has let go of a GPU's memory."""
    assert fork_call(_wait_for_a_slow_death).wait(30) == 0  # Children takes the signals of the process that it is in


def _wait_for_a_slow_death() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        ours, theirs = Control.pair()
        children = Children()
        children._alive.append(Child("worker", 0, 1, "worker 0", process.pid, os.pidfd_open(process.pid), ours))
        theirs.send(Failed("why"))
        theirs.close()
        (said,), began = children.events(10), time.monotonic()
        nothing, slept = children.events(0.2), time.monotonic() - began
        process.kill()
        (died,) = children.events(10)
        assert isinstance(said, Said) and said.message == Failed("why") and isinstance(died, Died)
        assert nothing == [] and slept > 0.1


def test_what_keeps_dying_ends_the_server_with_the_reason(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    doomed = shutil.copytree(checkpoint, tmp_path / "doomed")
    server = Server({"model": {"path": str(doomed)}}).start()
    try:
        family = server.family()
        (doomed / "config.json").write_text(json.dumps({"model_type": "nothing"}))
        server.find("worker 0").kill()
        assert server.process.wait(30) == 1
        assert server.output.count("worker 0 exited with code 1") == MAX_TRIES
        assert f"gave up after {MAX_TRIES} restarts" in server.output
        assert "'nothing' is not supported" in server.output
        assert psutil.wait_procs(family, timeout=1)[1] == []
    finally:
        server.close()
