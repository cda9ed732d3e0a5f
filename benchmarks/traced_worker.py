"""A worker that profiles itself: how long its device and its thread are busy in a decode step.

`trace_workers` puts it in the place of every worker that is forked afterwards. For each batch, it times its own thread
over `_TIMED` steps, then traces the device's kernels and copies over `_TRACED` more. All ranks do this, so that none
waits for another that is tracing, and rank 0 reports.
"""

import json
import os
import pathlib
import statistics
import time
from typing import Any

import torch
from torch.autograd import DeviceType

from nmoe import children, ipc
from nmoe.messages import CHANNEL_DECODE, Step
from nmoe.worker import process
from nmoe.worker.runner import Launched

_SETTLING, _TIMED, _TRACED = 4, 10, 10
_WAITS = ("arrive_kernel", "return_kernel")  # of RDEP: wait for peers' rows or sums (the second also pushes its own)
_path = ""


def trace_workers(path: pathlib.Path) -> None:
    """From now on, newly forked workers are traced: rank 0 appends a JSON line to `path` for each batch."""
    global _path
    _path = str(path)
    children._ENTRY["worker"] = __name__


def main(boot: ipc.Boot) -> None:
    """Like `nmoe.worker.process.main`."""
    process.Worker = _TracedWorker  # type: ignore[misc]
    process.main(boot)


class _TracedWorker(process.Worker):
    def __init__(self, boot: ipc.Boot, *arguments: Any) -> None:
        super().__init__(boot, *arguments)
        self._tells = boot.index == 0
        self._batch, self._steps = 0, 0
        self._launches: list[float] = []  # CPU seconds of this thread
        self._reports: list[float] = []
        self._timed: dict[str, float] = {}
        self._launch = self._runner.launch
        self._runner.launch = self._launch_one  # type: ignore[method-assign]
        _profiler().__enter__().__exit__(None, None, None)  # the first profiler takes seconds to start

    def _launch_one(self, step: Step) -> Launched:
        rows = step.num_tokens if step.channel == CHANNEL_DECODE else 0
        if rows != self._batch:
            self._batch, self._steps = rows, 0
        self._steps += bool(rows)
        if self._steps == _SETTLING:
            self._begin, self._launches, self._reports = time.perf_counter(), [], []
        elif self._steps == _SETTLING + _TIMED:
            wall = time.perf_counter() - self._begin
            self._timed = {
                "timed_ms": wall / _TIMED * 1e3,
                "launch_us": statistics.median(self._launches) * 1e6,
                "report_us": statistics.median(self._reports) * 1e6,
                "thread_busy": (sum(self._launches) + sum(self._reports)) / wall,
            }
            self._trace = _profiler()
            self._trace.__enter__()
        elif self._steps == _SETTLING + _TIMED + _TRACED:
            torch.cuda.synchronize()
            self._trace.__exit__(None, None, None)
            record = {"batch": self._batch, **self._timed, **_device_busy(self._trace)}
            if self._tells:
                with open(_path, "a") as file:
                    file.write(json.dumps({key: round(value, 4) for key, value in record.items()}) + os.linesep)
        begin = time.thread_time()
        launched = self._launch(step)
        self._launches.append(time.thread_time() - begin)
        return launched

    def _report(self, launched: Launched) -> None:
        begin = time.thread_time()
        super()._report(launched)
        self._reports.append(time.thread_time() - begin)


def _profiler() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def _device_busy(trace: torch.profiler.profile) -> dict[str, float]:
    """The time from the first kernel to the last, per step, and the share of it in which any kernel runs. With several
    ranks also the share in which a kernel waits for flags, and the share in which only such kernels run."""
    assert trace.profiler is not None
    spans, waits = [], []
    for event in trace.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA and event.duration_ns():
            span = (event.start_ns(), event.start_ns() + event.duration_ns())
            (waits if event.name() in _WAITS else spans).append(span)
    everything = [*spans, *waits]
    whole = max(stop for _, stop in everything) - min(begin for begin, _ in everything)
    busy = _covered(everything)
    told = {"traced_ms": whole / _TRACED / 1e6, "device_busy": busy / whole, "device_events": len(everything) / _TRACED}
    if waits:
        told |= {"waiting": _covered(waits) / whole, "only_waiting": (busy - _covered(spans)) / whole}
    return told


def _covered(spans: list[tuple[int, int]]) -> int:
    """The total time that these spans cover; they may overlap."""
    covered, end = 0, 0
    for begin, stop in sorted(spans):
        covered += max(0, stop - max(begin, end))
        end = max(end, stop)
    return covered
