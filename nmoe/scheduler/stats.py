"""The policy's counters. `nmoe/scheduler/report.py` publishes them on the metrics board."""

import msgspec

from nmoe.messages import Reason


def _none_ended() -> dict[Reason, int]:
    return {"stop": 0, "length": 0, "abort": 0, "error": 0}


class Stats(msgspec.Struct):
    """Counts and samples since they were last taken."""

    prefix_queries: int = 0  # prompt tokens
    prefix_hits: int = 0  # prompt tokens
    evictions: int = 0  # pages
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    ended: dict[Reason, int] = msgspec.field(default_factory=_none_ended)
    step_times: list[float] = []  # seconds from when a step could start to the last rank's result
    step_tokens: list[int] = []  # all ranks
    queue_times: list[float] = []  # seconds from arrival to the first planned chunk
    prefill_times: list[float] = []  # seconds from the first planned chunk to the first token
