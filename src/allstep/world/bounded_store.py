"""The ranks' store, with calls that come back, and what is built on it: polling, and `World.main_first`.

torch's own store calls can outlive their time limits when the process that serves the store is frozen. Contract of
`BoundedStore`: it has the calls of torch's store that World makes. Each returns what the store answers, or raises what
the store raises, or, where nothing comes within `patience` seconds, a WorldError that says so. The call itself then
goes on in a daemon thread, and as long as it does the next ones raise at once.

`poll` waits for a condition with a deadline. A store is polled, not waited on: its blocking calls print to stderr when
their time is up, keep Ctrl-C from arriving, and can outlive their limit when the server is frozen.

`abandon_thread` is for whoever gives up on a call that a daemon thread makes in native code: a store that does not
answer, a save that does not end. The process then still ends with its own exit status. What would go wrong otherwise:
a call that returns while the interpreter ends asks for Python's lock. Until Python 3.14 the thread is then unwound by
force, through frames of C++ that must not be, and the C++ runtime aborts the process: status 134 in place of the
script's. So the thread is stopped where C++ would abort.

`first_then_rest` is the protocol under `World.main_first`: all ranks enter with the same key of the same store, exactly
one of them as `first`. The first runs its body at once; the others run theirs when it has left its own, by return or by
exception.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from allstep.errors import WorldError
from allstep.world.torch_private import PrefixStore, Store

PATIENCE_S = 15.0
"""Seconds that a store has to answer; its server answers in microseconds, also while its process is busy."""

T = TypeVar("T")


class BoundedStore:
    """A store whose every call is made in a thread, so that it can be given up.

    Args:
        raw: torch's store, for those who need that.
        patience: seconds that an answer may take; `PATIENCE_S` unless given.
    """

    def __init__(self, raw: Store, patience: float | None = None) -> None:
        self.raw = raw
        self._patience = PATIENCE_S if patience is None else patience
        self._asking: threading.Thread | None = None

    def with_prefix(self, prefix: str) -> BoundedStore:
        """The part of the store whose keys begin with `prefix`."""
        return BoundedStore(PrefixStore(prefix, self.raw), self._patience)

    def with_patience(self, patience: float) -> BoundedStore:
        """The same store, with another time to answer."""
        return BoundedStore(self.raw, patience)

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

        # One call at a time: a store that has not answered the last one would not answer the next.
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
                    abandon_thread(self._asking)
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


_abandoned: list[threading.Thread] = []


def abandon_thread(thread: threading.Thread) -> None:
    """Take note of a daemon thread that waits in native code and may do so for ever."""
    if not _abandoned:
        atexit.register(_stop_abandoned_threads)
    _abandoned.append(thread)


def _stop_abandoned_threads() -> None:
    if not any(thread.is_alive() for thread in _abandoned) or not sys.platform.startswith("linux"):
        return
    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        pause = ctypes.CDLL(None).pause
    except (OSError, AttributeError):  # another C++ runtime: the exit status may be that of an abort
        return
    # What C++ calls instead of aborting: a wait for ever, in a daemon thread that the process does not wait for.
    set_terminate(ctypes.cast(pause, ctypes.c_void_p))


@contextmanager
def first_then_rest(
    store: BoundedStore, key: str, *, first: bool, timeout: float, waits: AbstractContextManager[None]
) -> Iterator[None]:
    """Run the body on the first rank, then on the others.

    Args:
        store: shared by the ranks.
        key: names this call; never used twice in the store.
        first: whether this rank is the first.
        timeout: seconds that the others wait.
        waits: entered by the others while they wait.

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
        raise WorldError(f"the store was lost while waiting for the rank that goes first: {error}") from error
    if not done:
        raise WorldError(
            f"waited {timeout:g} s for the rank that goes first; if its work takes longer, give main_first a longer "
            "timeout, and check that every rank enters main_first equally often"
        )
    yield
