"""`PendingSave`: a save under way in its thread, and how whoever began it waits for it.

Contract: `Store.save` makes one and starts it. What a rank reads from it after `wait` is the same on all ranks, and its
thread has ended when `wait` returns True.

A script that ends with a save under way waits for it, as long as it takes, and says that it does. One that ends by an
exception waits `AT_FAILURE_S`, since other ranks may be gone. A save that is not committed at an end is said to be
lost, and the process does not end with status 0.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref

from allstep.checkpoint.commit import Save, write_save
from allstep.checkpoint.owner import Ownership
from allstep.checkpoint.retention import Retention
from allstep.checkpoint.storage import Storage
from allstep.coordination import Coordinator
from allstep.errors import CheckpointError, FolderLostError
from allstep.exit_codes import USER_ERROR
from allstep.open_files import write_buffers
from allstep.protocol.save_record import note_save
from allstep.world import World, internals
from allstep.world.failures import Reporter

log = logging.getLogger("allstep.checkpoint")

AT_FAILURE_S = 10.0
_FIRST_WORD_S, _NEXT_WORD_S = 3.0, 30.0  # after which an end that waits says so


class PendingSave:
    """A save that was begun, or left out because another was under way."""

    def __init__(self, step: int, save: Save | None, *, strict: bool) -> None:
        """Made by `Store.save`.

        Args:
            step: the iteration after which it was taken.
            save: the record of the save; None where it was left out.
            strict: see `Store`.
        """
        self.step = step
        self._save = save
        self._strict = strict
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._rank = 0
        self._began = 0.0
        self._address = ""
        self._reporter: Reporter | None = None

    @property
    def name(self) -> str | None:
        """Of the checkpoint's folder; None where the save was left out."""
        return None if self._save is None else str(self._save.name)

    @property
    def error(self) -> CheckpointError | None:
        """Why it failed, once it has."""
        return None if self._save is None else self._save.error

    @property
    def reason(self) -> str | None:
        """The same without the step, to compare with that of another save."""
        return None if self._save is None else self._save.reason

    @property
    def skipped(self) -> bool:
        """Whether it was left out."""
        return self._save is None

    @property
    def withheld(self) -> str | None:
        """Why it was not to be committed, where that is no failure of the save: a rank says that the run has failed."""
        return None if self._save is None else self._save.withheld

    @property
    def committed(self) -> bool:
        """Whether the checkpoint is there."""
        return self._save is not None and self._save.manifest is not None

    def start(
        self, storage: Storage, coordinator: Coordinator, retention: Retention, ownership: Ownership | None
    ) -> None:
        """Write the save in a thread; the arguments are those of `write_save`."""
        self._rank = coordinator.rank
        self._address = f"{storage.root}/{self.name}"
        self._began = time.monotonic()
        # A daemon, so that it is this object that decides how long an end waits.
        self._thread = threading.Thread(
            target=self._write,
            args=(storage, coordinator, retention, ownership),
            daemon=True,
            name=f"allstep-{self.name}",
        )
        world = World.current()
        if world is not None:
            self._reporter = internals(world).reporter
            internals(world).before_close(weakref.WeakMethod(self.before_world_closes))
        atexit.register(self._wait_at_exit)
        self._thread.start()

    def done(self) -> bool:
        """Whether it has ended here, well or not; other ranks may be a moment behind."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end and say whether the checkpoint is committed.

        Args:
            timeout: seconds after which it is left to go on, which counts as not committed; on this rank alone.

        Raises:
            CheckpointError: it failed, and the store is strict.
            FolderLostError: the folder is another job's by now, strict or not.
        """
        if not self._join(timeout):
            return False
        if self.error is not None and (self._strict or isinstance(self.error, FolderLostError)):
            raise self.error
        return self.committed

    def wait_at_end(self, *, failed: bool, what: str) -> bool:
        """Wait before something ends that the save needs, and say so; whether all is well.

        Args:
            failed: it ends by an exception, so that other ranks may not come any more.
            what: ends, in words.
        """
        began = time.monotonic()
        word_at, until = began + _FIRST_WORD_S, began + AT_FAILURE_S if failed else None
        try:
            while not self._join(max(0.0, min(word_at, until or word_at) - time.monotonic())):
                now = time.monotonic()
                if until is not None and now >= until:
                    log.error("step %d was not saved: %s before it was written", self.step, what)
                    return False
                if now >= word_at:
                    word_at += _NEXT_WORD_S
                    if self._rank == 0:
                        log.warning(
                            "%s; waiting for the save of step %d to be written, %.0f s so far",
                            *(what, self.step, now - began),
                        )
        except KeyboardInterrupt:
            log.error("step %d was not saved: interrupted while it was written", self.step)
            return False
        return self.committed or self.withheld is not None or self.skipped

    def before_world_closes(self, failed: bool) -> None:
        """Ranks leave the World when all of them have written."""
        self.wait_at_end(failed=failed, what="the World is closed")

    def _join(self, timeout: float | None) -> bool:
        """Wait for the thread; whether it has ended."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
            # Asked of the thread and not of the outcome, which is there a moment before the thread has ended.
            if thread.is_alive():
                return False
            atexit.unregister(self._wait_at_exit)
            self._thread = None
        return True

    def _wait_at_exit(self) -> None:
        if os.getpid() != self._pid:
            return  # a fork of the script, which has no such thread
        # Set by the interpreter when it has printed an uncaught exception; its status is not 0 then.
        failed = getattr(sys, "last_value", None) is not None
        if self.wait_at_end(failed=failed, what="the script has ended") or failed:
            return
        # An exit handler cannot change the status of the process in any other way.
        write_buffers(close=True)
        os._exit(USER_ERROR)

    def _write(
        self, storage: Storage, coordinator: Coordinator, retention: Retention, ownership: Ownership | None
    ) -> None:
        save = self._save
        assert save is not None
        try:
            write_save(save, storage, coordinator, retention, ownership)
            if self.committed and self._rank == 0:
                self._note()
        finally:
            ended = save.manifest is not None or save.error is not None or save.withheld is not None
            if not ended:  # SystemExit and the like, which end the thread
                save.failure("its thread did not finish")

    def _note(self) -> None:
        """Say so in the record of a submitted job, and to the service that keeps the run's."""
        took = time.monotonic() - self._began
        if self._reporter is not None:
            self._reporter.saved(self.step, took, self._address)
        try:
            note_save(self.step, took, os.environ)
        except OSError as error:  # the save itself is whole
            log.warning("the job's record does not have the save of step %d: %s", self.step, error)
