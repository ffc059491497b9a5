"""All checks of a machine at once, each bounded in time.

Contract: `run_checks` returns the findings of all checks in the order of `CHECKS`, after `Host.within` plus one second
at the latest. Each check runs in a thread of its own: a file server or a name server that does not answer must not
hide what the others found. A check that has not ended by then is a finding, and so is one that raises. Threads that
still wait are daemons, so they do not keep the process; what they have started is killed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from allstep.host_checks import accelerators, clocks, limits, network, run_folder, scheduler, software, torch_build
from allstep.host_checks.finding import Host, HostFinding
from allstep.protocol.foreign_text import one_line

LEEWAY_S = 1.0
"""Seconds after `Host.within` in which a check that waited for something can still say so itself."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at.

    Args:
        subject: what its findings are about, where it does not get to say so itself.
        look: the check.
        silence: what to do where it does not end.
    """

    subject: str
    look: Callable[[Host], Iterable[HostFinding]]
    silence: str


CHECKS: tuple[Check, ...] = (
    Check("python", software.check_python, "Look whether the disk with the Python environment answers"),
    Check("requirements", software.check_requirements, "Look whether the disk with the Python environment answers"),
    Check("torch", torch_build.check_torch, "Look whether the disk with the Python environment answers"),
    Check("GPUs", accelerators.check_accelerators, "Look whether nvidia-smi answers, and at dmesg"),
    Check("host name", network.check_host_name, "Look at the name servers in /etc/resolv.conf"),
    Check("interfaces", network.check_interfaces, "Look at `ip address`"),
    Check("ports", network.check_ports, "Look at the name servers in /etc/resolv.conf"),
    Check("shared memory", limits.check_shared_memory, "Look at the mount of /dev/shm"),
    Check("limits", limits.check_resource_limits, "Look at `ulimit -a`"),
    Check("memory", limits.check_memory, "Look at the memory cgroup of this process"),
    Check("cores", limits.check_cores, "Look whether nvidia-smi answers"),
    Check("folder", run_folder.check_folder, "The file server may not answer: ask its administrator, or use --folder"),
    Check("clock", clocks.check_clock, "Look at `timedatectl`"),
    Check("SLURM", scheduler.check_slurm, "Look at `scontrol ping`"),
)
"""What is looked at, in the order in which it is shown."""


def run_checks(host: Host, checks: Sequence[Check] = CHECKS) -> list[HostFinding]:
    """Look at a machine; see the module's contract."""
    until = time.monotonic() + host.within + LEEWAY_S
    found: dict[int, list[HostFinding]] = {}
    threads = [
        threading.Thread(target=_look, args=(check, host, found, index), daemon=True, name=f"allstep {check.subject}")
        for index, check in enumerate(checks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    for process in host.asked:  # a thread that is late does not get to it
        if process.poll() is None:
            process.kill()
    silent = f"was not to be known within {host.within:g} s"
    return [
        finding
        for index, check in enumerate(checks)
        for finding in found.get(index) or [HostFinding(check.subject, "bad", silent, check.silence)]
    ]


def _look(check: Check, host: Host, found: dict[int, list[HostFinding]], index: int) -> None:
    try:
        result = list(check.look(host))
    except Exception as error:
        what = one_line(f"{type(error).__name__}: {error}")
        remedy = "This is a fault of the check: please report it with this line"
        result = [HostFinding(check.subject, "warning", f"could not be looked at: {what}", remedy)]
    found[index] = result or [HostFinding(check.subject, "good", "nothing to say")]
