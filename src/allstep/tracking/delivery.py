"""`Delivery`: brings what stands in a journal to one tracker, in a thread of its own, each record once.

Contract: before a tracker is given records, the file `NAME.json` says how many it will have been given (`begun`); when
they have surely arrived, it says so too (`done`). Both are numbers of records in the journal. So after any end it is
known what may be in the tool: where `begun` and `done` are equal and nothing behind them was cut from the journal, it
goes on there. Otherwise it is put right (`_reconcile`) by what the tracker can do.

A tracker that raises is tried again after a pause that doubles up to a minute; one warning says so, and one line when
it works again. One that hangs keeps nobody waiting but this thread. Nothing is held in memory: what is to be sent is in
the journal, and the next start of the script sends what this one could not.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from allstep.tracking.journal import Journal, write_json
from allstep.tracking.tracker import Tracker
from allstep.tracking.values import Image, Record

log = logging.getLogger("allstep.tracking")

_AT_A_TIME = 100  # records
_LONGEST_PAUSE_S = 60.0


class Delivery:
    """Brings a journal to one tracker.

    Args:
        name: of the tracker in messages and of the file that says how far it is.
        tracker: to be served.
        journal: where it is read from.
        identity: which run of the tool a checkpoint was saved in; what the file says, which is newer, comes first.
    """

    def __init__(self, name: str, tracker: Tracker, journal: Journal, identity: dict[str, Any] | None = None) -> None:
        self.name = name
        self.tracker = tracker
        self._journal = journal
        self._file: Path = journal.folder / f"{name}.json"
        self.identity: dict[str, Any] = identity or {}
        self._begun = self._done = self._sent = self._seen_cuts = self._again = 0
        self._is_open = self._is_ending = False
        self._failures = 0
        self._changed = Condition()
        self._thread = Thread(target=self._run, name=f"allstep tracking {name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is more to be sent, or a cut to be seen."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, timeout: float) -> int:
        """Wait until all that is in the journal now is sent; the number of records that are not, after `timeout`."""
        with self._changed:
            self._changed.wait_for(self._is_up_to_date, timeout)
            return max(0, self._journal.count - self._sent)

    def close(self, timeout: float) -> int:
        """Send what there is, close the tracker, and end; the number of records that could not be sent in time."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return max(0, self._journal.count - self._sent)

    def _is_up_to_date(self) -> bool:
        return self._sent >= self._journal.count and self._seen_cuts == len(self._journal.cuts)

    # In the thread

    def _run(self) -> None:
        while True:
            try:
                is_idle = not self._step()
                if self._failures:
                    log.warning("%s takes values again; those that were kept are being sent", self.name)
                self._failures = 0
            except Exception as error:  # whatever a tool raises: it is tried again, and training goes on
                self._fail(error)
                is_idle = False
            with self._changed:
                self._changed.notify_all()
                if self._is_ending and (is_idle or self._failures):
                    break
                if self._failures:
                    self._changed.wait_for(lambda: self._is_ending, min(_LONGEST_PAUSE_S, 0.5 * 2**self._failures))
                elif is_idle:
                    self._changed.wait_for(lambda: self._is_ending or not self._is_up_to_date())
        if self._is_open and not self._failures:
            try:
                self._close_tracker()
            except Exception as error:
                self._fail(error)

    def _step(self) -> bool:
        """Do the next thing; False where there is nothing to do."""
        if not self._is_open:
            self._open()
        if self._seen_cuts != len(self._journal.cuts) or self._begun != self._sent:
            self._reconcile()
        records = self._journal.read(self._sent, _AT_A_TIME)
        if not records:
            return False
        _call(self.tracker, "begin", self._journal.config)
        self._note(begun=max(self._again, self._sent + len(records)))
        for record in records:
            self._give(record)
            self._sent += 1
        if _call(self.tracker, "flush") is not False:
            self._note(done=self._sent)
        return True

    def _open(self) -> None:
        if self._file.exists():
            found = json.loads(self._file.read_text())
            self._begun, self._done, self._seen_cuts = found["begun"], found["done"], found["cuts"]
            self.identity = found["identity"]
        elif self.identity:
            # What the tool has is not known: the folder is another one than that of the run before.
            self._begun = self._journal.count
        self._sent = self._done
        _call(self.tracker, "open", self._journal.folder)
        if self.identity:
            self.tracker.load_state_dict(self.identity)
        self._note()  # before a run of the tool is made, so that it is found again
        self._is_open = True

    def _reconcile(self) -> None:
        """Make the tool and the journal agree, after a kill, an error, or a cut of the journal."""
        cuts = self._journal.cuts[self._seen_cuts :]
        limit = min([*cuts, self._journal.count])
        sure = min(self._done, limit)
        again = 0
        if self._begun <= limit and self._begun == self._done:
            pass
        elif hasattr(self.tracker, "withdraw"):
            # Records of one step may be on both sides of the limit, so all of the last step are sent anew.
            step = self._journal.step_of(sure - 1) if sure else 0
            self.tracker.withdraw(step)
            sure = self._journal.first_at(step) if sure else 0
        elif self._begun <= limit and hasattr(self.tracker, "log_again"):
            again = self._begun
        elif hasattr(self.tracker, "restart"):
            self.tracker.restart()
            sure = 0
        self._sent, self._again = sure, again
        self._note(begun=max(sure, again), done=sure, cuts=self._seen_cuts + len(cuts))
        self._begun = sure  # as far as this process knows; the file remembers what may be there

    def _give(self, record: Record) -> None:
        if record.config is not None:
            _call(self.tracker, "configure", record.config)
        if not record.values:
            return
        folder = self._journal.folder
        values = {
            name: Image(str(folder / value.path)) if isinstance(value, Image) else value
            for name, value in record.values.items()
        }
        _call(self.tracker, "log_time", record.time)
        if self._sent < self._again:
            self.tracker.log_again(values, record.step)  # type: ignore[attr-defined]
        else:
            self.tracker.log(values, record.step)

    def _note(self, *, begun: int | None = None, done: int | None = None, cuts: int | None = None) -> None:
        self._begun = self._begun if begun is None else begun
        self._done = self._done if done is None else done
        self._seen_cuts = self._seen_cuts if cuts is None else cuts
        self.identity = dict(self.tracker.state_dict())
        position = {"begun": self._begun, "done": self._done, "cuts": self._seen_cuts, "identity": self.identity}
        write_json(self._file, position)

    def _close_tracker(self) -> None:
        if hasattr(self.tracker, "close"):
            self.tracker.close()
        self._note(begun=self._sent, done=self._sent)

    def _fail(self, error: Exception) -> None:
        if not self._failures:
            log.warning(
                "%s does not take values (%s: %s); training goes on, they are kept in %s and sent later",
                *(self.name, type(error).__name__, error, self._journal.path),
            )
        self._failures += 1


def _call(tracker: Tracker, method: str, *arguments: Any) -> Any:
    """What a method that a tracker may have returns; None without it."""
    function = getattr(tracker, method, None)
    return None if function is None else function(*arguments)
