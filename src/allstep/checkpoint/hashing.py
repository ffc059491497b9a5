"""The hash of a checkpoint's files, taken while they are written or read.

Contract: XXH3 with 128 bits, which notices truncation and flipped bits at the speed of memory. It is no defence against
somebody who forges a checkpoint: that nothing in one is ever executed is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import xxhash

ALGORITHM = "xxh3_128"
BLOCK = 4 << 20

Buffer = bytes | memoryview


class Hashed:
    """Passes blocks of bytes on and knows the size and the hash of those that it passed."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.size = 0

    def blocks(self, *parts: Buffer) -> Iterator[Buffer]:
        """The bytes of all parts, in blocks."""
        for part in parts:
            view = memoryview(part)
            for start in range(0, view.nbytes, BLOCK):
                block = view[start : start + BLOCK]
                self._hash.update(block)
                self.size += block.nbytes
                yield block

    @property
    def hexdigest(self) -> str:
        """The hash of what was passed on so far."""
        return str(self._hash.hexdigest())


def hash_bytes(data: bytes) -> str:
    """The hash of bytes at hand."""
    return str(xxhash.xxh3_128(data).hexdigest())


def hash_file(file: BinaryIO) -> tuple[int, str]:
    """Size and hash of an open file, from where it stands to its end."""
    digest, size = xxhash.xxh3_128(), 0
    while block := file.read(BLOCK):
        digest.update(block)
        size += len(block)
    return size, str(digest.hexdigest())
