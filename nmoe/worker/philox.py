"""Counter-based random numbers: a draw is a pure function of (seed, position), on any device, in any batch.

Philox4x32-10 of Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The seed is the
whole 64-bit key and the position is the counter, so no two seeds, however close, share a stream.

Seeds and positions are known to the host before the step runs, so the few words a step needs are computed here with
integer numpy (the same bits on every device) and travel with the step's other small inputs.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_KEY_STEPS = _WEYL * np.arange(_ROUNDS, dtype=np.uint64)[:, None, None]

Words = npt.NDArray[np.uint64]


def philox4x32(counter: Words, key: Words) -> Words:
    """Ten rounds over columns of 32-bit words held in uint64: counter [4, N] and key [2, N] to [4, N]."""
    keys = (key + _KEY_STEPS) & _LOW  # one per round
    even, odd = counter[0::2], counter[1::2]
    for round_key in keys:
        product = even * _MULTIPLIERS
        even, odd = (product >> _32)[::-1] ^ odd ^ round_key, (product & _LOW)[::-1]
    out = np.empty_like(counter)
    out[0::2], out[1::2] = even, odd
    return out


def uniforms(seeds: npt.NDArray[np.int64], positions: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """One float64 in [0, 1) per row, a multiple of 2**-53, from seeds [N] and the positions [N] of the drawn tokens."""
    key = np.empty((2, len(seeds)), np.uint64)
    key[0] = seeds & 0xFFFFFFFF
    key[1] = seeds >> 32
    counter = np.zeros((4, len(seeds)), np.uint64)
    counter[0] = positions
    words = philox4x32(counter, key)
    bits: Words = words[0] << np.uint64(21) | words[1] >> np.uint64(11)
    return np.ldexp(bits.astype(np.float64), -53)
