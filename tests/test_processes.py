"""The process boundary with real processes: start, refuse to start, stop, drain. Nothing may be left behind."""

import asyncio
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import psutil
import pytest

from nmoe import ipc, launch
from nmoe.__main__ import main
from nmoe.errors import LaunchError
from nmoe.run_dir import PREFIX, run_dir
from tests.checkpoints import make_checkpoint
from tests.forking import fork_call
from tests.serving import READY, Server, write_config


def _run_dirs() -> set[pathlib.Path]:
    return {path for path in pathlib.Path(tempfile.gettempdir()).glob("nmoe-*") if (path / "workers").exists()}


@pytest.fixture
def start(checkpoint: pathlib.Path) -> Iterator[Callable[..., Server]]:
    """Starts servers that the test ends in its own way."""
    servers: list[Server] = []

    def start(**server: Any) -> Server:
        servers.append(Server({"model": {"path": str(checkpoint)}, "server": {"port": 0, **server}}))
        return servers[-1].start()

    yield start
    for each in servers:
        each.close()


def _stream_body(server: Server, max_tokens: int) -> dict:
    return {"model": server.model, "prompt": [1, 2, 3], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_every_process_and_leaves_nothing(start: Callable[..., Server], signum: int) -> None:
    before = _run_dirs()
    server = start()
    family = server.family()
    assert len(family) == 4  # launcher, scheduler, worker, frontend
    assert len(_run_dirs() - before) == 1
    assert server.stop(signum) == 0, server.output
    assert psutil.wait_procs(family, timeout=1)[1] == []
    assert not _run_dirs() - before
    assert server.output.count(READY) == 1
    assert "Traceback" not in server.output


def test_children_die_with_a_killed_launcher(start: Callable[..., Server]) -> None:
    server = start()
    family = server.family()
    server.stop(signal.SIGKILL)
    assert psutil.wait_procs(family, timeout=5)[1] == []


def _hold_run_dir(parent: str) -> None:
    tempfile.tempdir = parent
    with run_dir() as folder:
        sys.stdout.write(f"{folder}\n")
        sys.stdout.flush()
        time.sleep(60)


def test_what_a_killed_server_leaves_is_removed_by_the_next(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outputs = [tmp_path / name for name in ("killed", "alive")]
    holders = [fork_call(_hold_run_dir, str(tmp_path), output=output) for output in outputs]
    try:
        while not all(output.exists() and output.read_text() for output in outputs):
            time.sleep(0.01)
        killed, alive = (pathlib.Path(output.read_text().strip()) for output in outputs)
        holders[0].kill(signal.SIGKILL)
        holders[0].wait(5)
        with run_dir():
            assert killed.exists()  # it is so young that it may be about to be locked
        for folder in (killed, alive):
            (folder / "workers").touch()
            os.utime(folder, (0, 0))
        with run_dir() as own:
            assert not killed.exists() and alive.exists() and own.exists()
        assert not own.exists()
    finally:
        for holder in holders:
            holder.end()


def test_a_server_whose_sockets_were_removed_ends_with_the_reason(start: Callable[..., Server]) -> None:
    """By a cleaner of TMPDIR. Open links live on, but what is restarted would wait for its own forever."""
    server = start()
    family = server.family()
    held = [fd.readlink() for fd in pathlib.Path(f"/proc/{server.process.pid}/fd").iterdir()]
    (folder,) = (path for path in held if path.name.startswith(PREFIX))
    shutil.rmtree(folder)
    server.find("frontend 0").kill()
    assert server.process.wait(10) == 1
    assert f"nmoe: {folder} is gone" in server.output and "Traceback" not in server.output
    assert psutil.wait_procs(family, timeout=1)[1] == []


def test_a_machine_without_a_folder_for_sockets_is_a_message(tmp_path: pathlib.Path, monkeypatch) -> None:
    """As in a container whose file system is read-only."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(LaunchError, match="No such file or directory; set TMPDIR"), run_dir():
        pass


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", "| true", "2>&1 | true", "> /dev/full 2>&1"])
def test_nobody_has_to_read_what_the_server_prints(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, redirection
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = write_config(tmp_path, {"model": {"path": str(checkpoint)}, "server": {"port": port}})
    command = f"exec {sys.executable} -m nmoe.serve --config {config} {redirection}"
    with subprocess.Popen(["bash", "-c", command], start_new_session=True) as shell:
        try:
            _wait_for_health(port)
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(10)


def _wait_for_health(port: int) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                assert response.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_two_servers_run_side_by_side(server: Server, checkpoint: pathlib.Path) -> None:
    with Server({"model": {"path": str(checkpoint)}}) as second:
        for url in (server.url, second.url):
            with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
                assert response.status == 200


async def test_sigterm_lets_running_streams_finish(start: Callable[..., Server]) -> None:
    server = start()
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/completions", json=_stream_body(server, 400)) as stream,
    ):
        await stream.content.readline()
        server.process.kill(signal.SIGTERM)
        rest = (await stream.content.read()).decode()
    assert '"finish_reason":"length"' in rest
    assert rest.rstrip().endswith("data: [DONE]")
    assert server.process.wait() == 0


@pytest.mark.parametrize("name", ["worker 0", "frontend 0"])
async def test_a_hung_process_does_not_hold_up_the_drain(start: Callable[..., Server], name: str) -> None:
    """Others would wait for it until the timeout."""
    server = start(drain_timeout_s=60)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/completions", json=_stream_body(server, 1000)) as stream,
    ):
        await stream.content.readline()
        server.find(name).suspend()
        server.process.kill(signal.SIGTERM)
        with contextlib.suppress(aiohttp.ClientError):  # if its frontend is what hangs
            assert '"error"' in (await stream.content.read()).decode()
    assert server.process.wait(10) == 0
    assert f"{name} has not answered" in server.output


async def test_a_second_signal_ends_at_once(start: Callable[..., Server]) -> None:
    server = start(drain_timeout_s=60)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/completions", json=_stream_body(server, 1000)) as stream,
    ):
        await stream.content.readline()
        server.process.kill(signal.SIGTERM)
        await asyncio.sleep(0.05)
        server.process.kill(signal.SIGTERM)
        rest = (await stream.content.read()).decode()
    assert '"error"' in rest
    assert "[DONE]" not in rest
    assert server.process.wait(10) == 0


def test_an_idle_server_uses_no_cpu(checkpoint: pathlib.Path) -> None:
    parallel = {"world_size": 8, "device": "cpu"}
    with Server({"model": {"path": str(checkpoint)}, "parallel": parallel, "server": {"processes": 2}}) as server:
        family = server.family()
        time.sleep(0.5)

        def cpu_seconds() -> float:
            return sum(process.cpu_times().user + process.cpu_times().system for process in family)

        before = cpu_seconds()
        time.sleep(4)
        assert cpu_seconds() - before <= 0.04 + 0.01  # 1% of a core, and the clock's tick


def test_the_demo_is_ready_within_twelve_seconds() -> None:
    """As a newcomer starts it: a fresh interpreter, no configuration but the port, which must be free here."""
    config = pathlib.Path("nmoe/demo/demo.toml").resolve()
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "demo.toml"
        text = config.read_text().replace('path = "."', f"path = {json.dumps(str(config.parent))}")
        copy.write_text(text + ("\nport = 0\n" if "[server]" in text else "\n[server]\nport = 0\n"))
        begin = time.monotonic()
        command = [sys.executable, "-m", "nmoe.serve", "--config", str(copy)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline().startswith(READY)
                assert time.monotonic() - begin < 12
            finally:
                process.terminate()
            assert process.wait(10) == 0


# ------------------------------------------------------------------------------------------- refusing to start


def _refusal(tmp_path: pathlib.Path, sections: dict) -> str:
    """What a server says that does not start; it must say it within seconds and exit with 1."""
    output = tmp_path / "output"
    begin = time.monotonic()
    child = fork_call(main, ["serve", "--config", str(write_config(tmp_path, sections))], output=output)
    assert child.wait(10) == 1
    assert time.monotonic() - begin < 5
    text = output.read_text()
    assert READY not in text
    assert "Traceback" not in text
    return text


def test_a_wrong_configuration_names_every_problem(tmp_path: pathlib.Path) -> None:
    text = _refusal(tmp_path, {"model": {"path": "x"}, "engine": {"page_sise": 16, "max_batch_size": "many"}})
    assert "page_sise" in text
    assert "page_size" in text
    assert "max_batch_size" in text


@pytest.fixture
def broken(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the default checkpoint to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


def test_a_folder_too_deep_for_sockets_is_refused() -> None:
    launch._check_run_dir(pathlib.Path("/tmp/nmoe-run-12345678"))
    with pytest.raises(LaunchError, match="set TMPDIR to a shorter folder"):
        launch._check_run_dir(pathlib.Path("/tmp/" + "d" * 100))


def test_more_shared_memory_than_there_are_addresses_is_a_message() -> None:
    for size in (1 << 60, 1 << 70):
        with pytest.raises(LaunchError, match=r"GiB of addresses .* lower \[engine\] max_prefill_tokens"):
            ipc.sparse_memory(size)


def test_a_missing_shard_is_named(tmp_path: pathlib.Path) -> None:
    folder = make_checkpoint(tmp_path / "sharded", shards=2)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.unlink()
    assert shard.name in _refusal(tmp_path, {"model": {"path": str(folder)}})


def test_a_wrong_shape_is_named(broken: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["moe_intermediate_size"] += 8
    (broken / "config.json").write_text(json.dumps(config))
    assert "mlp.experts" in _refusal(tmp_path, {"model": {"path": str(broken)}})


def test_an_absent_tokenizer_is_named_with_the_remedy(broken: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (broken / "tokenizer.json").unlink()
    assert "tokenizer.json" in _refusal(tmp_path, {"model": {"path": str(broken)}})


def test_experts_that_do_not_divide_are_refused(tmp_path: pathlib.Path) -> None:
    folder = make_checkpoint(tmp_path / "odd", n_routed_experts=9, n_group=1, topk_group=1)
    text = _refusal(tmp_path, {"model": {"path": str(folder)}, "parallel": {"world_size": 2, "device": "cpu"}})
    assert "9" in text
    assert "world_size" in text


def test_a_taken_port_is_refused(server: Server, checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    port = int(server.url.rpartition(":")[2])
    text = _refusal(tmp_path, {"model": {"path": str(checkpoint)}, "server": {"port": port}})
    assert str(port) in text
