"""A rank's end of the control channel.

Contract: `Client.connect` is called once per World, before the process group is opened; it returns when all ranks have
arrived and fit, and raises with the verdict otherwise. `start` begins to beat once a second in a daemon thread, which
also obeys the service: `Leave` writes the report (if it carries one) to standard error and ends the process, `AskStacks`
is answered with the stacks of all threads. `report` says at once that an exception is on its way, before anything is
torn down; `close` says goodbye in order. No call blocks for longer than its stated bound, and a service that is gone or
frozen costs a rank nothing but its watch.
"""

from __future__ import annotations

from allstep.channel.messages import Failure, Hello
from allstep.channel.pulse import Pulse

REPORT_S = 1.0
"""Seconds that `Client.report` takes at most."""


class Client:
    """The connection of one rank."""

    @classmethod
    def connect(cls, address: str, hello: Hello, timeout: float) -> Client:
        """Introduce this rank and wait for all others.

        Args:
            address: HOST:PORT of the service.
            hello: who this rank is; `hello.patience` is set to `timeout`.
            timeout: seconds that the ranks have to arrive.

        Raises:
            WorldError: nothing answers there, the service turned this rank away, or ranks are missing or do not fit.
        """
        raise NotImplementedError

    def start(self, pulse: Pulse) -> None:
        """Begin to beat, and to obey the service, in a daemon thread."""
        raise NotImplementedError

    def report(self, failure: Failure) -> None:
        """Send a failure now; returns within `REPORT_S`. `number` and `attempt` of the failure are filled in here."""
        raise NotImplementedError

    def report_exception(self, error: BaseException, *, derived: bool = False, device: str = "") -> None:
        """Report an exception once: a second call for the same one, at an outer door, does nothing.

        Place (epoch, iteration, section) is taken from the pulse.
        """
        raise NotImplementedError

    def linger(self, timeout: float) -> None:
        """After a report, let the service finish its judgement, and write the report if it asks for it.

        For ranks without a supervisor: their launcher ends the others as soon as this process has ended.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Say goodbye: this World was closed in order."""
        raise NotImplementedError
