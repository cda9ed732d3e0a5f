"""The server's metrics: one board of numbers in anonymous shared memory, one row per process.

The launcher creates the board before it forks, so every process has it. A process writes only its own row, and any
process can read all rows: no messages, no locks, and a restarted process continues from its row's values. A frontend
renders the whole board for /metrics, in Prometheus' text format. Names follow vLLM's, with the prefix `nmoe:`.
"""

import bisect
import mmap
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Spec(msgspec.Struct, frozen=True):
    """One metric. `labels` are the values of the label `label`, each with its own series."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str = ""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    exposed: bool = True  # False: for internal use between processes
    by_rank: bool = False  # a histogram observed only by workers: one series per worker, labelled `rank`

    @property
    def width(self) -> int:
        """Cells per series. A histogram has its buckets, +Inf and the sum."""
        return len(self.buckets) + 2 if self.kind == "histogram" else 1


def _seconds(name: str, text: str) -> Spec:
    return Spec(name, "histogram", text, buckets=SECONDS)


SPECS = (
    Spec("nmoe:num_requests_running", "gauge", "Requests in the running batches"),
    Spec("nmoe:num_requests_waiting", "gauge", "Requests in the queue"),
    Spec("nmoe:kv_cache_usage_perc", "gauge", "Share of the KV pages held or cached-and-in-use, 0 to 1"),
    Spec("nmoe:prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache"),
    Spec("nmoe:prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache"),
    Spec("nmoe:prefix_cache_evictions", "counter", "Cached pages given up for new ones"),
    Spec("nmoe:num_preemptions", "counter", "Requests preempted for lack of pages"),
    Spec("nmoe:prompt_tokens", "counter", "Prompt tokens of admitted requests"),
    Spec("nmoe:generation_tokens", "counter", "Tokens generated"),
    Spec(
        "nmoe:request_success",
        "counter",
        "Requests ended, by reason",
        "finished_reason",
        ("stop", "length", "abort", "error"),
    ),
    Spec("nmoe:unread_messages", "counter", "Messages to frontends that had stopped reading: lost, or late"),
    Spec("nmoe:steps", "counter", "Steps completed"),
    _seconds("nmoe:step_time_seconds", "From a step's launch to its last result"),
    Spec("nmoe:iteration_tokens_total", "histogram", "Tokens computed in a step, all ranks", buckets=TOKENS),
    Spec(
        "nmoe:rank_iteration_tokens", "histogram", "Tokens that a rank computed in a step", buckets=TOKENS, by_rank=True
    ),
    _seconds("nmoe:request_queue_time_seconds", "From arrival to the first scheduled token"),
    _seconds("nmoe:request_prefill_time_seconds", "From the first scheduled to the first new token"),
    _seconds("nmoe:request_decode_time_seconds", "From the first new token to the last"),
    _seconds("nmoe:request_time_per_output_token_seconds", "Between two tokens of a request, the mean of all"),
    _seconds("nmoe:request_inference_time_seconds", "From the first scheduled token to the last new one"),
    Spec("nmoe:request_prompt_tokens", "histogram", "Prompt tokens of a request", buckets=TOKENS),
    Spec("nmoe:request_generation_tokens", "histogram", "Tokens generated for a request", buckets=TOKENS),
    Spec("nmoe:request_max_num_generation_tokens", "histogram", "Tokens of a request's longest answer", buckets=TOKENS),
    Spec("nmoe:request_params_max_tokens", "histogram", "Tokens that a request may generate", buckets=TOKENS),
    Spec("nmoe:request_params_n", "histogram", "Answers that a request asks for per prompt", buckets=TOKENS[:8]),
    _seconds("nmoe:time_to_first_token_seconds", "From arrival to the first new token"),
    _seconds("nmoe:inter_token_latency_seconds", "Between two tokens of a request"),
    _seconds("nmoe:e2e_request_latency_seconds", "From arrival to the end"),
    Spec("nmoe:num_tasks", "gauge", "Tasks in the frontends' event loops: one per connection, few besides"),
    Spec("nmoe:heartbeat_seconds", "gauge", "When the process last said it lives, on CLOCK_MONOTONIC", exposed=False),
    Spec("nmoe:step_deadline_seconds", "gauge", "When the oldest step is overdue; 0: none is due", exposed=False),
)
_BY_NAME = {spec.name: spec for spec in SPECS}
_OFFSETS: dict[str, int] = {}
_ROW = 0
for _spec in SPECS:
    _OFFSETS[_spec.name] = _ROW
    _ROW += _spec.width * max(1, len(_spec.labels))


class Row:
    """One process's cells. Only that process writes to them."""

    def __init__(self, cells: "memoryview[float]") -> None:
        self._cells = cells

    def add(self, name: str, value: float = 1.0, label: str = "") -> None:
        """Increment a counter."""
        self._cells[_cell(name, label)] += value

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._cells[_OFFSETS[name]] = value

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Record `value` in a histogram `times` times."""
        buckets = _BY_NAME[name].buckets
        first = _OFFSETS[name]
        self._cells[first + bisect.bisect_left(buckets, value)] += times
        self._cells[first + len(buckets) + 1] += value * times

    def get(self, name: str, label: str = "") -> float:
        """The current value of a counter or gauge."""
        return self._cells[_cell(name, label)]


def _cell(name: str, label: str) -> int:
    return _OFFSETS[name] + (_BY_NAME[name].labels.index(label) if label else 0)


class Board:
    """The shared memory behind all rows."""

    def __init__(self, num_rows: int) -> None:
        self._memory = mmap.mmap(-1, max(num_rows * _ROW * 8, mmap.PAGESIZE))
        cells = memoryview(self._memory).cast("d")
        self.rows = [Row(cells[i * _ROW : (i + 1) * _ROW]) for i in range(num_rows)]

    def total(self, name: str, label: str = "") -> float:
        """The sum over all processes."""
        return sum(row.get(name, label) for row in self.rows)

    def collect(self) -> Iterator[Metric]:
        """All metrics, summed over processes: a custom collector for prometheus_client's exposition."""
        for spec in SPECS:
            if spec.exposed:
                yield self._family(spec)

    def _family(self, spec: Spec) -> Metric:
        if spec.by_rank:
            histogram = HistogramMetricFamily(spec.name, spec.help, labels=["rank"])
            for index, row in enumerate(self.rows):
                counts, total = _histogram(spec, [row])
                if counts[-1][1]:
                    histogram.add_metric([str(index - row_index("worker", 0, 0))], counts, total)
            return histogram
        if spec.kind == "histogram":
            counts, total = _histogram(spec, self.rows)
            return HistogramMetricFamily(spec.name, spec.help, buckets=counts, sum_value=total)
        family = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
        if not spec.labels:
            return family(spec.name, spec.help, value=self.total(spec.name))
        metric = family(spec.name, spec.help, labels=[spec.label])
        for value in spec.labels:
            metric.add_metric([value], self.total(spec.name, value))
        return metric


def _histogram(spec: Spec, rows: Sequence[Row]) -> tuple[list[tuple[str, float]], float]:
    """The cumulative counts by upper bound, and the sum, over `rows`."""
    first = _OFFSETS[spec.name]
    cells = [sum(row._cells[first + i] for row in rows) for i in range(spec.width)]
    counts, running = [], 0.0
    for bound, count in zip([*map(str, map(float, spec.buckets)), "+Inf"], cells, strict=False):
        running += count
        counts.append((bound, running))
    return counts, cells[-1]


def row_index(role: str, index: int, world_size: int) -> int:
    """The index of a process's row: the scheduler first, then workers by rank, then frontends."""
    return {"scheduler": 0, "worker": 1 + index, "frontend": 1 + world_size + index}[role]
