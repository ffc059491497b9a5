"""A store whose calls come back: torch's own outlive their time limits when the process that serves them is frozen.

Contract: `AnsweringStore` has the calls of torch's store that World makes. Each returns what the store answers, or
raises what the store raises, or, where nothing comes within `patience` seconds, a WorldError that says so. The call
itself then stays behind in a daemon thread, and as long as it does the next ones raise at once.

Waiting for a condition with a deadline.

A store is polled, not waited on: its blocking calls print to stderr when their time is up, keep Ctrl-C from
arriving, and can outlive their limit when the server is frozen.

Threads that are left waiting in native code, and the end of the interpreter.

Contract: who gives up on a call that it had a daemon thread make (a store that does not answer, a save that does not
end) says so with `leave_behind`. The process then ends with its own exit status, whatever becomes of the call.

What would go wrong: a call that comes back while the interpreter ends, because its peer is just being closed, asks for
Python's lock. Until Python 3.14 the thread is then unwound by force, through frames of C++ that must not be, and the
runtime aborts the process: status 134 in place of the script's. So the thread is held where C++ would abort.

One rank first, the others after it: the protocol under `World.main_first`.

Contract: all ranks of a turn enter with the same key of the same store, exactly one of them as `first`. The first runs
its body at once; the others run theirs when it has left its own, by return or by exception.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TypeVar

from allstep.errors import WorldError
from allstep.world.torch_private import PrefixStore, Store

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


_LONGEST_PAUSE_S = 0.25


def poll(condition: Callable[[], bool], deadline: float) -> bool:
    """Whether the condition came true before `deadline`, a time of `time.monotonic`; it is asked at least once.

    Pauses grow with the time waited, to a quarter of a second, so that a thousand ranks do not crowd one server.
    """
    start = time.monotonic()
    while not condition():
        now = time.monotonic()
        if now >= deadline:
            return False
        # What is asked cannot be waited for; the longer it has taken, the less often it is asked.
        time.sleep(min(0.001 + (now - start) / 10, _LONGEST_PAUSE_S, deadline - now))
    return True


_left: list[threading.Thread] = []


def leave_behind(thread: threading.Thread) -> None:
    """Take note of a daemon thread that waits in native code and may do so for ever."""
    if not _left:
        atexit.register(_hold_what_is_left)
    _left.append(thread)


def _hold_what_is_left() -> None:
    if not any(thread.is_alive() for thread in _left) or not sys.platform.startswith("linux"):
        return
    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        pause = ctypes.CDLL(None).pause
    except (OSError, AttributeError):  # another C++ runtime: the exit status may be that of an abort
        return
    set_terminate(ctypes.cast(pause, ctypes.c_void_p))


@contextmanager
def first_then_rest(
    store: AnsweringStore, key: str, *, first: bool, timeout: float, waits: AbstractContextManager[None]
) -> Iterator[None]:
    """Run the body on the first rank, then on the others.

    Args:
        store: shared by the ranks.
        key: names this turn; never used twice in the store.
        first: whether this rank is the first.
        timeout: seconds that the others wait.
        waits: what the others are in meanwhile.

    Raises:
        WorldError: the first rank did not finish in time, or the store was lost, on the others.
    """
    if first:
        try:
            yield
        finally:
            store.set(key, "done")
        return
    try:
        with waits:
            done = poll(lambda: store.check([key]), time.monotonic() + timeout)
    except RuntimeError as error:
        raise WorldError(f"the store was lost while waiting for the first rank's turn: {error}") from error
    if not done:
        raise WorldError(
            f"waited {timeout:g} s for the rank that goes first; if its work takes longer, give main_first a longer "
            "timeout, and check that every rank enters main_first equally often"
        )
    yield


def seconds(name: str, value: float | timedelta) -> float:
    """A duration in seconds; raises ValueError, naming the argument, unless it is positive."""
    try:
        result = value.total_seconds() if isinstance(value, timedelta) else float(value)
    except (TypeError, ValueError):
        result = 0.0
    if not result > 0:
        raise ValueError(f"{name} is {value!r}; it must be a positive number of seconds or timedelta")
    return result
