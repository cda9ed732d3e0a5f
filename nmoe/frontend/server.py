"""The frontend process: an event loop connecting HTTP, the scheduler and the launcher.

    listen -> Hello -> Serving: requests are accepted, the launcher hears Up -> Drain: they are refused; Drained when
    the open ones are through -> end-of-file from the launcher: open streams end with an error, the process leaves

When the scheduler dies, its requests end with an error, and Hello goes to its next life.
"""

import asyncio
import concurrent.futures
import gc
import logging
import sys
import time

import uvloop
from aiohttp import web

from nmoe import ipc
from nmoe.checkpoint import eos_ids
from nmoe.config_json import read_architecture
from nmoe.errors import RequestError
from nmoe.frontend.endpoints import Endpoints
from nmoe.frontend.generation import Generations
from nmoe.frontend.health import Health
from nmoe.frontend.http import HttpServer, Router
from nmoe.frontend.link import Link
from nmoe.frontend.prompt import load_prompts
from nmoe.frontend.requests import Requests
from nmoe.frontend.streams import Streams
from nmoe.ipc import Boot
from nmoe.messages import Hello, SchedulerToFrontend, Serving, Tokens
from nmoe.metrics import row_index
from nmoe.trace import Recorder

_log = logging.getLogger("nmoe.frontend")
_THREADS = 4  # for tokenizing, which releases the interpreter lock
_BACKLOG = 4096  # connections that may wait to be accepted
_HEARTBEAT_S = 1.0
_SWITCH_S = 0.001  # after which a busy thread yields to the event loop
_LEAVE_S = 0.5  # how long clients have to read the end of their streams when the server exits


def main(boot: Boot) -> None:
    """Run a frontend process."""
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()  # a full collection that scans everything imported takes as long as ten steps
    uvloop.run(Frontend.run(boot))


class Frontend:
    """The parts of the process. Created by `run`, inside the event loop."""

    def __init__(
        self, boot: Boot, threads: concurrent.futures.Executor, slow_thread: concurrent.futures.Executor
    ) -> None:
        config = boot.config
        architecture = read_architecture(config.model.path)
        eos = eos_ids(config.model.path, architecture)
        self._boot = boot
        self._loop = asyncio.get_running_loop()
        self._row = boot.board.rows[row_index("frontend", boot.index, config.parallel.world_size)]
        self._left = asyncio.Event()
        self._scheduler_generation = 0
        self._up = False
        self._recorder = Recorder(config.trace.record) if config.trace.record else None
        prompts = load_prompts(config, eos, architecture.vocab_size)
        self._health = Health(config, boot.board)
        self._link = Link(ipc.frontend_address(boot.run_dir), boot.index, self._receive)
        self._streams = Streams(boot.index, boot.generation, self._link.send, self._row)
        requests = Requests(config.model_name, config.server.max_body_mb << 20, threads, slow_thread)
        self._generations = Generations(
            boot,
            prompts,
            eos,
            architecture,
            self._health,
            self._streams,
            requests,
            self._recorder,
            self._report_drained,
        )
        self._endpoints = Endpoints(boot, prompts, self._health, requests, self._generations)

    @classmethod
    async def run(cls, boot: Boot) -> None:
        """Serve until the launcher's end of the control link closes."""
        with (
            concurrent.futures.ThreadPoolExecutor(_THREADS, "tokenizer") as threads,
            concurrent.futures.ThreadPoolExecutor(1, "long texts") as slow_thread,
        ):
            await cls(boot, threads, slow_thread)._serve()

    async def _serve(self) -> None:
        router = Router(self._boot.config.server, self._endpoints.routes())
        runner = web.ServerRunner(HttpServer(router), shutdown_timeout=_LEAVE_S)
        await runner.setup()
        assert self._boot.http_socket is not None
        await web.SockSite(runner, self._boot.http_socket, backlog=_BACKLOG).start()
        control = self._boot.control.fileno()
        self._loop.add_reader(control, self._hear_launcher)
        self._link.send(Hello(self._boot.generation))
        beating = asyncio.create_task(self._beat())
        try:
            await self._left.wait()
        finally:
            beating.cancel()
            self._loop.remove_reader(control)
            self._streams.fail_all(RequestError("the server is shutting down", status=503, code="shutting_down"))
            await runner.cleanup()
            self._link.close()
            if self._recorder is not None:
                self._recorder.close()

    async def _beat(self) -> None:
        while True:
            self._row.set("nmoe:heartbeat_seconds", time.monotonic())
            self._row.set("nmoe:num_tasks", len(asyncio.all_tasks()))
            self._streams.catch_up()  # without traffic, nothing else would
            await asyncio.sleep(_HEARTBEAT_S)

    def _receive(self, message: SchedulerToFrontend) -> None:
        if message.generation < self._scheduler_generation:
            return
        if isinstance(message, Tokens):
            self._streams.deliver(message, time.monotonic())
        elif isinstance(message, Serving):
            self._begin(message)
        else:
            self._streams.reject(message)

    def _begin(self, serving: Serving) -> None:
        if serving.generation > self._scheduler_generation:
            self._scheduler_generation = serving.generation
            self._streams.fail_all(RequestError("the engine was restarted", status=503, code="engine_restarted"))
        if not self._up:
            self._up = True
            self._boot.control.send(ipc.Up())
        self._health.begin(serving)

    def _hear_launcher(self) -> None:
        try:
            while (message := self._boot.control.receive()) is not None:
                if isinstance(message, ipc.Drain):
                    self._health.draining = True
                    self._report_drained()
                elif isinstance(message, ipc.Gone):
                    self._mourn(message)
        except EOFError:
            self._health.draining = True
            self._loop.remove_reader(self._boot.control.fileno())
            self._left.set()

    def _mourn(self, gone: ipc.Gone) -> None:
        self._health.note_death(gone)
        if gone.role == "scheduler":
            self._streams.fail_all(RequestError("the engine was restarted", status=503, code="engine_restarted"))
            self._link.reconnect()
            self._link.send(Hello(self._boot.generation))

    def _report_drained(self) -> None:
        if self._health.draining and not self._generations.num_open:
            self._boot.control.send(ipc.Drained())
