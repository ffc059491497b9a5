"""The supervisor of this machine's workers: what `allstep run` does once it knows what to start.

Contract: `supervise` is called from the main thread and returns the run's exit status when no worker of this machine is
left. One loop waits for everything at once: workers' ends (pidfd), their output, the control channel, signals, other
machines, room to write, and the next deadline; nothing is polled. On the only machine of a run, and on node 0 of
several, `leading` begins attempts and decides; on the others `following` does what it is told.
What can go wrong before the first worker runs is a LaunchError or ConfigurationError.
"""

from __future__ import annotations

import contextlib

from allstep.launch.event_loop import Signals
from allstep.launch.head import lead
from allstep.launch.machine import Launch, Machine


def supervise(launch: Launch) -> int:
    """Run this machine's part of a run to its end.

    Returns:
        The run's exit status.

    Raises:
        LaunchError: a worker could not be started, or the machines did not come together.
        ConfigurationError: output was asked for of a rank that does not exist.
    """
    with Signals() as signals, contextlib.closing(Machine(launch, signals)) as machine:
        try:
            if launch.nodes is None or launch.nodes.head:
                return lead(machine)
            from allstep.launch.follower import follow

            return follow(machine)
        finally:
            machine.write_out()
