"""Comparing what ranks say of themselves, line by line, so that a difference is an error that names the ranks.

Contract: every rank describes what it is about to do as a sequence of lines, in the order in which it will do it. Two
ranks may act together exactly when their lines are equal. `fingerprint` is that comparison in 63 bits, and `check_same`
raises where ranks differ. What a line is about, and in which words a difference is told, belongs to who makes the
lines. All of it is pure, so that all ranks, given what all said, raise the same error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, Self


class ComparedLine(Protocol):
    """One line of a description. It is equal to another where the two may act together, and it is pickled."""

    def __iter__(self) -> Any:
        """The fields that are compared, as plain values."""

    def difference(self, at: int, lines: Sequence[Self | None]) -> Exception:
        """The error to raise where ranks' lines at place `at` differ; None stands for a rank that has no such line.

        It is asked of the first rank's line that is there. A rank that has none raises the same error in this way.
        """


def fingerprint(lines: Sequence[ComparedLine]) -> int:
    """A number below 2^63 that differs where descriptions do."""
    # As plain tuples, so that the text does not depend on what a line calls itself.
    digest = hashlib.blake2b(repr([tuple(line) for line in lines]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_same(said: Sequence[Sequence[ComparedLine]]) -> None:
    """Raise what the first differing line says, if any; the same on every rank that has been given the same.

    Args:
        said: what each rank said, in rank order.
    """
    for at in range(max(map(len, said), default=0)):
        lines = [each[at] if at < len(each) else None for each in said]
        if any(line != lines[0] for line in lines):
            raise next(line for line in lines if line is not None).difference(at, lines)


def by_ranks(said: Sequence[str]) -> str:
    """What ranks said, with the ranks that said it: "a on ranks 0, 2; b on rank 1"."""
    groups: dict[str, list[int]] = {}
    for rank, text in enumerate(said):
        groups.setdefault(text, []).append(rank)
    return "; ".join(
        f"{text} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" for text, ranks in groups.items()
    )
