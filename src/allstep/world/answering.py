"""A store whose calls come back: torch's own outlive their time limits when the process that serves them is frozen.

Contract: `AnsweringStore` has the calls of torch's store that World makes. Each returns what the store answers, or
raises what the store raises, or, where nothing comes within `patience` seconds, a WorldError that says so. The call
itself then stays behind in a daemon thread, and as long as it does the next ones raise at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from allstep.errors import WorldError
from allstep.world.left_behind import leave_behind
from allstep.world.stores import PrefixStore, Store

ANSWER_S = 15.0
"""Seconds that a store has to answer; its server answers in microseconds, also while its process is busy."""

T = TypeVar("T")


class AnsweringStore:
    """A store that is asked from threads.

    Args:
        raw: torch's store, for those who need that.
        patience: seconds that an answer may take; `ANSWER_S` unless given.
    """

    def __init__(self, raw: Store, patience: float | None = None) -> None:
        self.raw = raw
        self._patience = ANSWER_S if patience is None else patience
        self._asking: threading.Thread | None = None

    def space(self, prefix: str) -> AnsweringStore:
        """The part of the store whose keys begin with `prefix`."""
        return AnsweringStore(PrefixStore(prefix, self.raw), self._patience)

    def hurried(self, patience: float) -> AnsweringStore:
        """The same store, with less time to answer."""
        return AnsweringStore(self.raw, patience)

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._ask(lambda: self.raw.set(key, value))

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        return self._ask(lambda: self.raw.get(key))

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, and return what it is then."""
        return self._ask(lambda: self.raw.add(key, amount))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return self._ask(lambda: self.raw.check(list(keys)))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a key that has the expected value ("": is not there), and return the value it has then."""
        return self._ask(lambda: self.raw.compare_set(key, expected, desired))

    def _ask(self, call: Callable[[], T]) -> T:
        answers: list[T] = []
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                answers.append(call())
            except BaseException as error:
                errors.append(error)

        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=ask, daemon=True, name="allstep-store")
            try:
                self._asking.start()
            except RuntimeError:  # no new threads once the interpreter is ending
                self._asking = None
                ask()
            else:
                self._asking.join(self._patience)
                if self._asking.is_alive():
                    leave_behind(self._asking)
        if errors:
            raise errors[0]
        if not answers:
            raise WorldError(
                f"the store in which the ranks meet did not answer within {self._patience:g} s; the process that "
                "serves it, rank 0 or the launcher's agent, may be frozen (as by SIGSTOP), or the network to it is cut"
            )
        return answers[0]
