"""`StopOnSignal`: a signal to one rank ends the run on all of them, in good order.

Contract: attached to an engine from the main thread, before its run, it takes over the given signals of this process.
Their handler only notes that a signal came, since it may run between any two instructions; the engine's own thread asks
for the run's end after the present iteration or epoch. So all ranks stop at the same iteration, by the end of the next
window, whichever of them the signal reached. `detach`, or the end of a `with` block, gives the signals back.

A second signal, of any of the kinds, hurries: engines that were named for it end as well, such as an evaluator that the
trainer's handler runs. It gives all signals their default action, so that a third one ends the process at once. A
signal that came before `attach`, and that `allstep run` kept, counts. What can go wrong: a step that hangs never comes
to ask; and a handler installed by C code cannot be given back.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

from allstep.engine import Engine, Events, RemovableEventHandle
from allstep.errors import EngineError

SIGNAL_REASON = "signal "
"""What the reason of a stop for a signal begins with."""


class StopOnSignal:
    """Turns signals into `terminate(reason="signal SIGTERM")`.

    Args:
        signals: which; by default the ones that schedulers send before the end of a job.
        hurries: engines that a second signal ends as well.

    Attributes:
        received: the first signal that came since `attach`, or None.
    """

    def __init__(
        self,
        signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1),
        *,
        hurries: Iterable[Engine] = (),
    ) -> None:
        self.signals = tuple(signal.Signals(number) for number in signals)
        self.received: signal.Signals | None = None
        self.hurries = tuple(hurries)
        self._is_told = self._hurries_now = False
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
        self.received, self._is_told, self._hurries_now = None, False, False
        for number in self.signals:
            before = signal.signal(number, self._note)
            self._before[number] = signal.SIG_DFL if before is None else before
            self._take_over(before)
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
            self.received = self.received or signal.Signals(noted[0])
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
        if self.received is None:
            self.received = signal.Signals(number)
            return
        self._hurries_now = True
        for each in self.signals:
            signal.signal(each, signal.SIG_DFL)

    def _tell(self, engine: Engine) -> None:
        if self.received is not None and not self._is_told:
            self._is_told = True
            engine.terminate(reason=f"{SIGNAL_REASON}{self.received.name}")

    def _hurry(self, engine: Engine) -> None:
        if self._hurries_now and self.received is not None:
            engine.terminate(reason=f"{SIGNAL_REASON}{self.received.name}, twice")
