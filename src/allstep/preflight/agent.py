"""The process on each machine that takes the steps of a preflight; `python -m allstep.preflight.agent`.

Contract: the first line of standard input is JSON with what this machine's supervisor knows (`AgentSettings`). Each
further line is a `PreflightOrder`, and is answered on standard output; see `preflight_messages`. The steps:
- look: start a process for each device, run the host checks, and say what both came to and where this agent listens;
- clock: say the time;
- links: measure the ways to some peers, one after the other, or only connect to those of a lower rank, which measure;
- measure: some of them once more;
- reduce: have the devices take part in an all-reduce;
- end: nothing more is to come.
The end of standard input is the end of the process, and its children's. It leads a process group, by which the
supervisor ends all that is left of it. torch is imported in the devices' processes only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from allstep.faults import FaultPlan
from allstep.faults.fault import Fault, RankPosition
from allstep.host_checks import Host
from allstep.host_checks.checking import CHECKS, run_checks
from allstep.preflight import links
from allstep.preflight.judgement import ENDED
from allstep.protocol.connection import is_ready
from allstep.protocol.foreign_text import one_line
from allstep.protocol.messages import Message, decode, encode
from allstep.protocol.name_lookup import resolve
from allstep.protocol.preflight_messages import DeviceSums, NodeFinding, PreflightOrder, StepDone

HOST_CHECKS_S = 5.0
DEVICES_S = 45.0
"""Seconds that importing torch and computing may take together."""
REDUCE_S = 20.0

_ELSEWHERE = ("torch", "clock")  # the devices' processes import torch, and clocks are compared with each other
_PROGRAM = Path(__file__).with_name("device_sums.py")


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What an agent is told by its own machine's supervisor.

    Args:
        workers: ranks on this machine.
        folder: where runs go.
        devices: names of the devices that ranks can use, as CUDA_VISIBLE_DEVICES would have them.
        environments: for each rank, variables that show it its own device.
        fault: a fault plan's text.
    """

    workers: int
    folder: str
    devices: tuple[str, ...] = ()
    environments: tuple[Mapping[str, str], ...] = ()
    fault: str = ""


@dataclass
class _DeviceProcess:
    """A device's process and what it says, a line at a time."""

    process: subprocess.Popen[bytes]
    said: bytearray = field(default_factory=bytearray)

    def answer(self, until: float) -> dict[str, Any]:
        """Its next line of JSON; raises RuntimeError with why there is none."""
        stream = _open(self.process.stdout)
        while b"\n" not in self.said:
            if not is_ready(stream.fileno(), until - time.monotonic()):
                raise RuntimeError("it did not come to an end in time")
            chunk = os.read(stream.fileno(), 1 << 16)
            if not chunk:
                raise RuntimeError(self._last_words())
            self.said += chunk
        line, _, rest = bytes(self.said).partition(b"\n")
        self.said = bytearray(rest)
        try:
            return dict(json.loads(line))
        except ValueError:
            return self.answer(until)  # a library printed something

    def tell(self, line: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError):
            _open(self.process.stdin).write(json.dumps(line).encode() + b"\n")
            _open(self.process.stdin).flush()

    def _last_words(self) -> str:
        words = _open(self.process.stderr).read().decode(errors="replace").strip().splitlines()
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{ENDED} {how}" + (f": {one_line(words[-1])}" if words else "")


