"""Whether the server serves: what /health says, and what refuses requests before and after."""

import time
from collections.abc import Iterator

from nmoe.config import Config
from nmoe.errors import RequestError
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

    def require_serving(self) -> int:
        """max_seq_len. Raises RequestError (503) when requests cannot be accepted now."""
        if self.draining:
            raise RequestError("the server is shutting down", status=503, code="shutting_down")
        if self.max_seq_len is None:
            raise RequestError("the model is still loading", status=503, code="loading")
        return self.max_seq_len

    def check(self) -> None:
        """Raises RequestError (503) with the reason when the server is not healthy."""
        self.require_serving()
        now = time.monotonic()
        for title, index in self._rows():
            beat = self._board.rows[index].get("nmoe:heartbeat_seconds")
            if now - beat > _MAX_SILENCE:
                silence = f"has not answered for {now - beat:.0f} s" if beat else "has not started"
                raise RequestError(f"{title} {silence}", status=503, code="unhealthy")

    def _rows(self) -> Iterator[tuple[str, int]]:
        ranks, frontends = self._config.parallel.world_size, self._config.server.processes
        yield "the scheduler", row_index("scheduler", 0, ranks)
        yield from ((f"worker {rank}", row_index("worker", rank, ranks)) for rank in range(ranks))
        yield from ((f"frontend {index}", row_index("frontend", index, ranks)) for index in range(frontends))
