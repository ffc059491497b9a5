"""From any integers to well mixed 64-bit keys: what makes every order and every random draw a function of its place.

Contract: `Permutation`, the sampler and the per-sample seeding call these; they are pure, need no state and give the
same numbers on every platform. Neighbouring inputs (epoch 3 and 4, seed 0 and 1) give keys that look unrelated.
None of this is cryptography: whoever sees an order can find its seed.
"""

from __future__ import annotations

import operator

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
# The constants of SplitMix64; the first is 2^64 divided by the golden ratio.
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def mix64(value: int) -> int:
    """Bijection of the 64-bit integers in which every input bit moves about half of the output bits.

    The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
    """
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def key_of(*parts: int) -> int:
    """One 64-bit key from a sequence of integers of any sign and size; the order and number of parts matter."""
    # The number of parts, and each part's sign and length, go in, so that (1, 2) and (12,) cannot give one key.
    key = mix64(_GOLDEN + len(parts))
    for part in parts:
        whole = operator.index(part)
        magnitude = abs(whole)
        limbs = max(1, (magnitude.bit_length() + 63) // 64)
        key = mix64(key ^ (2 * limbs + (whole < 0)))
        for limb in range(limbs):
            key = mix64((key + _GOLDEN) ^ mix64(magnitude >> (64 * limb)))
    return key


def epoch_key(seed: int, epoch: int) -> int:
    """The 64-bit key that decides the order of one epoch; `seed` and `epoch` may be any integers."""
    return key_of(seed, epoch)


def stream(key: int, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Words `start` to `start + count` of the SplitMix64 sequence that begins at `key`: uint64, shape (count,).

    Any place of the sequence is reached directly, so word i belongs to position i whoever asks for it.
    """
    # In place, since a large epoch's words are as large as its order. uint64 wraps around, as the algorithm wants.
    words = np.arange(count, dtype=np.uint64)
    words += np.uint64((start + 1) & _MASK)
    words *= np.uint64(_GOLDEN)
    words += np.uint64(key & _MASK)
    words ^= words >> np.uint64(30)
    words *= np.uint64(_FIRST)
    words ^= words >> np.uint64(27)
    words *= np.uint64(_SECOND)
    words ^= words >> np.uint64(31)
    return words
