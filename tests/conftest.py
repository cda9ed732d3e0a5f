"""Shared servers and checkpoints: starting one costs a second, so tests share them where they can."""

import errno
import pathlib
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.forking import start_zygote
from tests.serving import Server


def pytest_configure() -> None:
    """Let the zygote import torch while the tests are collected, and leave a core to the servers under test."""
    start_zygote()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The small default checkpoint."""
    from tests.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-deepseek")


@pytest.fixture(scope="session")
def server(checkpoint: pathlib.Path) -> Iterator[Server]:
    """A server of the default checkpoint for tests that leave it as they found it."""
    with Server({"model": {"path": str(checkpoint)}}) as running:
        yield running


@pytest.fixture
def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes files of a suffix unreadable by one of pathlib's methods: who runs the tests may be allowed everything."""

    def forbid(suffix: str, method: str) -> None:
        def forbidden(path, *arguments, **options):
            if path.suffix == suffix:
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, *arguments, **options)

        real = getattr(pathlib.Path, method)
        monkeypatch.setattr(pathlib.Path, method, forbidden)

    return forbid
