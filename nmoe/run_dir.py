"""The folder of a server's sockets: private, held while any of its processes lives, and removed after the last.

The launcher removes its folder when it ends. One that was killed cannot, so the next server does it: whoever holds a
folder has it locked (flock(2)), the children hold it with the launcher because they inherit its descriptor, and a lock
that can be had belongs to nobody.
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

_log = logging.getLogger("nmoe.launch")
PREFIX = "nmoe-run-"
_YOUNG_S = 60.0  # a folder may be this old before it is locked


@contextlib.contextmanager
def run_dir() -> Iterator[pathlib.Path]:
    """A new folder in TMPDIR, mode 0700, for as long as the context lasts. Removes those that nobody holds first."""
    parent = pathlib.Path(tempfile.gettempdir())
    _sweep(parent)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent) as folder:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield pathlib.Path(folder)
        finally:
            os.close(lock)


def _sweep(parent: pathlib.Path) -> None:
    """Remove the folders of this user's servers that were killed."""
    for folder in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):  # it is gone meanwhile, or not ours to look at
            if _is_stale(folder):
                shutil.rmtree(folder)
                _log.info("removed %s, which a killed server left behind", folder)


def _is_stale(folder: pathlib.Path) -> bool:
    """Whether nobody holds `folder`. Raises OSError when it cannot be opened, and BlockingIOError when it is held."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _YOUNG_S:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    finally:
        os.close(descriptor)
