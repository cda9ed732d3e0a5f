"""A batch's progress, on standard error: a bar on a terminal, otherwise a line now and then."""

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_log = logging.getLogger("nmoe.batch")
_LINE_S = 30.0  # between two lines if there is no terminal


class Tally:
    """Counts of lines, with those of earlier runs, and of this run's tokens."""

    def __init__(self, num_lines: int, done: int, errors: int) -> None:
        self.num_lines = num_lines
        self.done = done
        self.errors = errors
        self.tokens = 0  # of prompts and outputs, in this run
        self.begun = time.monotonic()

    def restart_clock(self) -> None:
        """Restart the clock, now that the engine is ready."""
        self.begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the engine was ready."""
        return time.monotonic() - self.begun

    @property
    def rate(self) -> float:
        """Tokens per second of this run."""
        return self.tokens / max(self.seconds, 1e-9)

    def add(self, *, ok: bool, tokens: int) -> None:
        """Count one more finished line."""
        self.done += 1
        self.errors += not ok
        self.tokens += tokens


class Display:
    """Shows a tally; a context manager."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._done_before = tally.done
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, auto_refresh=False, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("lines", total=tally.num_lines, completed=tally.done)
        self._next_line = time.monotonic() + _LINE_S

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        self._bar.stop()

    def show(self) -> None:
        """Update the display."""
        tally = self._tally
        counts = f"{tally.rate:,.0f} tokens/s, {tally.errors} errors"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=tally.done, description=counts)
            self._bar.refresh()
        elif time.monotonic() >= self._next_line:
            self._next_line += _LINE_S
            # Logged, because a line that cannot be written (full disk, pipe without a reader) must not end a batch.
            _log.info("%d of %d lines, %s%s", tally.done, tally.num_lines, counts, self._left())

    def _left(self) -> str:
        tally = self._tally
        if not (recent := tally.done - self._done_before):
            return ""
        return f", {(tally.num_lines - tally.done) * tally.seconds / recent:,.0f} s left"
