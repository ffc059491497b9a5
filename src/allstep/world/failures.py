"""Reporting this rank's exceptions to the monitoring service, before anything is torn down.

Contract of `summarize`, a pure function: it is given an exception that is about to leave a run, a World or the script,
and says whether it is *derived*. A derived exception is about another rank's end, such as a connection that broke or a
collective whose time is up, and is never taken for the root cause while a better one exists. An exception is judged
with the ones that led to it: clean-up in a `finally:` that fails because the peers are gone does not hide the error
before it.

Contract of `Reporter`: a World has one where a service watches over its ranks. `seen` is called with an exception on
its way out of a run, which the script may still catch: the service keeps it, and does nothing until something else
shows that the rank is failing. `leaving` is called when an exception leaves the World or the script. `withdraw` takes
back what was only seen, when the rank goes on: a run begins or goes on, or all ranks have completed a collective. Each
exception is sent at most once in each way. While the reporter is installed, `sys.excepthook` reports first. Where no
supervisor prints the report, a failed process waits a moment at its very end, so that the service can print it. No call
raises, and none takes longer than the client's bound.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from allstep.exit_codes import CANCELLED, IN_ORDER
from allstep.monitor.client import Client
from allstep.protocol.heartbeat import RankActivity
from allstep.protocol.last_words import about_another_rank
from allstep.protocol.messages import CheckpointSaved, Failure
from allstep.world.monitor_link import MonitorService


@dataclass(frozen=True, slots=True)
class ExceptionSummary:
    """An exception as text.

    Attributes:
        kind: qualified name of its type.
        message: what it says.
        traceback: as Python prints it, with the exceptions that led to it.
        derived: whether it is about another rank's end.
    """

    kind: str
    message: str
    traceback: str
    derived: bool


def summarize(error: BaseException) -> ExceptionSummary:
    """The exception as text; a derived one that was raised during or from an ordinary one is named after that."""
    others = list(_led_to(error))
    named, derived = error, any(about_another_rank(each) for each in others)
    if about_another_rank(error):
        ordinary = next((each for each in others if not about_another_rank(each)), None)
        named, derived = ordinary or error, ordinary is None
    return ExceptionSummary(_name(type(named)), _message(named), "".join(traceback.format_exception(error)), derived)


def _led_to(error: BaseException) -> Iterator[BaseException]:
    """What the exception was raised from or during, what that was, and so on."""
    seen = {id(error)}
    link = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _name(kind: type[BaseException]) -> str:
    return (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a broken __str__ must not hide the error
        return f"<a {type(error).__name__} whose text cannot be made>"


_MARK = "_allstep_reported"
_LINGER_S = 2.0


class Reporter:
    """The reports of one rank, which `client` carries to `service`.

    `device` is this rank's, as text for the report; `has_seen` whether something was seen and not withdrawn.
    """

    def __init__(
        self, client: Client, service: MonitorService, activity: RankActivity, rank: int, attempt: int, device: str
    ) -> None:
        self.client = client
        self._service = service
        self.has_seen = False
        self._activity = activity
        self._rank = rank
        self._attempt = attempt
        self._device = device
        self._is_over = False
        self._closed_in_order = True
        self._code = 0
        self._previous = sys.excepthook

    def seen(self, error: BaseException) -> None:
        """An exception leaves a run; KeyboardInterrupt, SystemExit and the like are no failures there."""
        if isinstance(error, Exception):
            self.has_seen = True
            # A rank that completes a collective with the others goes on, whatever it has caught.
            self._activity.when_met = self.withdraw
            self._send(error, leaving=False)

    def leaving(self, error: BaseException) -> None:
        """An exception leaves the World or the script."""
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            self._code = error.code
        elif isinstance(error, KeyboardInterrupt):
            self._code = CANCELLED
        if is_failure(error):
            self._send(error, leaving=True)
            if not self._service.supervised:
                # As late as can be: a launcher such as torchrun ends the others as soon as this process has ended.
                atexit.register(self.client.linger, _LINGER_S)

    def saved(self, step: int, seconds: float, address: str) -> None:
        """A checkpoint was committed; called from any thread."""
        if not self._is_over:
            self.client.tell(CheckpointSaved(self._rank, step, round(seconds, 3), address))

    def withdraw(self) -> None:
        """This rank goes on after what was seen."""
        if self.has_seen:
            self.has_seen = False
            self._activity.when_met = None
            self.client.withdraw()

    def install(self) -> None:
        """Have uncaught exceptions reported before they are printed."""
        self._previous, sys.excepthook = sys.excepthook, self._hook

    def abandon(self, error: BaseException) -> None:
        """The World could not be opened: this rank leaves the others."""
        self.seen(error)
        self.left_open()
        self.end(failed=False)

    def left_open(self) -> None:
        """The interpreter ends with the World still open."""
        self._closed_in_order = False

    def say_goodbye(self) -> None:
        """This rank has done its part, and takes down what it has in common with the others."""
        self.client.say_goodbye(closed=self._closed_in_order, code=self._code)

    def end(self, *, failed: bool) -> None:
        """The World is over, and its process group gone. After a failure the client stays until the process ends."""
        if not failed:
            self.client.close(closed=self._closed_in_order)
            self._service.release()
        self._is_over = True
        if sys.excepthook == self._hook:  # else another hook calls this one, which stays and reports nothing more
            sys.excepthook = self._previous

    def _hook(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not self._is_over:
            self.leaving(error)
        self._previous(kind, error, traceback)

    def _send(self, error: BaseException, *, leaving: bool) -> None:
        said = getattr(error, _MARK, None)
        # The mark on the exception is whether it has been said as leaving, which is more than having been seen.
        if self._is_over or said is True or said is leaving:
            return
        with contextlib.suppress(AttributeError, TypeError):  # a class may forbid attributes: then it is said twice
            setattr(error, _MARK, leaving)
        about, activity = summarize(error), self._activity
        self.client.report(
            Failure(
                self._rank,
                self._attempt,
                0,
                kind=about.kind,
                message=about.message,
                traceback=about.traceback,
                epoch=activity.epoch,
                iteration=activity.iteration,
                section=activity.section_name,
                derived=about.derived,
                device=self._device,
                leaving=leaving,
            )
        )


def is_failure(error: BaseException) -> bool:
    """Whether a process that ends by this exception has failed; not by Ctrl-C, a preemption, or an exit with code 0."""
    if isinstance(error, SystemExit):
        return error.code is not None and error.code not in IN_ORDER
    return not isinstance(error, KeyboardInterrupt | GeneratorExit)
