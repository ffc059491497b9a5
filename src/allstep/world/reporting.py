"""Telling the service that watches over the ranks about this rank's exceptions, before anything is torn down.

Contract: a World with a client of the control channel has a `Reporter`. `seen` is called with an exception on its way
out of a run, which the script may still catch: the service keeps it and does nothing until something else shows that
the rank is failing. `leaving` is called when it leaves the World or the script. `withdraw` takes back what was only
seen, when the rank goes on: a run begins or goes on, or all ranks have met in a collective. Each exception is sent at
most once in each way. While it is installed, `sys.excepthook` reports first. Where no supervisor prints the whole
report, a failed process stays a moment at its very end, in which the service does. No call raises, and none takes
longer than the client's bound.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from types import TracebackType

from allstep.channel.client import Client
from allstep.channel.messages import Failure
from allstep.channel.pulse import Pulse
from allstep.exit_codes import PREEMPTED
from allstep.world.failure import describe
from allstep.world.service import Service

_MARK = "_allstep_reported"
_LINGER_S = 2.0


class Reporter:
    """The reports of one rank, which `client` carries to `service`."""

    def __init__(self, client: Client, service: Service, pulse: Pulse, rank: int, attempt: int, device: str) -> None:
        self.client = client
        self._service = service
        self.has_seen = False
        self._pulse = pulse
        self._rank = rank
        self._attempt = attempt
        self._device = device
        self._is_over = False
        self._closed_in_order = True
        self._previous = sys.excepthook

    def seen(self, error: BaseException) -> None:
        """An exception leaves a run; KeyboardInterrupt, SystemExit and the like are no failures there."""
        if isinstance(error, Exception):
            self.has_seen = True
            self._pulse.when_met = self.withdraw
            self._send(error, leaving=False)

    def leaving(self, error: BaseException) -> None:
        """An exception leaves the World or the script."""
        if is_failure(error):
            self._send(error, leaving=True)
            if not self._service.supervised:
                # As late as can be: a launcher such as torchrun ends the others as soon as this process has ended.
                atexit.register(self.client.linger, _LINGER_S)

    def withdraw(self) -> None:
        """This rank goes on after what was seen."""
        if self.has_seen:
            self.has_seen = False
            self._pulse.when_met = None
            self.client.withdraw()

    def install(self) -> None:
        """Have uncaught exceptions reported before they are printed."""
        self._previous, sys.excepthook = sys.excepthook, self._hook

    def give_up(self, error: BaseException) -> None:
        """No World comes of it: this rank leaves the others."""
        self.seen(error)
        self.left_open()
        self.end(failed=False)

    def left_open(self) -> None:
        """The interpreter ends and nobody closed the World."""
        self._closed_in_order = False

    def end(self, *, failed: bool) -> None:
        """The World is over, and its process group gone. After a failure the client stays until the process ends."""
        if not failed:
            self.client.close(closed=self._closed_in_order)
            self._service.release()
        self._is_over = True
        if sys.excepthook == self._hook:  # else somebody wrapped it, and it stays below, silent
            sys.excepthook = self._previous

    def _hook(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not self._is_over:
            self.leaving(error)
        self._previous(kind, error, traceback)

    def _send(self, error: BaseException, *, leaving: bool) -> None:
        said = getattr(error, _MARK, None)
        if self._is_over or said is True or said is leaving:
            return
        with contextlib.suppress(AttributeError, TypeError):  # a class may forbid attributes: then it is said twice
            setattr(error, _MARK, leaving)
        about, pulse = describe(error), self._pulse
        self.client.report(
            Failure(
                self._rank,
                self._attempt,
                0,
                kind=about.kind,
                message=about.message,
                traceback=about.traceback,
                epoch=pulse.epoch,
                iteration=pulse.iteration,
                section=pulse.section_name,
                derived=about.derived,
                device=self._device,
                leaving=leaving,
            )
        )


def is_failure(error: BaseException) -> bool:
    """Whether a process that ends by this exception has failed; not by Ctrl-C, making room, or an exit with code 0."""
    if isinstance(error, SystemExit):
        return error.code not in (None, 0, PREEMPTED)
    return not isinstance(error, KeyboardInterrupt | GeneratorExit)
