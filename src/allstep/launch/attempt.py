"""One attempt on this machine: its workers started, watched, told to leave, ended.

Contract: `run` is called once, from the main thread, and returns when no worker of this machine is left, nor anything
in a worker's process group, and the control channel has said that the attempt is over everywhere. Then `outcome` says
what came of it. What it does:
- All workers exit with 0: success.
- The channel's service settles on a case (a failure or a hang): it orders the other ranks to leave; who has not after
  `LEAVE` seconds is killed (a pending gloo collective cannot be aborted, and SIGTERM is for preemption only).
- A signal to stop (`heed`): passed on (SIGINT as such, the others as SIGTERM), then SIGCONT, so that a worker that was
  stopped can act on it. After `grace` seconds, or a second signal, SIGKILL. SIGUSR1 and SIGUSR2 are passed on.
- A worker's descendants that hold its output open are read for `LINGER` seconds after the last worker's end, then
  killed.
What can go wrong: a worker cannot be started; `start` raises LaunchError, and `close` ends those that were.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from allstep.channel.causes import Case
from allstep.channel.ending import WorkerEnd
from allstep.channel.hub import Hub, HubEvent
from allstep.channel.relay import Relay
from allstep.errors import LaunchError
from allstep.exit_codes import PEER_LOST
from allstep.launch.folder import AttemptFolder
from allstep.launch.loop import Loop
from allstep.launch.memory import MemoryWatch
from allstep.launch.plan import WorkerPlan
from allstep.launch.process import WorkerProcess, start_worker
from allstep.launch.rank_output import RankOutput
from allstep.launch.signals import PASS_ON, STOP
from allstep.launch.streams import RankStreams
from allstep.launch.terminal import Terminal

LEAVE = 1.0
"""Seconds that peers of a failed worker have to leave."""

LINGER = 1.0
"""Seconds for which output is read after the last worker has ended."""
