"""`nmoe batch`: runs many requests from a file against a private engine.

Exit codes: 0 every line was answered; 1 failed, with a message; 2 wrong usage; 3 every line is done, some with errors;
4 stopped before the end. After 1 and 4, the same command continues where it stopped.
"""

import argparse
import asyncio
import pathlib
import resource
import signal
import sys
from collections.abc import Callable

from nmoe.batch.engine import Engine
from nmoe.batch.folder import OUTPUT, Finished, claim, manifest_of, open_folder, recover
from nmoe.batch.lines import longest_line
from nmoe.batch.survey import Survey, survey
from nmoe.config import Config
from nmoe.ipc import STOPPING
from nmoe.launch import print_line
from nmoe.profiles import PROFILES
from nmoe.serve import configuration

DONE, SOME_FAILED, STOPPED = 0, 3, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `nmoe batch`."""
    parser.add_argument("--config", metavar="X.toml", help="the configuration; without it the embedded demo's")
    parser.add_argument("--profile", choices=list(PROFILES), help="the profile of lines that name none")
    parser.add_argument("input", metavar="in.jsonl", type=pathlib.Path, help="OpenAI's batch format")
    parser.add_argument("output", metavar="out/", type=pathlib.Path, help="a new folder, or one that was begun")


def run(arguments: argparse.Namespace) -> int:
    """Run a batch, or the rest of one. Returns the exit code. Raises NmoeError."""
    config = configuration(arguments.config)
    folder: pathlib.Path = arguments.output
    try:
        found = survey(arguments.input, longest_line(config.server.max_body_mb))
        with open_folder(folder):
            claim(folder, manifest_of(found, arguments.profile, config))
            finished = recover(folder, found.last_line)
            if finished.num_lines < found.num_lines:
                max_files = _allow_files()
                return asyncio.run(_compute(arguments, config, found, finished, Engine(config), max_files))
    except KeyboardInterrupt:
        return STOPPED
    _summarise(folder, found.num_lines, finished.num_lines, finished.num_errors, "all done before")
    return SOME_FAILED if finished.num_errors else DONE


def _allow_files() -> int:
    """Raise the open-file limit to the maximum, here and in the engine. Returns the limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most if most != resource.RLIM_INFINITY else sys.maxsize


async def _compute(
    arguments: argparse.Namespace, config: Config, found: Survey, finished: Finished, engine: Engine, max_files: int
) -> int:
    # Only now, because the launcher must be forked before these are imported.
    from nmoe.batch.driver import Driver, remaining, room_of
    from nmoe.batch.progress import Display, Tally
    from nmoe.batch.results import Results
    from nmoe.client import AsyncClient

    loop = asyncio.get_running_loop()
    tally = Tally(found.num_lines, finished.num_lines, finished.num_errors)
    lines = remaining(arguments.input, finished.lines, longest_line(config.server.max_body_mb), arguments.profile)
    try:
        starting = asyncio.create_task(engine.ready())
        _on_stop(loop, starting.cancel)
        try:
            await starting
        except asyncio.CancelledError:
            _summarise(arguments.output, tally.num_lines, tally.done, tally.errors, "stopped before it began")
            return STOPPED
        tally.restart_clock()
        async with AsyncClient(unix_socket=engine.path) as client:
            driver = Driver(
                client, Results(arguments.output, finished), tally, arguments.output, room_of(config, max_files)
            )
            _on_stop(loop, driver.stop)
            with Display(tally) as display:
                await driver.run(lines, engine, display)
    finally:
        await engine.stop()
    speed = f"{tally.tokens:,} tokens in {tally.seconds:.1f} s ({tally.rate:,.0f}/s)"
    _summarise(arguments.output, tally.num_lines, tally.done, tally.errors, speed)
    if tally.done < tally.num_lines:
        return STOPPED
    return SOME_FAILED if tally.errors else DONE


def _on_stop(loop: asyncio.AbstractEventLoop, stop: Callable[[], object]) -> None:
    """Call `stop` when a signal asks this process to stop; SIGHUP stays ignored under nohup."""
    for signum in STOPPING:
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            loop.add_signal_handler(signum, stop)


def _summarise(folder: pathlib.Path, num_lines: int, done: int, errors: int, speed: str) -> None:
    left = f", {num_lines - done} left for the same command" if done < num_lines else ""
    print_line(
        f"nmoe batch: {done} of {num_lines} lines done, {errors} with errors{left}; {speed}; {folder / OUTPUT}\n"
    )
