"""Whole servers for tests: `nmoe serve` in a process forked from the preloaded zygote, with a TOML file of its own."""

import json
import pathlib
import signal
import tempfile
import time
import urllib.request
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from nmoe.__main__ import main
from tests.forking import Child, fork_call

READY = "nmoe ready on "
_DEFAULTS: dict[str, dict[str, Any]] = {
    "parallel": {"world_size": 1, "device": "cpu"},
    "engine": {"num_pages": 256, "page_size": 16, "max_batch_size": 32, "max_prefill_tokens": 256},
    "server": {"port": 0},
}


def write_config(folder: pathlib.Path, sections: dict[str, dict[str, Any]]) -> pathlib.Path:
    """A TOML file with `sections` over the defaults of the tests."""
    lines = []
    for section in {**_DEFAULTS, **sections}:
        lines.append(f"[{section}]")
        # JSON's strings, numbers, booleans and lists are TOML's too.
        keys = _DEFAULTS.get(section, {}) | sections.get(section, {})
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    path = folder / "config.toml"
    path.write_text("\n".join(lines))
    return path


class Server:
    """A running server; a context manager that starts it, waits for its ready line, and stops it with SIGTERM."""

    def __init__(self, sections: dict[str, dict[str, Any]], start_s: float = 30.0) -> None:
        """`start_s`: how long the start may take."""
        self.sections = sections
        self._start_s = start_s
        self.model = sections["model"].get("name") or pathlib.Path(sections["model"]["path"]).name
        self.url = ""
        self._folder = tempfile.TemporaryDirectory(prefix="nmoe-test-")
        self.output_path = pathlib.Path(self._folder.name) / "output"
        self.process: Child

    def start(self) -> "Server":
        """Fork the server and wait for its ready line."""
        config = write_config(pathlib.Path(self._folder.name), self.sections)
        self.process = fork_call(main, ["serve", "--config", str(config)], output=self.output_path)
        deadline = time.monotonic() + self._start_s
        while not self.url:
            assert self.process.running and time.monotonic() < deadline, f"not ready:\n{self.output}"
            time.sleep(0.01)
            ready = [line for line in self.output.splitlines() if line.startswith(READY)]
            self.url = ready[0].removeprefix(READY) if ready else ""
        return self

    @property
    def output(self) -> str:
        """What the server has printed so far."""
        return self.output_path.read_text() if self.output_path.exists() else ""

    def stop(self, signum: int = signal.SIGTERM, timeout: float = 20.0) -> int:
        """End the server and return its exit code."""
        self.process.kill(signum)
        return self.process.wait(timeout)

    def family(self) -> list[psutil.Process]:
        """The launcher and its children."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def find(self, name: str) -> psutil.Process:
        """The child whose short name is `nmoe {name}`."""
        (process,) = [process for process in self.family() if process.name() == f"nmoe {name}"]
        return process

    def healthy(self) -> bool:
        """Whether /health says 200."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def close(self) -> None:
        """Kill what still runs and remove its files."""
        self.process.end()
        self._folder.cleanup()

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics: 'name' or 'name{label="value"}' -> value; the label `model_name`, which all have, is
        left out."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                assert sample.labels.pop("model_name") == self.model
                labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
                samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
        return samples

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *_: object) -> None:
        try:
            assert self.stop() == 0, self.output
        finally:
            self.close()
