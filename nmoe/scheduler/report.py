"""The scheduler's row on the metrics board. See nmoe/metrics.py for the names."""

from nmoe.metrics import Row
from nmoe.scheduler.scheduler import Scheduler

_STEP_S = 30.0  # allowed per step: kernels are compiled on first use
_TOKEN_S = 0.005  # allowed in addition per token of the step


class Report:
    """Copies the policy's counters to the board.

    Counters continue from where the previous life left them. Its gauges and step deadline are reset: a deadline that
    nobody will meet would get the workers killed.
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
        """Publish the heartbeat."""
        self._row.set("nmoe:heartbeat_seconds", now)

    def set_deadline(self, policy: Scheduler | None) -> None:
        """Publish when the oldest step in flight must complete."""
        flight = policy.oldest if policy else None
        deadline = flight.started_at + _STEP_S + _TOKEN_S * flight.num_tokens if flight else 0.0
        if deadline != self._deadline:
            self._deadline = deadline
            self._row.set("nmoe:step_deadline_seconds", deadline)

    def add_unread(self, count: int) -> None:
        """Count messages that found a frontend's link full."""
        self._row.add("nmoe:unread_messages", count)

    def update(self, policy: Scheduler) -> None:
        """Publish everything else."""
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
