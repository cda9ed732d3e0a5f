"""A client that needs little CPU: raw sockets and epoll, one process for all its streams.

    python -m benchmarks.sse_client HOST PORT '{"streams": 256, "tokens": 128, "seconds": 5, "warm": 1, "pids": [1, 2]}'

Each stream sends a new request as soon as the last one is answered. After `warm` seconds, the client reads the CPU
times of the processes `pids` and its own counts, and again `seconds` later; the differences, per second, are printed as
one JSON line.
"""

import gc
import json
import random
import select
import socket
import sys
import time
from typing import Any

import numpy as np
import psutil


class Streams:
    """All connections of the client."""

    def __init__(self, host: str, port: int, load: dict[str, Any]) -> None:
        self._tokens, self._streaming = load["tokens"], load.get("stream", True)
        self._rng = random.Random(load.get("seed", 0))
        self._prompt_len = load.get("prompt", 32)
        self._host = host
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._began: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self.events = self.requests = 0
        self.gaps: list[float] = []
        self.firsts: list[float] = []
        for _ in range(load["streams"]):
            sock = socket.create_connection((host, port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            self._sockets[sock.fileno()] = sock
            self._epoll.register(sock.fileno(), select.EPOLLIN)
            self._ask(sock.fileno())

    def _ask(self, fd: int) -> None:
        body = {
            "prompt": [self._rng.randrange(260, 1024) for _ in range(self._prompt_len)],
            "max_tokens": self._tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": self._streaming,
        }
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._sockets[fd].sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self._began[fd] = time.monotonic()
        self._last[fd] = 0.0

    def run(self, seconds: float) -> None:
        """Read for `seconds`."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            for fd, _ in self._epoll.poll(min(0.1, until - now)):
                self._read(fd)

    def _read(self, fd: int) -> None:
        data = self._sockets[fd].recv(1 << 16)
        now = time.monotonic()
        if not data or data.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")):
            raise SystemExit(f"a stream broke: {data[:300]!r}")
        if not self._streaming:
            self.requests += 1
            self.firsts.append(now - self._began[fd])
            self._ask(fd)
            return
        self.events += data.count(b"data: ")
        if self._last[fd]:
            self.gaps.append(now - self._last[fd])
        else:
            self.firsts.append(now - self._began[fd])
        self._last[fd] = now
        if data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n":
            self.events -= 2  # the event with the finish reason, and [DONE]
            self.requests += 1
            self._ask(fd)


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main() -> None:
    """Run the load that the arguments describe."""
    host, port, load = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    gc.disable()
    streams = Streams(host, port, load)
    streams.run(load["warm"])
    streams.gaps.clear()
    streams.firsts.clear()
    events, requests, began = streams.events, streams.requests, time.monotonic()
    cpu = [cpu_seconds(pid) for pid in load["pids"]]
    streams.run(load["seconds"])
    took = time.monotonic() - began
    result = {
        "events_s": (streams.events - events) / took,
        "requests_s": (streams.requests - requests) / took,
        "cpu": [(cpu_seconds(pid) - before) / took for pid, before in zip(load["pids"], cpu, strict=True)],
    }
    for name, values in (("gap_ms", streams.gaps), ("ttft_ms", streams.firsts)):
        if values:
            p50, p99, most = np.percentile(values, (50, 99, 100)) * 1e3
            result[name] = [round(float(value), 2) for value in (p50, p99, most)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
