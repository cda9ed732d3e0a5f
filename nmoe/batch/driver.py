"""Keeps the engine full: sends lines while there is room, and records their results."""

import asyncio
import concurrent.futures
import pathlib
from collections.abc import Callable, Iterator
from functools import partial

from nmoe.batch.engine import Engine
from nmoe.batch.exchange import Spool, exchange, refused
from nmoe.batch.lines import BadLine, Line, parse_line, read_lines
from nmoe.batch.progress import Display, Tally
from nmoe.batch.results import Result, Results
from nmoe.client import AsyncClient
from nmoe.config import Config
from nmoe.errors import LaunchError, NmoeError

# The tries of a line while the engine keeps failing: for each try, the share of all lines in progress that may be tried
# at the same time (at least one line).
_TRIES = (1, 1, 1 / 16, 0)
_REST_S = 0.5  # before a failed line asks whether the engine is back
_PAUSES_S = (0.05, 2.0)  # after a full queue refused a line: the first pause, and the longest
_FINISH_S = 10.0  # how long running lines may take to finish when the batch is told to stop
_OTHER_FILES = 64  # that this process has open besides those of answers
_SHOW_S = 0.5
_SPOOL_BYTES = 256 << 20  # of logits in memory, for all running lines together
_LEAST_SPOOL = 1 << 16
_TURN = 256  # lines skipped or refused before other tasks get a turn


def room_of(config: Config, max_files: int) -> int:
    """How many answers may be in progress: as many as all ranks can run, and some more that wait, to keep ranks busy.

    An answer may need a connection and two files, out of the `max_files` that a process may have open.
    """
    running = config.parallel.world_size * config.engine.max_batch_size
    room = running + max(1, min(running // 4, config.server.max_queue // 2))
    return max(1, min(room, (max_files - _OTHER_FILES) // 3))


def _no_room(error: OSError) -> NmoeError:
    return NmoeError(
        f"the output cannot be written: {error.strerror or error}; finished lines are kept: make room, and run the same"
        " command again"
    )


def remaining(
    path: pathlib.Path, finished: bytearray, longest: int, profile: str | None
) -> Iterator[Line | BadLine | None]:
    """The lines that are still to be done; None for each line that is finished."""
    with path.open("rb") as file:
        for number, data in read_lines(file, longest, lambda _: None):
            yield None if finished[number] else parse_line(number, data, longest, profile)


class Driver:
    """One run of a batch against a server."""

    def __init__(self, client: AsyncClient, results: Results, tally: Tally, folder: pathlib.Path, room: int) -> None:
        self._client = client
        self._results = results
        self._tally = tally
        self._most = self._room = room
        self._spool = Spool(str(folder), max(_LEAST_SPOOL, _SPOOL_BYTES // room))
        self._running: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()  # there is more room, or it is time to stop
        self._turns = [asyncio.Semaphore(max(1, int(share * room))) for share in _TRIES]
        self._asking = asyncio.Lock()  # held by the one line that asks whether the engine is back
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "results")
        self._stopping = False

    def stop(self) -> None:
        """Send nothing more; running lines have a while to finish, or none after a second call."""
        if self._stopping:
            self._cancel()
        self._stopping = True
        self._changed.set()

    async def run(self, lines: Iterator[Line | BadLine | None], engine: Engine, display: Display) -> None:
        """Do all lines, or those before `stop`. Raises NmoeError if the engine is gone or a file cannot be written."""
        try:
            async with asyncio.TaskGroup() as group:
                besides = [group.create_task(self._watch(engine)), group.create_task(self._show(display))]
                await self._send(lines, group)
                await self._settle()
                for task in besides:
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await self._write(self._results.close)
            self._writer.shutdown()

    async def _send(self, lines: Iterator[Line | BadLine | None], group: asyncio.TaskGroup) -> None:
        for place, line in enumerate(lines):
            if isinstance(line, Line):
                weight = min(line.weight, self._most)
                await self._until(lambda weight=weight: self._room >= weight)  # type: ignore[misc]
            elif place % _TURN == 0:
                await asyncio.sleep(0)
            if self._stopping:
                return
            if isinstance(line, BadLine):
                await self._keep(refused(line))
            elif line is not None:
                self._room -= weight
                task = group.create_task(self._answer(line, weight))
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds, or until `stop` is called."""
        while not condition() and not self._stopping:
            self._changed.clear()
            await self._changed.wait()

    async def _settle(self) -> None:
        """Wait for the running lines, but not for long once the batch is told to stop."""
        await self._until(lambda: not self._running)
        if self._running:
            await asyncio.wait(self._running, timeout=_FINISH_S)
            self._cancel()

    def _cancel(self) -> None:
        for task in self._running:
            task.cancel()

    async def _answer(self, line: Line, weight: int) -> None:
        try:
            await self._keep(await self._ask(line))
        finally:
            self._room += weight
            asyncio.get_running_loop().call_soon(self._changed.set)  # once this task is done

    async def _ask(self, line: Line) -> Result:
        """The line's answer; if the engine fails while computing it, it is asked again.

        If one line makes the engine fail, all lines in progress fail with it. So lines that have seen two failures are
        asked again in smaller groups, and in the end one by one, so that the other lines get their answers. Whoever
        failed gives up its turn only when the engine is back, which would refuse the next one too.
        """
        for turn in self._turns:
            async with turn:
                result = await self._try(line)
                if result.status != 503:
                    break
                await self._until_back()
        return result

    async def _try(self, line: Line) -> Result:
        """One try, which waits until the queue has room for the line."""
        pause, longest = _PAUSES_S
        while True:
            try:
                result = await exchange(self._client, line, self._spool)
            except ConnectionError as error:
                told = {"code": "engine_failed", "message": f"line {line.number}: {error}", "line": line.number}
                return Result(number=line.number, custom_id=line.custom_id, status=503, error=told)
            except OSError as error:  # from the file in which logits are spooled
                raise _no_room(error) from error
            if result.status != 429:
                return result
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _until_back(self) -> None:
        await asyncio.sleep(_REST_S)
        async with self._asking:
            while not await self._client.is_healthy():  # noqa: ASYNC110 - what is asked is in another process
                await asyncio.sleep(_REST_S)

    async def _keep(self, result: Result) -> None:
        await self._write(partial(self._results.add, result))
        self._tally.add(ok=result.ok, tokens=result.num_tokens)

    async def _write(self, work: Callable[[], None]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, work)
        except OSError as error:
            raise _no_room(error) from error

    async def _watch(self, engine: Engine) -> None:
        await engine.ended.wait()
        raise LaunchError(
            f"the engine ended ({engine.how}); finished lines are kept: run the same command again to go on"
        )

    async def _show(self, display: Display) -> None:
        while True:
            display.show()
            await asyncio.sleep(_SHOW_S)
            await self._write(self._results.commit_if_old)
