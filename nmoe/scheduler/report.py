"""The scheduler's row on the metrics board. The names are those of nmoe/metrics.py."""

from nmoe.metrics import Row
from nmoe.scheduler.scheduler import Scheduler

_STEP_S = 30.0  # a step may take this long: kernels are compiled on first use
_TOKEN_S = 0.005  # and this much more for each of its tokens


class Report:
    """Copies what the policy has counted.

    Counters go on from where an earlier life left them. What it said of its requests and of its step in flight is void:
    a deadline that nobody meets any more would have the workers killed.
    """

    def __init__(self, row: Row) -> None:
        self._row = row
        self._deadline = 0.0
        for name in (
            "nmoe:step_deadline_seconds",
            "nmoe:num_requests_running",
            "nmoe:num_requests_waiting",
            "nmoe:kv_cache_usage_perc",
        ):
            row.set(name, 0.0)

    def beat(self, now: float) -> None:
        """Say that the process lives."""
        self._row.set("nmoe:heartbeat_seconds", now)

    def set_deadline(self, policy: Scheduler | None) -> None:
        """Say until when the oldest step in flight must be complete."""
        flight = policy.oldest if policy else None
        deadline = flight.started_at + _STEP_S + _TOKEN_S * flight.num_tokens if flight else 0.0
        if deadline != self._deadline:
            self._deadline = deadline
            self._row.set("nmoe:step_deadline_seconds", deadline)

    def add_unread(self, count: int) -> None:
        """So many messages found a frontend's link full."""
        self._row.add("nmoe:unread_messages", count)

    def update(self, policy: Scheduler) -> None:
        """Everything else."""
        row, stats = self._row, policy.take_stats()
        row.set("nmoe:num_requests_running", policy.num_running)
        row.set("nmoe:num_requests_waiting", policy.num_waiting)
        row.set("nmoe:kv_cache_usage_perc", policy.usage)
        row.add("nmoe:prefix_cache_queries", stats.prefix_queries)
        row.add("nmoe:prefix_cache_hits", stats.prefix_hits)
        row.add("nmoe:prefix_cache_evictions", stats.evictions)
        row.add("nmoe:num_preemptions", stats.preemptions)
        row.add("nmoe:prompt_tokens", stats.prompt_tokens)
        row.add("nmoe:generation_tokens", stats.generation_tokens)
        row.add("nmoe:steps", len(stats.step_times))
        for reason, count in stats.ended.items():
            row.add("nmoe:request_success", count, reason)
        for name, samples in (
            ("nmoe:step_time_seconds", stats.step_times),
            ("nmoe:iteration_tokens_total", stats.step_tokens),
            ("nmoe:request_queue_time_seconds", stats.queue_times),
            ("nmoe:request_prefill_time_seconds", stats.prefill_times),
        ):
            for sample in samples:
                row.observe(name, sample)
