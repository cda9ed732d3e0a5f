"""Standard output, which may be a full disk or a pipe that nobody reads."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Flush what is printed within. Raises OSError if it cannot be written; what is printed after that is discarded,
    because Python would try again, and fail, with every line and at its exit."""
    try:
        yield
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
        raise
