"""`nmoe serve` and `python -m nmoe.serve`: the one command a user needs."""

import argparse
import importlib.resources
import sys

from nmoe import doctor, launch
from nmoe.config import Config, load_config
from nmoe.errors import NmoeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nmoe serve`."""
    parser.add_argument("--config", metavar="X.toml", help="the configuration; without it the embedded demo is served")
    parser.add_argument("--doctor", action="store_true", help="only run the preflight checks, like `nmoe doctor`")
    parser.add_argument("--json", action="store_true", help="with --doctor: print the checks as JSON")


def configuration(path: str | None) -> Config:
    """The configuration at `path`, or the embedded demo's if None."""
    if path is not None:
        return load_config(path)
    with importlib.resources.as_file(importlib.resources.files("nmoe") / "demo" / "demo.toml") as demo:
        return load_config(demo)


def run(arguments: argparse.Namespace) -> int:
    """Serve, or run the checks with --doctor. Returns the exit code. Raises NmoeError."""
    if arguments.json and not arguments.doctor:
        raise NmoeError("--json is for the checks; add --doctor, or leave it out to serve")
    config = configuration(arguments.config)
    if arguments.doctor:
        return doctor.run(config, as_json=arguments.json)
    launch.serve(config)
    return 0


if __name__ == "__main__":
    from nmoe.__main__ import main

    sys.exit(main(["serve", *sys.argv[1:]]))
