"""Sleeping on a word of shared memory, and the one fence the flags need. Linux on x86-64 only.

x86-64 keeps stores in order and loads in order (TSO), and is multi-copy atomic: a core that sees a store also sees
everything its writer did or saw before. An aligned 8-byte store through a memoryview is a single instruction. So rows
followed by a flag need no barrier between them, with two exceptions that `fence` is for: non-temporal stores, which a
large memcpy may use, and a load that must not be reordered before an earlier store.
"""

import ctypes
import errno
import os
import platform
import threading

from nmoe.errors import LaunchError

_SYS_FUTEX = 202
_FUTEX_WAIT = 0  # not the private variant: the word is shared between processes
_FUTEX_WAKE = 1
_LOOK_AGAIN = (errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
_syscall.restype = ctypes.c_long
_lock = threading.Lock()


def require_x86_64() -> None:
    """Raise LaunchError on a machine whose memory model the flags do not support."""
    if platform.machine() != "x86_64":
        raise LaunchError(
            f"workers on the CPU exchange tokens through memory ordered as on x86-64; this machine is"
            f" {platform.machine()}; set [parallel] world_size = 1"
        )


def fence() -> None:
    """Order every earlier load and store of this thread before every later one."""
    with _lock:  # taking a lock is a locked read-modify-write, which is a full barrier on x86-64
        pass


class Nap:
    """A bounded sleep on a word. A Nap belongs to one thread."""

    def __init__(self, seconds: float) -> None:
        self._time = _Timespec(int(seconds), int(seconds % 1 * 1e9))

    def sleep(self, address: int, seen: int) -> None:
        """Sleep until `wake`, but not if the low half of the int64 at `address` no longer equals that of `seen`."""
        if _syscall(_SYS_FUTEX, address, _FUTEX_WAIT, seen & 0xFFFFFFFF, ctypes.byref(self._time)):
            _check(ctypes.get_errno())


def wake(address: int) -> None:
    """Wake the process sleeping on the word at `address`, if any."""
    if _syscall(_SYS_FUTEX, address, _FUTEX_WAKE, 1, None) < 0:
        _check(ctypes.get_errno())


def _check(number: int) -> None:
    if number not in _LOOK_AGAIN:
        raise OSError(number, f"futex: {os.strerror(number)}")
