"""The engine without HTTP: scheduler and workers as `nmoe serve` forks them, and a benchmark in the frontend's place.

Everything crosses the same sockets in the same messages as in a server; only tokenizer, HTTP and SSE are absent.
"""

import pathlib
import tempfile
import time
from types import TracebackType

import msgspec
import numpy as np
import zmq

from nmoe import doctor, envs, ipc
from nmoe.children import Children, Died, Said
from nmoe.config import Config
from nmoe.errors import LaunchError
from nmoe.launch import slabs_for
from nmoe.messages import (
    FrontendToScheduler,
    Hello,
    Rejected,
    Sampling,
    SchedulerToFrontend,
    Serving,
    Submit,
    Tokens,
    make_uid,
)
from nmoe.metrics import Board


class Engine:
    """A running engine, as a context manager; `ready_s` is the time from the first fork until it serves."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._board = Board(2 + config.parallel.world_size)
        self._children = Children()
        self._slabs = slabs_for(config)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(SchedulerToFrontend).decode
        self._submitted = 0
        self.ready_s = 0.0

    def __enter__(self) -> "Engine":
        doctor.require(self._config)
        envs.set_for_children(self._config)
        self._folder = tempfile.TemporaryDirectory(prefix="nmoe-bench-")
        started = time.monotonic()
        self._fork("scheduler", 0)
        for rank in range(self._config.parallel.world_size):
            self._fork("worker", rank)
        self._context = zmq.Context()
        self._link = ipc.connect_dealer(self._context, ipc.frontend_address(pathlib.Path(self._folder.name)), 0)
        self._send(Hello(1))
        while not self._link.poll(50):
            self._watch()
        assert isinstance(self._decode(self._link.recv()), Serving)
        self.ready_s = time.monotonic() - started
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._link.close()
        self._context.term()
        self._children.stop(5.0)
        self._folder.cleanup()

    def _fork(self, role: ipc.Role, index: int) -> None:
        ours, theirs = ipc.Control.pair()
        boot = ipc.Boot(
            role=role,
            index=index,
            generation=1,
            config=self._config,
            run_dir=pathlib.Path(self._folder.name),
            control=theirs,
            board=self._board,
            slabs=self._slabs if role == "worker" else None,
        )
        self._children.spawn(boot, ours)

    def _watch(self) -> None:
        """Raises LaunchError when a process has failed."""
        for event in self._children.events(0):
            match event:
                case Said(_, ipc.Failed(message)):
                    raise LaunchError(message)
                case Died(child, how):
                    raise LaunchError(f"{child.title} {how}")

    def _send(self, message: FrontendToScheduler) -> None:
        self._link.send(self._encode(message))

    def submit(self, prompt: np.ndarray, max_tokens: int) -> int:
        """Submit a greedy request that ignores EOS. Returns its uid."""
        uid = make_uid(0, 1, self._submitted)
        self._submitted += 1
        prompt_bytes = prompt.astype(np.int32).tobytes()
        self._send(Submit(1, uid, prompt_bytes, max_tokens, Sampling(temperature=0.0)))
        return uid

    def receive(self) -> Tokens:
        """The next Tokens message: what one step produced. Raises LaunchError if a process dies or a request fails."""
        while not self._link.poll(1000):
            self._watch()
        message = self._decode(self._link.recv())
        if isinstance(message, Rejected):
            raise LaunchError(f"rejected with {message.status}: {message.detail}")
        assert isinstance(message, Tokens)
        failed = [ended.detail for ended in message.ended if ended.reason == "error"]
        if failed:
            raise LaunchError(f"a request failed: {failed[0]}")
        return message
