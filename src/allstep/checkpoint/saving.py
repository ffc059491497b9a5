"""A save under way: what `Store.save` gives back.

Contract: made by `Store` on every rank, which hands it what writes; that runs in a thread of its own and says why it
failed. What a rank reads from it after `wait` is the same on all ranks. The thread has ended when `wait` returns, and
is waited for, within bounds, when the interpreter ends before: one that still runs then can abort the process.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable

from allstep.checkpoint.layout import Name
from allstep.errors import CheckpointError

_AT_EXIT_S = 10.0


class Pending:
    """A save that was begun, or left out because another was under way.

    Attributes:
        step: of the save.
        name: of the checkpoint's folder; None where the save was left out.
        error: why it failed, once it has.
    """

    def __init__(self, step: int, name: Name | None, *, strict: bool) -> None:
        self.step = step
        self.name = str(name) if name is not None else None
        self.error: CheckpointError | None = None
        self._strict = strict
        self._thread: threading.Thread | None = None

    def begin(self, write: Callable[[], CheckpointError | None]) -> None:
        """Have `write` called in a thread; it returns why it failed."""
        self._thread = threading.Thread(target=self._write, args=(write,), daemon=True, name=f"allstep-{self.name}")
        atexit.register(self._thread.join, _AT_EXIT_S)
        self._thread.start()

    @property
    def skipped(self) -> bool:
        """Whether it was left out."""
        return self.name is None

    def done(self) -> bool:
        """Whether it has ended here, well or not; other ranks may be a moment behind."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end and say whether the checkpoint is committed.

        Args:
            timeout: seconds after which it is left to go on, which counts as not committed; on this rank alone.

        Raises:
            CheckpointError: it failed, and the store is strict.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
            atexit.unregister(self._thread.join)
            self._thread = None
        if self.error is not None and self._strict:
            raise self.error
        return self.error is None and not self.skipped

    def _write(self, write: Callable[[], CheckpointError | None]) -> None:
        error: CheckpointError | None = CheckpointError(f"step {self.step} was not saved: its thread did not finish")
        try:
            error = write()
        finally:
            self.error = error
