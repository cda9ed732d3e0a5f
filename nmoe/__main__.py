"""The command line: `nmoe serve`, `nmoe batch` and `nmoe doctor`."""

import argparse
import io
import logging
import os
import sys

from nmoe import __version__, doctor, serve
from nmoe.batch import command as batch
from nmoe.errors import NmoeError


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 success, 1 failed with a message, 2 usage error; a batch has more."""
    parser = argparse.ArgumentParser(prog="nmoe", description=sys.modules["nmoe"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="serve a model over HTTP")
    serve.add_arguments(serving)
    serving.set_defaults(run=serve.run)
    batching = commands.add_parser("batch", help="answer a file of requests", description=batch.__doc__)
    batch.add_arguments(batching)
    batching.set_defaults(run=batch.run)
    examining = commands.add_parser("doctor", help="say what is wrong before the GPUs are touched")
    examining.add_argument("--config", metavar="X.toml", help="the configuration; without it the embedded demo's")
    examining.add_argument("--json", action="store_true", help="print the checks as JSON")
    examining.set_defaults(run=lambda arguments: doctor.run(serve.configuration(arguments.config), arguments.json))
    arguments = parser.parse_args(argv)
    _open_standard_streams()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    try:
        return int(arguments.run(arguments))
    except NmoeError as error:
        sys.stderr.write(f"nmoe: {error}\n")
        return 1


def _open_standard_streams() -> None:
    """Replace streams closed at start (`nmoe serve >&-`); else a socket takes the descriptor, and prints go there. What
    the terminal's encoding lacks is escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the life of the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
