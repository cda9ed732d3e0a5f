"""The soak of benchmarks/soak.py in small: about 20 seconds of random load on two workers, and nothing is left of it.

It is the suite's longest test. What leaks once per request shows after some hundred of them, since pages, slots,
descriptors, threads and tasks are counted exactly. Only the growth of memory needs minutes; two of them would be half
of the time that the whole suite may take, so `make soak` has them, and `make soak MINUTES=20` goes before a release.
"""

from benchmarks import soak
from tests.serving import Server

SECONDS = 15.0


def test_nothing_is_left_of_random_load(checkpoint):
    sections = {
        "model": {"path": str(checkpoint)},
        "parallel": {"world_size": 2, "device": "cpu"},
        "engine": soak.ENGINE,
    }
    with Server(sections) as server:
        result = soak.run(server, SECONDS, clients=16)
        assert server.healthy()
    assert result["requests"] > 40  # on a machine that is free it is ten times as many
    assert soak.failures(result) == []
    assert result["longest_stall_s"] < 5
