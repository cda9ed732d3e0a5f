"""Flags between ranks: raising them, waiting for them, and giving up on a rank that stays silent.

Invariants
- An epoch is (life << 40) + n. Each rank counts the exchanges of a life, per channel, all ranks alike; so a flag never
  goes down, and what an earlier life left behind is never enough. A flag line is written by one rank only.
- A rank raises its flag at every rank in both phases of every exchange, with or without rows.
- Nobody goes past an unmet wait before it has poisoned every rank. Whatever is computed from then on may be wrong, but
  it follows the poison: a rank that read any of it, directly or through others, finds its own poison word set when it
  looks afterwards. So a step that ends unpoisoned is right.

A wait first yields the core, since on a busy machine the flag is often one time slice away, then sleeps on the flag's
word. The sleeper says so in the flag's line; only then does the other side pay for a system call. Between the flag's
store and the look at the sleeper's word stands a fence; the kernel looks at the flag again before it lets the sleeper
sleep, with a fence of its own: one of the two sees the other's store.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Callable

from nmoe.errors import PeerSilent
from nmoe.slab import DISPATCH, LINE, NUM_CHANNELS, NUM_PHASES, SlabLayout
from nmoe.worker.rdep import futex

_YIELD_S = 50e-6
_NAP_S = 0.05  # between looks at the clock and at the poison word
_LIFE_BITS = 40
_POISON_BITS = 8  # one per rank
# Words of a flag's line, in units of 8 bytes.
_EPOCH = 0
_TOKENS = 1
_SLEEPS = 2


class Signals:
    """One rank's view of the flag lines and poison words of all slabs."""

    def __init__(self, layout: SlabLayout, memory: mmap.mmap, rank: int) -> None:
        """Raises LaunchError on a machine whose memory order is not known."""
        futex.require_x86_64()
        self._layout = layout
        self._rank = rank
        self._ranks = range(layout.world_size)
        self._words = memoryview(memory).cast("B").cast("q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        # The rank's own flag is its next neighbour's last: nobody is always the last to hear.
        others = [(rank + 1 + step) % layout.world_size for step in self._ranks]
        self._inbox = [
            [[layout.flag(rank, channel, phase, peer) // 8 for peer in self._ranks] for phase in range(NUM_PHASES)]
            for channel in range(NUM_CHANNELS)
        ]
        self._outbox = [
            [[layout.flag(other, channel, phase, rank) // 8 for other in others] for phase in range(NUM_PHASES)]
            for channel in range(NUM_CHANNELS)
        ]
        self._awaited = layout.awaited(rank) // 8
        self._poison = [layout.poison(other) // 8 for other in self._ranks]
        self._nap = futex.Nap(_NAP_S)
        self._life = 0
        self._epochs = [0] * NUM_CHANNELS
        self._bound_s = 0.0
        self._gave_up = False

    def meet(self, life: int, stopped: Callable[[], bool]) -> bool:
        """Begin a life and wait, as long as it takes, until every rank has begun it. False when `stopped()`."""
        self._life, self._gave_up = life, False
        self._epochs = [life << _LIFE_BITS] * NUM_CHANNELS
        epoch = self.next_epoch(0)
        self.raise_flags(0, DISPATCH, epoch, 0)
        for line in self._inbox[0][DISPATCH]:
            while self._words[line] < epoch:
                if stopped():
                    return False
                self._sleep(line, epoch)
        return True

    def next_epoch(self, channel: int) -> int:
        """Number one more exchange on `channel`."""
        self._epochs[channel] += 1
        return self._epochs[channel]

    def set_bound(self, seconds: float) -> None:
        """How long each wait may take from now on."""
        self._bound_s = seconds

    def raise_flags(self, channel: int, phase: int, epoch: int, num_tokens: int) -> None:
        """Tell every rank, this one included, that all this rank wrote before is there."""
        words, lines = self._words, self._outbox[channel][phase]
        futex.fence()
        for line in lines:
            words[line + _TOKENS] = num_tokens
            words[line + _EPOCH] = epoch
        futex.fence()
        for line in lines:
            if words[line + _SLEEPS]:
                futex.wake(self._address + 8 * line)

    def wait(self, channel: int, phase: int, epoch: int) -> None:
        """Until every rank has raised its flag, or, with this rank poisoned, not any longer."""
        if self._gave_up:
            return
        words = self._words
        words[self._awaited], words[self._awaited + 1], words[self._awaited + 2] = channel, phase, epoch
        started = 0.0
        for line in self._inbox[channel][phase]:
            while words[line] < epoch:
                now = time.monotonic()
                started = started or now
                if now - started < _YIELD_S:
                    os.sched_yield()
                elif self._poisoned_by():
                    self._spread(words[self._poison[self._rank]])
                    return
                elif now - started > self._bound_s and (silent := self._silent()):
                    self._spread(self._life << _POISON_BITS | sum(1 << rank for rank in silent))
                    return
                else:
                    self._sleep(line, epoch)

    def tokens(self, channel: int) -> list[int]:
        """How many tokens each rank has in the exchange whose dispatch was waited for."""
        return [self._words[line + _TOKENS] for line in self._inbox[channel][DISPATCH]]

    def check(self) -> None:
        """Raises PeerSilent when this rank is poisoned: what it computed in this life may be wrong."""
        if mask := self._poisoned_by():
            raise PeerSilent(self._rank, [rank for rank in self._ranks if mask >> rank & 1], self._bound_s)

    def _sleep(self, line: int, epoch: int) -> None:
        """Until the flag is raised, or for a nap."""
        self._words[line + _SLEEPS] = 1
        if (seen := self._words[line]) < epoch:
            self._nap.sleep(self._address + 8 * line, seen)
        self._words[line + _SLEEPS] = 0

    def _poisoned_by(self) -> int:
        """The ranks, one bit each, whose silence poisoned this rank in this life."""
        word = self._words[self._poison[self._rank]]
        return word & (1 << _POISON_BITS) - 1 if word >> _POISON_BITS == self._life else 0

    def _spread(self, poison: int) -> None:
        """Poison every rank and wake it, then go past this wait and all that follow."""
        for word in self._poison:
            self._words[word] = poison
        futex.fence()
        for rank in self._ranks:
            for line in range(self._layout.flag(rank, 0, 0, 0), self._layout.awaited(rank), LINE):
                futex.wake(self._address + line)
        self._gave_up = True

    def _silent(self) -> set[int]:
        """Who is to blame: of the ranks that are waited for, and those they wait for in turn, the ones that wait for
        nobody. A rank that is stuck behind a silent one is silent too. Empty if the last flag has just come."""
        silent, seen, found = set(), {self._rank}, [self._rank]
        while found:
            rank = found.pop()
            missing = self._missing(rank)
            if not missing:
                silent.add(rank)
            found += missing - seen
            seen |= missing
        return silent or self._missing(self._rank)

    def _missing(self, rank: int) -> set[int]:
        """The ranks whose flags `rank` waits for."""
        at = self._layout.awaited(rank) // 8
        channel, phase, epoch = self._words[at : at + 3]
        flags = (self._words[self._layout.flag(rank, channel, phase, peer) // 8] for peer in self._ranks)
        return {peer for peer, flag in enumerate(flags) if flag < epoch}
