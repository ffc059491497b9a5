"""A random order of any length that is computed, not stored: a keyed bijection of [0, n), by index.

Contract: the sampler asks for slices of the order, anyone may ask for one index. Before: n in [0, 2^62], any integer
seed. After: the same (n, seed) gives the same order on every machine; nothing is kept whose size grows with n. A
caller who asks outside [0, n) gets an IndexError.

Construction. With b bits, 2^(b-1) < n <= 2^b, an index is split in two halves of b//2 and b - b//2 bits, and a Feistel
network (Luby, Rackoff: How to Construct Pseudorandom Permutations from Pseudorandom Functions, SIAM J. Comput. 17(2),
1988) changes each half in turn by a keyed function of the other, which can be undone whatever that function is. The
function is the 32-bit finaliser of MurmurHash3 of the half xored with the round's key. A result of n or more is put
through the network again until it is less than n ("cycle walking": Black, Rogaway: Ciphers with Arbitrary Finite
Domains, CT-RSA 2002, section 3), fewer than two passes on average. A network over few bits is a poor shuffle, so up to
n = 1024 the order is a table: the indices sorted by keyed 64-bit hashes.
"""

from __future__ import annotations

from typing import overload

import numpy as np
import numpy.typing as npt

from allstep.data.keys import key_of, stream
from allstep.errors import DataError

Indices = npt.NDArray[np.int64]
_Half = npt.NDArray[np.uint32]

MAX_LENGTH = 1 << 62
_TABLE_LENGTH = 1024  # up to here the order is a table
_ROUNDS = 8
_CHUNK = 1 << 14  # indices that go through all rounds together
_FEW = 8  # so few are faster one by one than as arrays
# The multipliers of MurmurHash3's finaliser.
_FIRST = 0x85EBCA6B
_SECOND = 0xC2B2AE35
_MASK32 = 0xFFFFFFFF


