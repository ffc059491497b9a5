"""One rank first, the others after it: the protocol under `World.main_first`.

Contract: all ranks of a turn enter with the same key of the same store, exactly one of them as `first`. The first runs
its body at once; the others run theirs when it has left its own, by return or by exception.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from allstep.errors import WorldError
from allstep.world.answering import AnsweringStore
from allstep.world.polling import poll


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
