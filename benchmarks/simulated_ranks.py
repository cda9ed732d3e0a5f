"""A rank without a GPU: it answers every Step over the real link with random tokens, a given time after its beginning.

Like a device, it works in order: a step begins when it has arrived and the previous step is done. If it arrives later
than that, the time from the end of the previous step to its arrival is what the control plane adds to it; sums of these
waits, and of the bytes on the link, go to shared memory that the benchmark reads.
"""

import ctypes
import mmap
import time

import msgspec
import numpy as np
import zmq

from nmoe import ipc
from nmoe.messages import ROW_SAMPLES, Ready, SchedulerToWorker, StepDone
from nmoe.metrics import row_index

FIELDS = ("steps", "waited", "late", "step_bytes", "done_bytes")  # counts, seconds (`waited`) and bytes since the start
# Set before the ranks are forked.
step_seconds = 0.015
num_pages = 1 << 14
token_ids = range(260, 1024)  # those of the demo's tokenizer that are plain text of more than one byte
NUM_WAITS = 1024  # kept per rank, the newest
waits = mmap.mmap(-1, 8 * NUM_WAITS * 8)  # seconds, float64 [8 ranks, NUM_WAITS], a ring per rank; 0: unused
totals = mmap.mmap(-1, 8 * len(FIELDS) * 8)  # float64 [8 ranks, FIELDS]

_PR_SET_TIMERSLACK = 29
_HEARTBEAT_S = 0.5


def main(boot: ipc.Boot) -> None:
    """Serve as rank `boot.index` until the launcher hangs up."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    with zmq.Context() as context:
        link = ipc.connect_dealer(context, ipc.worker_address(boot.run_dir), boot.index)
        link.send(msgspec.msgpack.encode(Ready(boot.generation, boot.index, num_pages)))
        boot.control.send(ipc.Up())
        try:
            Rank(boot, link).run()
        except EOFError:
            link.close()


class Rank:
    """The loop of one rank."""

    def __init__(self, boot: ipc.Boot, link: "zmq.Socket[bytes]") -> None:
        self._boot, self._link = boot, link
        self._row = boot.board.rows[row_index("worker", boot.index, boot.config.parallel.world_size)]
        self._totals = memoryview(totals).cast("d")[boot.index * len(FIELDS) :]
        self._waits = memoryview(waits).cast("d")[boot.index * NUM_WAITS : (boot.index + 1) * NUM_WAITS]
        self._poller = zmq.Poller()
        self._poller.register(link, zmq.POLLIN)
        self._poller.register(boot.control.fileno(), zmq.POLLIN)
        self._decode = msgspec.msgpack.Decoder(SchedulerToWorker).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._rng = np.random.default_rng(boot.index)
        self._sampling = 0  # rows that sample, in the last step
        self._done_at = 0.0

    def run(self) -> None:
        """Answer Steps until the launcher hangs up, which raises EOFError."""
        while True:
            data = self._next()
            waited = data is None  # no Step was there when the previous one was done
            while data is None:
                self._rest()
                data = self._next()
            while data is not None:
                data, waited = self._compute(data, waited), False

    def _next(self) -> bytes | None:
        try:
            return self._link.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _rest(self) -> None:
        self._row.set("nmoe:heartbeat_seconds", time.monotonic())
        for source, _ in self._poller.poll(_HEARTBEAT_S * 1000):
            if source == self._boot.control.fileno():
                self._boot.control.receive()

    def _compute(self, data: bytes, waited: bool) -> bytes | None:
        """Compute one step. Returns the next one if it arrived before this one was done."""
        came = time.monotonic()
        self._row.set("nmoe:heartbeat_seconds", came)
        step = self._decode(data)
        if step.rows is not None:
            flags = np.frombuffer(step.rows, np.int32).reshape(-1, 4)[:, 3]
            self._sampling = int(np.count_nonzero(flags & ROW_SAMPLES))
        totals = self._totals
        totals[0] += 1
        if waited and came - self._done_at < _HEARTBEAT_S / 10:  # otherwise the engine was idle
            totals[1] += came - self._done_at
            self._waits[int(totals[2]) % NUM_WAITS] = came - self._done_at
            totals[2] += 1
        self._done_at = (came if waited else self._done_at) + step_seconds
        tokens = self._rng.integers(token_ids.start, token_ids.stop, self._sampling, np.int32)
        answer = self._encode(StepDone(self._boot.generation, self._boot.index, step.step_id, tokens.tobytes()))
        totals[3] += len(data)
        totals[4] += len(answer)
        if (left := self._done_at - time.monotonic()) > 0:
            time.sleep(left)
        following = self._next()
        if following is None:
            self._done_at = time.monotonic()
        self._link.send(answer)
        return following
