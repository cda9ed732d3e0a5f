"""Forked test processes that start in milliseconds: a zygote imports torch once per session, and forks for every call.

    child = fork_call(function, *args, output=path)   # function(*args) in a new process; `path` takes stdout and stderr
    child.pid; child.running; child.wait(timeout); child.kill(signal.SIGTERM); child.end()

The function is a module-level one, found by name in the child; the arguments are pickled, and sockets among them (also
inside other objects, such as a `Control`) are passed as descriptors. What it returns becomes the exit status as with
sys.exit (None is 0); an exception prints its traceback and exits 1; `wait` gives -N after signal N, as subprocess does.

Why not fork the test process: once torch has computed, its OpenMP pool exists, and a forked child that computes hangs
in it. The zygote therefore only imports and never computes, and refuses to fork unless it has one thread. Each child
leads its own session, so that a terminal's Ctrl-C passes it by; all die with the zygote, which dies with the tests.
"""

import atexit
import ctypes
import gc
import importlib
import io
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback

PRELOAD = (
    "torch",
    "safetensors.torch",
    "numpy",
    "zmq",
    "msgspec",
    "aiohttp.web",
    "uvloop",
    "tokenizers",
    "jinja2.sandbox",
    "orjson",
    "prometheus_client",
    "rich.progress",
    "psutil",
    "pytest",
)
_MAX_REQUEST = 1 << 17  # bytes: below the default socket buffer, so that a request always fits in one message
_MAX_DESCRIPTORS = 64
_PR_SET_PDEATHSIG = 1

_lock = threading.Lock()
_zygote: "tuple[subprocess.Popen, socket.socket] | None" = None


class Child:
    """A process that `fork_call` started. Its exit status arrives on `_channel`, once."""

    def __init__(self, pid, channel):
        self.pid = pid
        self._channel = channel
        self._status = None

    @property
    def running(self):
        """Whether the process has not ended yet."""
        return self._poll(0) is None

    def wait(self, timeout=30.0):
        """The exit status, or -N after signal N. Raises TimeoutError when the process is still running by then."""
        if self._poll(timeout) is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self._status

    def kill(self, signum=signal.SIGKILL):
        """Send a signal; nothing happens when the process has ended."""
        if self.running:
            os.kill(self.pid, signum)

    def end(self):
        """For teardown: kill the process if it still runs, with everything in its session, and wait for it."""
        if self.running:
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait()

    def _poll(self, timeout):
        if self._status is None and select.select([self._channel], [], [], timeout)[0]:
            data = self._channel.recv(16)
            self._channel.close()
            if not data:
                raise RuntimeError(f"the zygote died before process {self.pid} ended")
            self._status = int(data)
        return self._status


def start_zygote():
    """Start the zygote if there is none; returns at once. Called early, its imports overlap the collection of tests."""
    global _zygote
    with _lock:
        if _zygote is not None:
            return _zygote[1]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # numpy's BLAS would start its threads when it is imported, and the zygote must not have any.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        theirs.close()
        _zygote = process, ours
        atexit.register(_stop_zygote)
        return ours


def _stop_zygote():
    process, requests = _zygote
    requests.close()
    process.wait()


def fork_call(function, *args, output=None, cwd=None, env=None):
    """Run `function(*args)` in a new process and return its Child.

    `output` (a path) takes its stdout and stderr; without it they go where the session's went. `cwd` and `env` (the
    whole environment) are the caller's by default.
    """
    requests = start_zygote()
    descriptors = []
    payload = io.BytesIO()
    where = (os.fspath(cwd) if cwd else os.getcwd(), dict(env if env is not None else os.environ))
    pickle.dump((sys.path, *where, os.fspath(output) if output else None), payload)
    _Pickler(payload, descriptors).dump((function, args))
    assert payload.tell() <= _MAX_REQUEST, f"{payload.tell()} bytes of arguments; pass a file's path instead"
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, _lock:
        socket.send_fds(requests, [payload.getvalue()], [theirs.fileno(), *descriptors])
    pid = channel.recv(16)
    if not pid:
        raise RuntimeError("the zygote died; its traceback is on stderr")
    return Child(int(pid), channel)


class _Pickler(pickle.Pickler):
    """Pickles sockets as positions in the list of descriptors that travel beside the bytes."""

    def __init__(self, file, descriptors):
        super().__init__(file)
        self._descriptors = descriptors

    def persistent_id(self, obj):
        if not isinstance(obj, socket.socket):
            return None
        self._descriptors.append(obj.fileno())
        return len(self._descriptors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, descriptors):
        super().__init__(file)
        self._descriptors = descriptors

    def persistent_load(self, pid):
        return socket.socket(fileno=self._descriptors[pid])


# ------------------------------------------------------------------------------------------------- in the zygote


def _serve(requests):
    """Fork a child per request until the tests are gone. Returns in the children only: what to run, as (bytes, fds)."""
    ended = {}  # pidfd -> (pid, channel)
    while True:
        for fd in select.select([requests, *ended], [], [])[0]:
            if fd is not requests:
                _report(fd, *ended.pop(fd))
                continue
            data, fds, _, _ = socket.recv_fds(requests, _MAX_REQUEST, _MAX_DESCRIPTORS)
            if not data:
                for pid, _ in ended.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            assert len(os.listdir("/proc/self/task")) == 1, "an import of the zygote started a thread; see PRELOAD"
            pid = os.fork()
            if pid == 0:
                _leave_zygote(requests, fds[0], ended)
                return data, fds[1:]
            channel = socket.socket(fileno=fds[0])
            channel.send(b"%d" % pid)
            for inherited in fds[1:]:
                os.close(inherited)
            ended[os.pidfd_open(pid)] = pid, channel


def _report(pidfd, pid, channel):
    """Reap `pid` and tell its caller the exit status, who may have lost interest."""
    os.close(pidfd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with channel:
        try:
            channel.send(b"%d" % status)
        except BrokenPipeError:
            return


def _leave_zygote(requests, channel_fd, ended):
    """In the new child: drop the zygote's descriptors, and die with it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also when the tests themselves run under nohup
    requests.close()
    os.close(channel_fd)
    for pidfd, (_, channel) in ended.items():
        os.close(pidfd)
        channel.close()
    ended.clear()
    os.setsid()


def _run(data, fds):
    """In a child: take the caller's surroundings, then run the function as a program of its own."""
    payload = io.BytesIO(data)
    sys.path, cwd, env, output = pickle.load(payload)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        # As in a new interpreter whose stdout is no terminal: a program that needs to flush has to do it itself.
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    function, args = _Unpickler(payload, fds).load()
    return function(*args)


def _main():
    requests = socket.socket(fileno=int(sys.argv[1]))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the children's collections leave the imported objects, and the pages they share, alone
    work = _serve(requests)
    status = 1
    try:
        sys.exit(_run(*work))
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    _exit(status)


def _exit(status):
    """End as an interpreter does, threads and exit handlers included, but for taking torch's objects apart (0.2 s)."""
    if not isinstance(status, int | None):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((status or 0) & 0xFF)


if __name__ == "__main__":
    _main()
