"""`JournalWriter`: takes records from the training loop without keeping it, and writes them to the journal.

Contract: `put` only appends to a list, whatever the disk and the device do. A thread makes numbers of tensors, writes
pictures, appends to the journal, and wakes the deliveries. Where the disk takes nothing for so long that `MOST` records
wait, further ones are lost and one warning says so. Records of a failed write are kept and written by the next try.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from threading import Condition, Thread
from typing import Protocol

from allstep.errors import ArgumentError
from allstep.tracking.journal import Journal
from allstep.tracking.values import Record, settled

log = logging.getLogger("allstep.tracking")

MOST = 10_000
_IMAGES = "images"
_RETRY_AFTER_S = 1.0


class Woken(Protocol):
    """What is told that there is more in the journal."""

    def wake(self) -> None:
        """There is more."""


class JournalWriter:
    """Writes records in a thread.

    Attributes:
        journal: where they go.
        deliveries: told after each write.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.deliveries: Sequence[Woken] = ()
        self._waiting: deque[Record] = deque()
        self._changed = Condition()
        self._is_ending = False
        self._has_warned = False
        self._thread = Thread(target=self._run, name="allstep tracking", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Have a record written soon."""
        with self._changed:
            if len(self._waiting) < MOST:
                self._waiting.append(record)
                self._changed.notify_all()
                return
        self._warn("nothing can be written and too much waits; records are lost from now on")

    def flush(self, timeout: float) -> bool:
        """Wait until all is written; False where that takes longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def close(self) -> None:
        """End the thread, when it has tried once more."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._thread.join(_RETRY_AFTER_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_ending)
                records = list(self._waiting)
            failed = bool(records) and not self._write(records)
            with self._changed:
                if not failed:
                    for _ in records:
                        self._waiting.popleft()
                    self._changed.notify_all()
                elif not self._is_ending:
                    self._changed.wait_for(lambda: self._is_ending, _RETRY_AFTER_S)
                if self._is_ending and (failed or not self._waiting):
                    return
            for delivery in self.deliveries:
                delivery.wake()

    def _write(self, records: Sequence[Record]) -> bool:
        try:
            self.journal.append([self._settled(each) for each in records])
        except OSError as error:
            self._warn(f"{self.journal.path} cannot be written now, which is tried again: {error}")
            return False
        self._has_warned = False
        return True

    def _settled(self, record: Record) -> Record:
        values = {}
        for name, value in record.values.items():
            path = f"{_IMAGES}/{re.sub('[^A-Za-z0-9_.-]', '_', name)}-{record.step}.png"

            def write_png(content: bytes, path: str = path) -> str:
                (self.journal.folder / _IMAGES).mkdir(exist_ok=True)
                (self.journal.folder / path).write_bytes(content)
                return path

            try:
                values[name] = settled(value, write_png)
            except (ArgumentError, ValueError, TypeError, RuntimeError) as error:  # of one value, not of all
                log.warning("%s of step %d is left out: %s", name, record.step, error)
        return replace(record, values=values)

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            log.warning("tracking: %s; training goes on", why)
        self._has_warned = True
