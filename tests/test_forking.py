"""The tests' own facility: processes forked from a preloaded zygote."""

import os
import signal
import socket
import sys

import pytest
import torch

from nmoe.ipc import Control, Up
from tests.forking import fork_call


def _matmul(size):
    assert "torch" in sys.modules
    torch.set_num_threads(2)
    ones = torch.ones(size, size)
    assert (ones @ ones).sum().item() == size**3
    sys.stdout.write("computed\n")
    return 7


def _echo(control, sock):
    control.send(Up())
    sock.sendall(sock.recv(100).upper())


def _fail():
    raise ValueError("on purpose")


def _sleep():
    signal.pause()


def test_torch_computes_in_a_child_after_the_parent_used_its_thread_pool(tmp_path):
    torch.ones(512, 512) @ torch.ones(512, 512)
    children = [fork_call(_matmul, 512, output=tmp_path / f"{i}") for i in range(3)]
    assert [child.wait() for child in children] == [7, 7, 7]
    assert all((tmp_path / f"{i}").read_text() == "computed\n" for i in range(3))


def test_sockets_travel_also_inside_objects():
    ours, theirs = Control.pair()
    near, far = socket.socketpair()
    child = fork_call(_echo, theirs, far)
    theirs.close()
    far.close()
    near.sendall(b"hello")
    assert near.recv(100) == b"HELLO"
    assert child.wait() == 0
    assert ours.receive() == Up()
    assert near.recv(1) == b"", "the child's end must be the only one left"
    near.close()
    ours.close()


def test_an_exception_is_printed_and_exits_1(tmp_path):
    child = fork_call(_fail, output=tmp_path / "out")
    assert child.wait() == 1
    assert "ValueError: on purpose" in (tmp_path / "out").read_text()


def test_a_running_child_can_be_waited_for_and_killed():
    child = fork_call(_sleep)
    assert child.running
    with pytest.raises(TimeoutError):
        child.wait(0.01)
    assert os.getsid(child.pid) == child.pid
    child.kill(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
    assert child.end() == -signal.SIGTERM
