"""`StopOnSignal`: a signal to one rank ends the run on all of them, in good order.

Contract: attached to an engine from the main thread, before its run, it takes over the given signals of this process.
Their handler only notes that a signal came, since it may run between any two instructions; the engine's own thread asks
for the run's end after the present iteration or epoch. So all ranks stop at the same iteration, by the end of the next
window, whichever of them the signal reached. `detach`, or the end of a `with` block, gives the signals back.

A second signal, of any of the kinds, hurries: engines that were named for it end as well, such as an evaluator that the
trainer's handler runs. Nothing else is left out: what handlers do at the run's end, such as saving, is done. A third
one ends the process, as the signal does by default. One notice often comes twice, from a scheduler that signals every
process and from a launcher that passes it on, so signals of one kind within `together` seconds are one. A signal that
came before `attach`, and that `allstep.init` or `allstep run` kept, counts. What can go wrong: while Python waits in
native code, in a step that hangs or a collective, no signal is noticed; and a handler installed by C code cannot be
given back.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, ClassVar

from allstep.coordination import Outcome
from allstep.engine import Engine, Events, RemovableEventHandle
from allstep.errors import EngineError

TOGETHER_S = 2.0


class StopOnSignal:
    """Turns signals into `terminate(reason="signal SIGTERM")`.

    Args:
        signals: which; by default the ones that schedulers send before the end of a job.
        hurries: engines that a second signal ends as well.
        together: seconds in which signals of one kind are taken for one.

    Attributes:
        outcome: what the end means, as for `terminate`.
        received: the first signal that came since `attach`, or None.
    """

    outcome: ClassVar[Outcome] = "left"

    def __init__(
        self,
        signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1),
        *,
        hurries: Iterable[Engine] = (),
        together: float = TOGETHER_S,
    ) -> None:
        self.signals = tuple(signal.Signals(number) for number in signals)
        self.received: signal.Signals | None = None
        self.hurries = tuple(hurries)
        self.together = together
        self._is_told = False
        self._noted: list[tuple[int, float]] = []
        self._before: dict[signal.Signals, Any] = {}
        self._handles: list[RemovableEventHandle] = []

    def attach(self, engine: Engine) -> StopOnSignal:
        """Listen to the signals on behalf of `engine`; returns self, for use in a `with` statement.

        Raises:
            EngineError: called outside the main thread, where Python delivers no signals, or when attached already.
        """
        if threading.current_thread() is not threading.main_thread():
            raise EngineError("StopOnSignal must be attached in the main thread: Python handles signals only there")
        if self._handles:
            raise EngineError("StopOnSignal is attached already; detach() it first, or make another one")
        self.received, self._is_told, self._noted = None, False, []
        for number in self.signals:
            before = signal.signal(number, self._note)
            # None is a handler that C code installed, which Python cannot give back.
            self._before[number] = signal.SIG_DFL if before is None else before
            self._take_over(before)
        # In the engine's own thread, at the points where a stop may be asked for.
        for event in (Events.STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
            self._handles.append(engine.add_event_handler(event, self._tell))
        for other in self.hurries:
            for event in (Events.STARTED, Events.ITERATION_COMPLETED):
                self._handles.append(other.add_event_handler(event, self._hurry))
        return self

    def _take_over(self, before: Any) -> None:
        """Heed a signal that came before anybody could, and that the handler until now noted (a worker's bootstrap)."""
        noted = getattr(before, "received", None)
        if isinstance(noted, list) and noted:
            if self.received is None:
                self._note(noted[0], None)
            noted.clear()

    def detach(self) -> None:
        """Give the signals the handlers they had, and leave the engine; twice is once."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> StopOnSignal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing here may block or allocate much: it runs between any two instructions of whatever was interrupted.
        now = time.monotonic()
        if any(kind == number and now - at < self.together for kind, at in self._noted):
            return
        self._noted.append((number, now))
        if self.received is None:
            self.received = signal.Signals(number)
        elif len(self._noted) > 2:  # as if nobody listened: the process ends at once, with the signal's own status
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _tell(self, engine: Engine) -> None:
        if self.received is not None and not self._is_told:
            self._is_told = True
            engine.terminate(reason=f"signal {self.received.name}", outcome=self.outcome)

    def _hurry(self, engine: Engine) -> None:
        if len(self._noted) > 1 and self.received is not None:
            engine.terminate(reason=f"signal {self.received.name}, twice")