class Permutation:
    """Random order of `n` items as a function of `seed`, in constant memory and start-up time.

    `n` is at most 2^62, `seed` any integer. `perm[i]` is the item at place i, `perm(indices)` does many at once,
    `inverse` gives the place of an item. Raises DataError for another `n`, IndexError for an index outside [0, n).
    """

    __slots__ = ("_high_mask", "_inverse_table", "_keys", "_low_bits", "_low_mask", "_n", "_table", "seed")

    def __init__(self, n: int, seed: int) -> None:
        if not isinstance(n, int | np.integer) or not 0 <= n <= MAX_LENGTH:
            raise DataError(f"n is {n!r}; a Permutation needs an int, 0 <= n <= 2**62")
        n = int(n)
        self._n = n
        self.seed = seed
        self._table: Indices | None = None
        self._inverse_table: Indices | None = None
        key = key_of(seed)
        if n <= _TABLE_LENGTH:
            self._table = np.argsort(stream(key, 0, n), kind="stable").astype(np.int64)
            self._inverse_table = np.argsort(self._table).astype(np.int64)
        # At least one bit in each half.
        bits = max(2, (n - 1).bit_length())
        self._low_bits = bits // 2
        self._low_mask = (1 << self._low_bits) - 1
        self._high_mask = (1 << (bits - self._low_bits)) - 1
        self._keys: tuple[int, ...] = tuple((stream(key, 0, _ROUNDS) >> np.uint64(32)).tolist())

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return f"Permutation({self._n}, seed={self.seed})"

    def __getitem__(self, index: int) -> int:
        return self._one(int(index), self._table, inverse=False)

    def __call__(self, indices: npt.ArrayLike) -> Indices:
        """Items at `indices`: integers in [0, n) of any shape; the result is int64 of the same shape."""
        return self._many(indices, self._table, inverse=False)

    @overload
    def inverse(self, items: int) -> int: ...
    @overload
    def inverse(self, items: npt.ArrayLike) -> Indices: ...
    def inverse(self, items: int | npt.ArrayLike) -> int | Indices:
        """Places of `items`, one int or integers of any shape (int64 of that shape): `inverse(perm(i)) == i`."""
        if isinstance(items, (int, np.integer)):
            return self._one(int(items), self._inverse_table, inverse=True)
        return self._many(items, self._inverse_table, inverse=True)

    def _one(self, index: int, table: Indices | None, *, inverse: bool) -> int:
        if not 0 <= index < self._n:
            raise IndexError(f"index {index} is outside [0, {self._n})")
        if table is not None:
            return int(table[index])
        # Cycle walking: what falls outside [0, n) goes through again until it is inside.
        while True:
            index = self._pass_one(index, inverse=inverse)
            if index < self._n:
                return index

    def _pass_one(self, index: int, *, inverse: bool) -> int:
        high, low = index >> self._low_bits, index & self._low_mask
        for number in range(_ROUNDS - 1, -1, -1) if inverse else range(_ROUNDS):
            x = (high if number & 1 else low) ^ self._keys[number]
            x = ((x ^ (x >> 16)) * _FIRST) & _MASK32
            x = ((x ^ (x >> 13)) * _SECOND) & _MASK32
            x ^= x >> 16
            if number & 1:
                low ^= x & self._low_mask
            else:
                high ^= x & self._high_mask
        return high << self._low_bits | low

    def _many(self, indices: npt.ArrayLike, table: Indices | None, *, inverse: bool) -> Indices:
        given = np.asarray(indices)
        if given.size == 0:
            return np.empty(given.shape, dtype=np.int64)
        if not np.issubdtype(given.dtype, np.integer):
            raise IndexError(f"indices are of type {given.dtype}; integers are needed")
        if given.min() < 0 or given.max() >= self._n:
            raise IndexError(f"indices reach from {given.min()} to {given.max()}; they must lie in [0, {self._n})")
        if table is not None:
            return np.take(table, given)
        result = self._pass_many(given.reshape(-1).astype(np.int64, copy=False), inverse=inverse)
        # Fewer than half are outside after a pass, so the array that goes through again shrinks quickly.
        outside = np.flatnonzero(result >= self._n)
        while outside.size > _FEW:
            again = self._pass_many(result[outside], inverse=inverse)
            result[outside] = again
            outside = outside[np.flatnonzero(again >= self._n)]
        for place in outside.tolist():
            index = int(result[place])
            while index >= self._n:
                index = self._pass_one(index, inverse=inverse)
            result[place] = index
        return result.reshape(given.shape)

    def _pass_many(self, indices: Indices, *, inverse: bool) -> Indices:
        # In pieces that stay in the processor's cache through all rounds.
        result = np.empty_like(indices)
        for start in range(0, indices.size, _CHUNK):
            result[start : start + _CHUNK] = self._pass_chunk(indices[start : start + _CHUNK], inverse=inverse)
        return result

    def _pass_chunk(self, indices: Indices, *, inverse: bool) -> Indices:
        high = (indices >> self._low_bits).astype(np.uint32)
        low = (indices & self._low_mask).astype(np.uint32)
        for number in range(_ROUNDS - 1, -1, -1) if inverse else range(_ROUNDS):
            if number & 1:
                low ^= _mixed(high, self._keys[number], self._low_mask)
            else:
                high ^= _mixed(low, self._keys[number], self._high_mask)
        result = high.astype(np.int64)
        result <<= self._low_bits
        result |= low
        return result


def _mixed(half: _Half, key: int, mask: int) -> _Half:
    x = half ^ np.uint32(key)
    shifted = x >> np.uint32(16)
    x ^= shifted
    x *= np.uint32(_FIRST)
    np.right_shift(x, np.uint32(13), out=shifted)
    x ^= shifted
    x *= np.uint32(_SECOND)
    np.right_shift(x, np.uint32(16), out=shifted)
    x ^= shifted
    x &= np.uint32(mask)
    return x
