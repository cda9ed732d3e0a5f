"""What the policy counts. The process copies it to the metrics board, see nmoe/metrics.py."""

import msgspec

from nmoe.messages import Reason
from nmoe.scheduler.flight import Flight
from nmoe.scheduler.request import Request


def _none_ended() -> dict[Reason, int]:
    return {"stop": 0, "length": 0, "abort": 0, "error": 0}


class Stats(msgspec.Struct):
    """Totals since the start, and samples since the last look."""

    prefix_queries: int = 0  # prompt tokens
    prefix_hits: int = 0  # prompt tokens
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    ended: dict[Reason, int] = msgspec.field(default_factory=_none_ended)
    step_times: list[float] = []  # seconds from planning to the last rank's result
    step_tokens: list[int] = []  # all ranks
    queue_times: list[float] = []  # seconds from arrival to the first planned chunk
    prefill_times: list[float] = []  # seconds from there to the first token

    def admitted(self, request: Request, cached: bool) -> None:
        """Count a request that is placed for the first time; `cached` says whether there is a prefix cache."""
        self.prompt_tokens += request.prompt_len
        self.prefix_queries += request.prompt_len if cached else 0
        self.prefix_hits += request.cached_tokens
        self.queue_times.append(request.scheduled_at - request.arrived_at)

    def landed(self, flight: Flight, num_tokens: int, now: float) -> None:
        """Count a completed step, which brought `num_tokens` new tokens."""
        self.steps += 1
        self.generation_tokens += num_tokens
        self.step_times.append(now - flight.planned_at)
        self.step_tokens.append(flight.num_tokens)

    def drain(self) -> "Stats":
        """A copy with the samples, which start anew."""
        copy = msgspec.structs.replace(self, ended=dict(self.ended))
        self.step_times, self.step_tokens, self.queue_times, self.prefill_times = [], [], [], []
        return copy
