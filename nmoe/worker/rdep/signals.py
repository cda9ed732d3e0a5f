"""Flags between ranks: raising them, waiting for them, and giving up on a rank that stays silent.

Invariants
- An epoch is (life << 36) + n. Every rank counts the exchanges of a life per channel, all identically; so a flag never
  decreases, and leftovers of an earlier life never satisfy a wait. Each flag line is written by one rank only.
- A rank raises its flag at every rank in both phases of every exchange, with or without rows.
- A rank poisons every rank before it abandons a wait. Results computed after that may be wrong, but they follow the
  poison: a rank that read any of them, directly or through others, finds itself poisoned when it checks afterwards. So
  a step that ends unpoisoned is correct. Each poison word also has a single writer, and names the life it applies to.

A wait first yields the core, since on a busy machine the flags are often one time slice away, then sleeps on the rank's
`sleeps` word until the last flag is raised. A sleeper sets its word, then checks its flags once more. A rank that
raises a flag does so first, then checks the word; it pays for a system call only if the word is set and no flag is
missing. Each side has a fence between its two steps: so of a sleeper and the last rank to raise a flag, one sees the
other's store, and of two ranks that raise the last flags at once, one sees all flags.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Callable

from nmoe.errors import PeerSilent
from nmoe.slab import COUNT_BITS, DISPATCH, LINE, NUM_CHANNELS, NUM_PHASES, POISON_BITS, SlabLayout
from nmoe.worker.rdep import futex

_YIELD_S = 50e-6
_NAP_S = 0.05  # between checks of the clock and of the poison words
_LONGEST_NAP_S = 0.5  # whoever naps longer was stopped (Ctrl-Z, a paused container), and the others perhaps as well
# Words of a flag's line, and of the line that holds what a rank waits for, in units of 8 bytes.
_EPOCH, _TOKENS = 0, 1
_CHANNEL, _PHASE, _AWAITED, _SLEEPS = 0, 1, 2, 3


class Signals:
    """One rank's view of the flag lines and poison words of all slabs."""

    def __init__(self, layout: SlabLayout, memory: mmap.mmap, rank: int) -> None:
        """Raises LaunchError on a machine whose memory model is not supported."""
        futex.require_x86_64()
        self._rank = rank
        self._ranks = range(layout.world_size)
        self._words = memoryview(memory).cast("B").cast("q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        # Starting with the next rank, so that nobody is always notified last.
        self._hearers = [(rank + 1 + step) % layout.world_size for step in self._ranks]
        self._epoch_words = [
            [[self._flag_words(layout, other, channel, phase) for other in self._ranks] for phase in range(NUM_PHASES)]
            for channel in range(NUM_CHANNELS)
        ]
        self._awaited = [layout.awaited(other) // 8 for other in self._ranks]
        poison = [layout.poison(other) // 8 for other in self._ranks]
        self._poisons = slice(poison[rank], poison[rank] + layout.world_size)
        self._poison_by_me = [word + rank for word in poison]
        self._nap = futex.Nap(_NAP_S)
        self._life = 0
        self._epochs = [0] * NUM_CHANNELS
        self._bound_s = 0.0
        self._gave_up = False

    @staticmethod
    def _flag_words(layout: SlabLayout, rank: int, channel: int, phase: int) -> slice:
        """The words that hold the epochs of `rank`'s peers."""
        first = layout.flag(rank, channel, phase, 0) // 8
        return slice(first, first + layout.world_size * LINE // 8, LINE // 8)

    def meet(self, life: int, stopped: Callable[[], bool]) -> bool:
        """Begin a life and wait until every rank has begun it. Returns False if `stopped()`.

        This ends the previous life on every rank: the new flags are greater than those of its exchanges.
        """
        self.leave()
        self._life, self._gave_up = life, False
        self._epochs = [life << COUNT_BITS] * NUM_CHANNELS
        epoch = self.next_epoch(0)
        self.raise_flags(0, DISPATCH, epoch, 0)
        return self._wait(0, DISPATCH, epoch, stopped)

    def next_epoch(self, channel: int) -> int:
        """Number the next exchange on `channel`."""
        self._epochs[channel] += 1
        return self._epochs[channel]

    def set_bound(self, seconds: float) -> None:
        """Set how long each wait may take from now on; may be infinite."""
        self._bound_s = seconds

    def raise_flags(self, channel: int, phase: int, epoch: int, num_tokens: int) -> None:
        """Tell every rank, including this one, that everything this rank wrote before is in place."""
        words, flags, mine = self._words, self._epoch_words[channel][phase], self._rank * LINE // 8
        futex.fence()
        for rank in self._hearers:
            line = flags[rank].start + mine
            words[line + _TOKENS] = num_tokens
            words[line + _EPOCH] = epoch
        futex.fence()
        for rank in self._hearers:
            if words[self._awaited[rank] + _SLEEPS] and self._raised(flags[rank], epoch):
                self._wake(rank)

    def wait(self, channel: int, phase: int, epoch: int) -> None:
        """Wait until every rank has raised its flag, or this rank is poisoned."""
        if not self._gave_up:
            self._wait(channel, phase, epoch, lambda: False)

    def tokens(self, channel: int) -> list[int]:
        """Each rank's number of tokens in the exchange whose dispatch was last waited for."""
        flags = self._epoch_words[channel][DISPATCH][self._rank]
        return self._words[flags.start + _TOKENS : flags.stop : flags.step].tolist()

    def leave(self) -> None:
        """End this life on every rank."""
        self._spread(self._blamed())

    def check(self) -> bool:
        """Return False if a rank has ended this life. Raises PeerSilent if a rank was silent in it."""
        if not self._poisoned():
            return True
        if blamed := self._blamed():
            raise PeerSilent(self._rank, sorted(blamed), self._bound_s)
        return False

    def _wait(self, channel: int, phase: int, epoch: int, stopped: Callable[[], bool]) -> bool:
        """Wait until every rank has raised its flag or this rank is poisoned. Returns False if `stopped()`."""
        flags = self._epoch_words[channel][phase][self._rank]
        if self._raised(flags, epoch):
            return True
        at = self._awaited[self._rank]
        self._words[at + _CHANNEL], self._words[at + _PHASE], self._words[at + _AWAITED] = channel, phase, epoch
        waited, looked_at = 0.0, time.monotonic()
        while not self._raised(flags, epoch):
            now = time.monotonic()
            waited += min(now - looked_at, _LONGEST_NAP_S)
            looked_at = now
            if waited < _YIELD_S:
                os.sched_yield()
            elif stopped():
                return False
            elif self._poisoned():
                self._spread(self._blamed())
                return True
            elif waited > self._bound_s and (silent := self._silent()):
                self._spread(silent)
                return True
            else:
                self._sleep(flags, epoch)
        return True

    def _raised(self, flags: slice, epoch: int) -> bool:
        return min(self._words[flags]) >= epoch

    def _sleep(self, flags: slice, epoch: int) -> None:
        """Sleep until the last flag is raised, poison arrives, or the nap is over."""
        word = self._awaited[self._rank] + _SLEEPS
        self._words[word] = 1
        futex.fence()
        if not self._raised(flags, epoch) and not self._poisoned():
            self._nap.sleep(self._address + 8 * word, 1)
        self._words[word] = 0

    def _wake(self, rank: int) -> None:
        word = self._awaited[rank] + _SLEEPS
        self._words[word] = 0
        futex.wake(self._address + 8 * word)

    def _poisoned(self) -> bool:
        """Whether this rank's results in this life may be wrong."""
        return any(word >> POISON_BITS == self._life for word in self._words[self._poisons])

    def _blamed(self) -> set[int]:
        """The ranks whose silence poisoned this rank; empty if its life was ended."""
        words = [word for word in self._words[self._poisons] if word >> POISON_BITS == self._life]
        return {rank for rank in self._ranks if any(word >> rank & 1 for word in words)}

    def _spread(self, blamed: set[int]) -> None:
        """Poison every rank and wake it, then skip this wait and all later ones."""
        for word in self._poison_by_me:
            self._words[word] = self._life << POISON_BITS | sum(1 << rank for rank in blamed)
        futex.fence()
        for rank in self._ranks:
            self._wake(rank)
        self._gave_up = True

    def _silent(self) -> set[int]:
        """The ranks to blame: following waits transitively from this rank, those that wait for nobody; a rank stuck
        behind a silent one is silent too. Ranks that wait for each other, which only Steps that differ between ranks
        can cause, are all to blame. Empty if the last flag has just arrived."""
        silent, seen, found = set(), {self._rank}, [self._rank]
        while found:
            rank = found.pop()
            missing = self._missing(rank)
            if not missing:
                silent.add(rank)
            found += missing - seen
            seen |= missing
        return silent - {self._rank} or self._missing(self._rank)

    def _missing(self, rank: int) -> set[int]:
        """The ranks whose flags `rank` is waiting for."""
        at = self._awaited[rank]
        channel, phase, epoch = (self._words[at + field] for field in (_CHANNEL, _PHASE, _AWAITED))
        flags = self._words[self._epoch_words[channel][phase][rank]]
        return {peer for peer, flag in enumerate(flags) if flag < epoch}
