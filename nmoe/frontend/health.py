"""Whether the server is healthy: what /health reports, and what refuses requests before and after serving."""

import time
from collections.abc import Iterator

from nmoe.config import Config
from nmoe.errors import RequestError
from nmoe.ipc import Gone
from nmoe.messages import Serving
from nmoe.metrics import Board, row_index

# Every process sets its heartbeat about once a second.
_MAX_SILENCE = 5.0  # seconds


class Health:
    """The state of the server as one frontend knows it."""

    def __init__(self, config: Config, board: Board) -> None:
        self._config = config
        self._board = board
        self.max_seq_len: int | None = None  # None until the engine serves
        self.draining = False
        self._workers = 0  # the generation of workers that is serving, or was last
        self._dead_workers = -1  # the newest generation of workers known to have died
        self._deaths: dict[int, float] = {}  # row on the board -> when its process was reported dead

    def begin(self, serving: Serving) -> None:
        """The engine is serving, unless its workers have died since this was sent."""
        if serving.workers > self._dead_workers:
            self._workers = serving.workers
            self.max_seq_len = serving.max_seq_len

    def note_death(self, gone: Gone) -> None:
        """A process has died; its next life must send a heartbeat before the server is healthy again."""
        self._deaths[row_index(gone.role, gone.index, self._config.parallel.world_size)] = time.monotonic()
        if gone.role == "worker":
            self._dead_workers = max(self._dead_workers, gone.generation)
        # The workers' next life may already serve: the scheduler reports that, whereas this comes from the launcher.
        if gone.role == "scheduler" or self._dead_workers >= self._workers:
            self.max_seq_len = None

    def require_serving(self) -> int:
        """Returns max_seq_len. Raises RequestError (503) if requests cannot be accepted now."""
        if self.draining:
            raise RequestError("the server is shutting down", status=503, code="shutting_down")
        if self.max_seq_len is None:
            raise RequestError("the engine is starting", status=503, code="loading")
        return self.max_seq_len

    def check(self) -> None:
        """Raises RequestError (503) with the reason if the server is not healthy."""
        now = time.monotonic()
        for title, index in self._rows():
            beat = self._board.rows[index].get("nmoe:heartbeat_seconds")
            if beat < self._deaths.get(index, 0.0):
                raise _unhealthy(f"{title} died")
            if now - beat > _MAX_SILENCE:
                raise _unhealthy(
                    f"{title} has not answered for {now - beat:.0f} s" if beat else f"{title} has not started"
                )
        self.require_serving()
        due = self._board.total("nmoe:step_deadline_seconds")  # only the scheduler sets it
        if 0 < due < now:
            raise _unhealthy(f"a step is {now - due:.1f} s overdue")

    def _rows(self) -> Iterator[tuple[str, int]]:
        ranks, frontends = self._config.parallel.world_size, self._config.server.processes
        yield "the scheduler", row_index("scheduler", 0, ranks)
        yield from ((f"worker {rank}", row_index("worker", rank, ranks)) for rank in range(ranks))
        yield from ((f"frontend {index}", row_index("frontend", index, ranks)) for index in range(frontends))


def _unhealthy(why: str) -> RequestError:
    return RequestError(why, status=503, code="unhealthy")