class Agent:
    """Takes one step after another; `answer` is called with what there is to say."""

    def __init__(self, settings: AgentSettings, out: IO[bytes]) -> None:
        self._settings = settings
        self._out = out
        self._server: links.LinkServer | None = None
        self._devices: list[_DeviceProcess] = []
        self._ahead = 0.0

    def take(self, order: PreflightOrder) -> None:
        """Take a step, and say that it is done."""
        port = store = 0
        match order.step:
            case "look":
                port, store = self._look(order)
            case "links" | "measure":
                for peer in order.peers:
                    host, at = order.addresses[str(peer)], int(order.ports[str(peer)])
                    look = links.measure if peer > order.node else links.greet
                    self._say(look(peer, host, at, order.key))
            case "reduce":
                self._reduce(order)
        self._say(StepDone(order.number, time.time() + self._ahead, port, store))

    def close(self) -> None:
        """End the devices' processes."""
        for each in self._devices:
            each.process.kill()

    def _look(self, order: PreflightOrder) -> tuple[int, int]:
        settings = self._settings
        plan = FaultPlan.parse(settings.fault)
        faults = [_striking(plan, order.first_rank + each) for each in range(settings.workers)]
        self._ahead = sum(fault.argument for rank in faults for fault in rank if fault.kind == "clock")
        self._server = links.LinkServer(order.key)
        host = Host(
            environ=os.environ,
            folder=Path(settings.folder),
            workers=settings.workers,
            nodes=order.nodes,
            visible=lambda: settings.devices,
            within=HOST_CHECKS_S,
        )
        # A GPU on which the preflight itself computes would look like one that others use.
        if settings.devices:
            self._check(host)
        for local_rank in range(settings.workers):
            serves = order.first_rank + local_rank == 0
            wrong = any(fault.kind == "wrong_sums" for fault in faults[local_rank])
            self._devices.append(self._start(order, local_rank, serves=serves, wrong=wrong))
        if not settings.devices:
            self._check(host)
        store, until = 0, time.monotonic() + DEVICES_S
        for local_rank, each in enumerate(self._devices):
            try:
                said = each.answer(until)
            except RuntimeError as error:
                self._say(DeviceSums(local_rank, "", problem=f"torch could not compute on it: {error}"))
            else:
                store = store or int(said["store"])
                device = str(said["device"])
                problem = missing_device(device, settings.devices)
                self._say(DeviceSums(local_rank, device, str(said["digest"]), bool(said["exact"]), problem))
        return self._server.port, store

    def _check(self, host: Host) -> None:
        """Say what the host checks find."""
        checks = [check for check in CHECKS if check.subject not in _ELSEWHERE]
        for finding in run_checks(host, checks):
            if finding.verdict != "good":
                self._say(NodeFinding(finding.subject, finding.verdict, finding.text, finding.remedy))

    def _start(self, order: PreflightOrder, local_rank: int, *, serves: bool, wrong: bool) -> _DeviceProcess:
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self._settings.environments:
            environ |= self._settings.environments[local_rank]
        if "GLOO_SOCKET_IFNAME" not in environ and (name := _interface(order.addresses.get(str(order.node), ""))):
            environ["GLOO_SOCKET_IFNAME"] = name
        pipe = subprocess.PIPE
        arguments = [str(local_rank), "store" if serves else "", "wrong" if wrong else ""]
        command = [sys.executable, "-P", str(_PROGRAM), *arguments]
        return _DeviceProcess(subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, stderr=pipe))

    def _reduce(self, order: PreflightOrder) -> None:
        until = time.monotonic() + REDUCE_S
        for local_rank, each in enumerate(self._devices):
            rank = order.first_rank + local_rank
            place = {"rank": rank, "size": order.world_size, "host": order.addresses["0"], "port": order.store}
            each.tell(place)
        for local_rank, each in enumerate(self._devices):
            try:
                problem = str(each.answer(until)["problem"])
            except RuntimeError as error:
                problem = str(error)
            if problem:
                self._say(DeviceSums(local_rank, "", problem=one_line(problem)))

    def _say(self, message: Message) -> None:
        self._out.write(encode(message))
        self._out.flush()


def missing_device(device: str, devices: tuple[str, ...]) -> str:
    """Why the device that torch chose is not what a rank here is given, or ""."""
    if device == "cpu" and devices:
        return f"torch finds no GPU, and ranks here are given {', '.join(devices)}"
    return ""


def _striking(plan: FaultPlan, rank: int) -> list[Fault]:
    return [fault for fault in plan.faults if fault.strikes(RankPosition("preflight", rank))]


def _interface(address: str) -> str:
    """The interface that has an address, by which other machines reach this one; empty where none has."""
    try:
        found = {each[1][0] for each in resolve(address, 0)} if address else set()
    except (OSError, UnicodeError):
        return ""
    families = (socket.AF_INET, socket.AF_INET6)
    return next(
        (
            name
            for name, has in psutil.net_if_addrs().items()
            if any(each.family in families and each.address in found for each in has)
        ),
        "",
    )


def _open(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def main() -> None:
    """Take the steps that come on standard input."""
    given = json.loads(sys.stdin.buffer.readline())
    environments = tuple(given.pop("environments"))
    agent = Agent(AgentSettings(**given, environments=environments), sys.stdout.buffer)
    with contextlib.closing(agent):
        for line in sys.stdin.buffer:
            order = decode(line.rstrip(b"\n"))
            assert isinstance(order, PreflightOrder)
            if order.step == "end":
                break
            agent.take(order)


if __name__ == "__main__":
    main()
