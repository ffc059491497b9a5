"""This machine in a run: what it was asked to start, and how it carries out its share of an attempt.

Contract: `supervisor` makes one `Machine` for a run, within a `SignalPipe`, and closes it at the end. `head` or
`follower` calls `attempt` once for each attempt, with this machine's share and the monitoring service that they opened.
`stopped_by` is the first signal to stop that came, also between attempts. `say` and `write_out` speak to the person at
the terminal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from allstep.launch.attempt import Attempt
from allstep.launch.devices import Devices
from allstep.launch.event_loop import STOP_SIGNALS, EventLoop, SignalPipe
from allstep.launch.folder import AttemptFolder
from allstep.launch.forking import can_fork
from allstep.launch.output import Terminal
from allstep.launch.settings import LaunchSettings, shown_ranks
from allstep.launch.shared_imports import shared_imports
from allstep.launch.worker_plan import Command, Share, plan_workers
from allstep.monitor.service import Service
from allstep.protocol.descriptors import raise_descriptor_limit, set_descriptor_limit
from allstep.protocol.masking import secret_values

if TYPE_CHECKING:
    from allstep.launch.topology import Nodes


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start on this machine.

    Args:
        settings: what was asked for.
        command: what each worker runs.
        name: the run's name, where this machine decides it.
        workers: ranks on this machine.
        devices: the CUDA devices that they share.
        cores: CPU cores that this process may use.
        environ: what the workers inherit; NO_COLOR and ALLSTEP_SECRET are looked at.
        nodes: this machine's place among several, or None.
        bound: the CPUs that each worker runs on; empty where any of them may.
    """

    settings: LaunchSettings
    command: Command
    name: str
    workers: int
    devices: Devices
    cores: int
    environ: Mapping[str, str]
    nodes: Nodes | None = None
    bound: tuple[tuple[int, ...], ...] = ()


class Machine:
    """The loop, the terminal and the signals of this machine's supervisor, over all its attempts.

    Args:
        launch: what to start.
        signals: entered already.

    Attributes:
        secrets: values that are kept out of all that is said and written about the run.
        signalled: called with each signal that comes.
    """

    def __init__(self, launch: Launch, signals: SignalPipe) -> None:
        self.launch = launch
        self.loop = EventLoop()
        self.secrets = secret_values(launch.command.arguments, {**launch.environ, **launch.settings.env})
        self.terminal = Terminal(self.loop, launch.environ, self.secrets)
        self.say = self.terminal.say
        self.stopped_by: signal.Signals | None = None
        self.signalled: Callable[[signal.Signals], object] = lambda number: None
        self._descriptors = raise_descriptor_limit()  # the workers get back what there was before
        self._signals = signals
        self._attempt: Attempt | None = None
        self.loop.watch(signals.fd, self._handle_signals)

    def stopped(self) -> bool:
        """Whether a signal to stop has come."""
        return self.stopped_by is not None

    def attempt(
        self, share: Share, monitor: Service, folder: AttemptFolder | None, *, relayed: bool = False
    ) -> Attempt:
        """Run this machine's share of an attempt to its end.

        Args:
            share: this machine's part.
            monitor: the service that the ranks report to.
            folder: where logs go, or None for no logs.
            relayed: another machine decides.

        Raises:
            LaunchError: a worker could not be started; the others are ended.
            ConfigurationError: output was asked for of a rank that does not exist.
        """
        launch = self.launch
        shown = shown_ranks(launch.settings.show, share.world_size)
        plans = plan_workers(
            launch.settings,
            launch.command,
            share,
            environ=launch.environ,
            devices=launch.devices,
            cores=launch.cores,
            bound=launch.bound,
            descriptors=self._descriptors,
            status_columns=self.terminal.status_columns if 0 in shown else None,  # of the main rank, if of any
        )
        self._announce(share, folder)
        attempt = Attempt(
            plans,
            monitor,
            loop=self.loop,
            terminal=self.terminal,
            folder=folder,
            shown=shown,
            grace=launch.settings.grace,
            relayed=relayed,
            shared=self._shared_imports(share),
        )
        with contextlib.closing(attempt):
            attempt.start()
            self._attempt = attempt
            try:
                attempt.run()
            finally:
                self._attempt = None
        return attempt

    def turn(self, until: float) -> None:
        """Wait for the next event between attempts, at most until then."""
        self.terminal.adjust()
        self.loop.turn(until)

    def write_out(self) -> None:
        """Wait until everything is written, or a signal ends the wait."""
        before = self.stopped_by
        self.stopped_by = None  # a signal that came before was about the run, not about this wait
        while self.terminal.waiting and not self.stopped():
            self.turn(time.monotonic() + 3600)
        self.stopped_by = self.stopped_by or before

    def close(self) -> None:
        """Close the event loop."""
        self.loop.close()
        set_descriptor_limit(self._descriptors, os.getpid())

    def _handle_signals(self) -> None:
        for number in self._signals.take():
            self.signalled(number)
            if self._attempt is not None:
                self._attempt.handle_signal(number)
            # Kept beside the attempt's own, since a signal may come between two attempts.
            if number in STOP_SIGNALS and self.stopped_by is None:
                self.stopped_by = number

    def _shared_imports(self, share: Share) -> tuple[str, ...]:
        """What this machine's workers import before they part."""
        # A single worker shares with nobody, and would only pay for one process more.
        settings = self.launch.settings
        if share.workers == 1 or not settings.share_imports or settings.debug_rank is not None or not can_fork():
            return ()  # nor can one have the terminal whose streams are the others' too
        return shared_imports(self.launch.command, settings.env)

    def _announce(self, share: Share, folder: AttemptFolder | None) -> None:
        here = f"{share.workers} worker{'s' if share.workers > 1 else ''}"
        if share.nodes > 1:
            here += f" of {share.world_size}, node {share.node_rank} of {share.nodes}"
        kept = f", output kept in {folder.path}" if folder is not None else ""
        self.terminal.kept_in = str(folder.path) if folder is not None else ""
        self.say(f"run {share.run_id}: {here}{kept}")
