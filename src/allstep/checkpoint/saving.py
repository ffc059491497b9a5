"""A save under way: what `Store.save` gives back.

Contract: made by `Store` on every rank; ended once, by the thread that writes. What a rank reads from it after `wait`
is the same on all ranks.
"""

from __future__ import annotations

import threading

from allstep.checkpoint.layout import Name
from allstep.errors import CheckpointError


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
        self._ended = threading.Event()
        if name is None:
            self._ended.set()

    @property
    def skipped(self) -> bool:
        """Whether it was left out."""
        return self.name is None

    def done(self) -> bool:
        """Whether it has ended here, well or not; other ranks may be a moment behind."""
        return self._ended.is_set()

    def wait(self) -> bool:
        """Wait for the end and say whether the checkpoint is committed.

        Raises:
            CheckpointError: it failed, and the store is strict.
        """
        self._ended.wait()
        if self.error is not None and self._strict:
            raise self.error
        return self.error is None and not self.skipped

    def end(self, error: CheckpointError | None) -> None:
        """Called by the thread that writes."""
        self.error = error
        self._ended.set()
