"""The directory of a server's sockets: private, held while any of its processes lives, removed after the last one.

The launcher removes its directory when it ends. If it was killed, the next server does. A server holds its directory by
locking it (flock(2)); the children share the lock because they inherit the descriptor. So if the lock is free, nobody
uses the directory.
"""

import contextlib
import fcntl
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

from nmoe.errors import LaunchError

_log = logging.getLogger("nmoe.launch")
PREFIX = "nmoe-run-"
_YOUNG_S = 60.0  # grace period: a new directory may not be locked yet


@contextlib.contextmanager
def run_dir() -> Iterator[pathlib.Path]:
    """A new directory in TMPDIR, mode 0700, for the lifetime of the context. First removes those that nobody holds.

    Raises LaunchError if no directory can be made.
    """
    with _make() as folder:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield pathlib.Path(folder)
        finally:
            os.close(lock)


def _make() -> tempfile.TemporaryDirectory[str]:
    try:
        parent = pathlib.Path(tempfile.gettempdir())  # TMPDIR, or the first of the usual ones that can be written
        _sweep(parent)
        return tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent)
    except OSError as error:
        raise LaunchError(
            f"no folder for sockets can be made: {error.strerror}; set TMPDIR to a folder that you may write"
        ) from None


def _sweep(parent: pathlib.Path) -> None:
    """Remove directories left behind by this user's killed servers."""
    for folder in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):  # already gone, or not ours
            if _is_stale(folder):
                shutil.rmtree(folder)
                _log.info("removed %s, which a killed server left behind", folder)


def _is_stale(folder: pathlib.Path) -> bool:
    """Whether nobody holds `folder`. Raises OSError if it cannot be opened, BlockingIOError if it is held."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _YOUNG_S:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    finally:
        os.close(descriptor)
