"""Two hosts on one machine, for tests: network namespaces with a link between them that can be cut.

Contract: `ensure_possible` returns where this process may make them, installing iproute2 where the environment allows
that; `Hosts.open` makes them and `close` removes exactly those. Each host has an address, a name of its own and
a hosts file; nothing of the machine's own network is touched, and several test processes do not meet. What can go
wrong: no root, no programs, or a kernel that refuses; each is `HostsUnavailable` and says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.jobs.launchers import ALLSTEP
from tests.jobs.programs import SYSTEM_PATH, ProgramsUnavailable, ensure_programs
from tests.jobs.running import Running, start


class HostsUnavailable(Exception):
    """Hosts cannot be made here; the message says why."""


def ensure_possible(environ: Mapping[str, str]) -> None:
    """Return where hosts can be made; with CI or ALLSTEP_TEST_INSTALL set, iproute2 is installed if it is missing."""
    if os.geteuid() != 0:
        raise HostsUnavailable("network namespaces need root")
    try:
        ensure_programs(("ip", "nsenter", "unshare"), ("iproute2", "util-linux"), environ)
    except ProgramsUnavailable as reason:
        raise HostsUnavailable(str(reason)) from None


class Hosts:
    """Hosts 0 and 1, named host0 and host1, between `open` and `close`."""

    def __init__(self, folder: Path, own_name: str | None = None) -> None:
        """`own_name` is the address that each host's own name has there, "" for none; by default the real one."""
        self.names = ("host0", "host1")
        self.addresses = ("10.77.0.1", "10.77.0.2")
        self._folder = folder
        self._own_name = own_name
        self.namespaces = tuple(f"allstep-{os.getpid()}-{index}" for index in range(2))
        self._undo = contextlib.ExitStack()

    def open(self) -> None:
        """Make them."""
        with self._undo as undo:
            for own, host in enumerate(self.names):
                known = zip(self.addresses, self.names, strict=True)
                table = [f"{ip} {name}\n" for ip, name in known if self._own_name is None or name != host]
                as_named = f"{self._own_name} {host}\n" if self._own_name else ""
                (self._folder / f"hosts{own}").write_text(f"127.0.0.1 localhost\n{as_named}{''.join(table)}")
            for namespace in self.namespaces:
                _ip("netns", "add", namespace)
                undo.callback(_ip, "netns", "delete", namespace)
            first, second = self.namespaces
            _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
            for namespace, address in zip(self.namespaces, self.addresses, strict=True):
                _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
                _ip("-n", namespace, "link", "set", "lo", "up")
                _ip("-n", namespace, "link", "set", "eth0", "up")
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Remove them."""
        self._undo.close()

    @contextlib.contextmanager
    def started(self, host: int, folder: Path, *arguments: str | Path) -> Iterator[Running]:
        """Start `allstep run` as one of the two nodes, in a folder of its own."""
        own = folder / self.names[host]
        own.mkdir()
        head = self.names[0] if self._own_name is None else self.addresses[0]
        node = ["--nnodes", "2", "--node-rank", str(host), "--rdzv", f"{head}:29400"]
        become = 'echo "$0" > /proc/sys/kernel/hostname; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        inside = ["unshare", "--uts", "--mount", "sh", "-c", become, self.names[host], self._folder / f"hosts{host}"]
        enter = ["nsenter", f"--net=/run/netns/{self.namespaces[host]}"]
        argv = [*enter, *inside, *ALLSTEP, "run", *node, *arguments]
        with start(own, argv, env={"PATH": SYSTEM_PATH, "OMP_NUM_THREADS": "1"}) as running:
            yield running

    def cut(self, host: int) -> None:
        """Cut the link at a host's side."""
        _ip("-n", self.namespaces[host], "link", "set", "eth0", "down")

    def restore(self, host: int) -> None:
        """Connect the link again."""
        _ip("-n", self.namespaces[host], "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    program = shutil.which("ip", path=SYSTEM_PATH)
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise HostsUnavailable(f"ip {' '.join(arguments)} failed: {done.stderr.strip()}")
