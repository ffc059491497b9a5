"""This machine's preflight agent as its supervisor sees it: a process to which orders go and from which answers come.

Contract: `AgentProcess` starts `allstep.preflight.agent`, watches what it says on the run's event loop, and gives each
line to `hear`, also after it has ended: then one empty line. `close` ends the process and all that it started. On node
0 the lines go to `preflight_rounds`; on the others `follower` passes orders and answers on, without looking into them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from allstep.errors import LaunchError
from allstep.launch.devices import device_environment
from allstep.launch.machine import Machine
from allstep.protocol.messages import encode
from allstep.protocol.preflight_messages import PreflightOrder
from allstep.protocol.user_secret import VARIABLE

_CHUNK = 1 << 16


class AgentProcess:
    """A preflight agent that runs.

    Args:
        machine: this one.
        hear: called with each line that the agent writes, its end included; with none when the agent has ended.

    Raises:
        LaunchError: it cannot be started.
    """

    def __init__(self, machine: Machine, hear: Callable[[bytes], None]) -> None:
        self._machine = machine
        self._hear = hear
        self._said = bytearray()
        launch = machine.launch
        environ = {**launch.environ, **launch.settings.env}
        environ.pop(VARIABLE, None)  # the machines' own secret, as for workers
        try:
            self._process = subprocess.Popen(
                # Without this folder on the path: a script beside it may have the name of a library.
                [sys.executable, "-P", "-m", "allstep.preflight.agent"],
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"the preflight's process cannot be started: {error.strerror}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin.fileno()
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        machine.loop.watch(self._output, self._read)
        settings = {
            "workers": launch.workers,
            "folder": launch.settings.runs or "runs",
            "devices": launch.devices.names,
            "environments": [
                device_environment(launch.devices, rank, launch.workers) for rank in range(launch.workers)
            ],
            "fault": launch.settings.fault or launch.environ.get("ALLSTEP_FAULT", ""),
        }
        self._write(json.dumps(settings).encode() + b"\n")

    def order(self, order: PreflightOrder) -> None:
        """Have the agent take a step."""
        self._write(encode(order))

    def close(self) -> None:
        """End the agent and what it started."""
        self._machine.loop.forget(self._output)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()

    def _write(self, line: bytes) -> None:
        # Orders are far shorter than what a pipe holds, so this does not wait.
        with contextlib.suppress(OSError):
            os.write(self._input, line)

    def _read(self) -> None:
        try:
            chunk = os.read(self._output, _CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            self._machine.loop.forget(self._output)
            self._hear(b"")
            return
        self._said += chunk
        *lines, rest = bytes(self._said).split(b"\n")
        self._said = bytearray(rest)
        for line in lines:
            self._hear(line + b"\n")
