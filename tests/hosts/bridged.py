"""Several hosts on one machine, all of them on one bridge: network namespaces with names and hosts files of their own.

Contract: like `hosts.Hosts`, for any number of hosts and without links that are cut by default. `inside` is what to put
before a command to have it run in a host; `tc`, `nft` and a changed hosts file make its network ill.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.hosts.hosts import HostsUnavailable
from tests.jobs.launchers import ALLSTEP
from tests.jobs.programs import SYSTEM_PATH
from tests.jobs.running import Running, start

BECOME = """
echo "$0" > /proc/sys/kernel/hostname
mount --bind "$1" /etc/hosts
eval "$2"
shift 2
exec "$@"
"""


class BridgedHosts:
    """Hosts host0 to hostN between `open` and `close`; the bridge's name and networks are this process's own.

    `name` is what they are called before their number, and `domain` what follows it in a second, longer name.
    """

    def __init__(self, folder: Path, count: int, *, name: str = "host", domain: str = "") -> None:
        self.names = [f"{name}{index}" for index in range(count)]
        self._domain = domain
        self.addresses = [f"10.78.0.{index + 1}" for index in range(count)]
        self._bridge = f"ab{secrets.token_hex(3)}"  # the kernel removes old ones only some time after they were deleted
        self.namespaces = [f"allstep-{self._bridge}-{index}" for index in range(count)]
        self._folder = folder
        self._undo = contextlib.ExitStack()

    def open(self) -> None:
        """Make them."""
        with self._undo as undo:
            command("ip", "link", "add", self._bridge, "type", "bridge")
            undo.callback(command, "ip", "link", "delete", self._bridge)
            command("ip", "link", "set", self._bridge, "up")
            for index, (name, namespace) in enumerate(zip(self.names, self.namespaces, strict=True)):
                table = [
                    f"{ip} {f'{other}.{self._domain} ' * bool(self._domain)}{other}\n"
                    for ip, other in zip(self.addresses, self.names, strict=True)
                ]
                (self._folder / f"hosts-{name}").write_text("127.0.0.1 localhost\n" + "".join(table))
                command("ip", "netns", "add", namespace)
                undo.callback(command, "ip", "netns", "delete", namespace)
                ours = f"{self._bridge}-{index}"
                command("ip", "link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", namespace)
                command("ip", "link", "set", ours, "master", self._bridge, "up")
                command("ip", "-n", namespace, "address", "add", f"{self.addresses[index]}/24", "dev", "eth0")
                command("ip", "-n", namespace, "link", "set", "lo", "up")
                command("ip", "-n", namespace, "link", "set", "eth0", "up")
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Remove them."""
        self._undo.close()

    def inside(self, host: int, first: str = ":") -> list[str]:
        """What to put before a command to have it run in a host, after `first`, a line of shell there."""
        name = self.names[host]
        become = ["unshare", "--uts", "--mount", "--propagation", "private", "sh", "-ec", BECOME, name]
        return [*self.namespace(host), *become, str(self._folder / f"hosts-{name}"), first]

    def namespace(self, host: int) -> list[str]:
        """What to put before a command to have it act on a host's network alone."""
        return ["nsenter", f"--net=/run/netns/{self.namespaces[host]}"]

    def limit_rate(self, host: int, rate: str) -> None:
        """Let a host send no faster, such as "100mbit"."""
        tbf = [
            "tc",
            "qdisc",
            "replace",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "256kb",
            "latency",
            "400ms",
        ]
        command(*self.namespace(host), *tbf)

    def send_single_packets(self, host: int) -> None:
        """Have a host send packets of the size that a cable has: else a rule that drops one drops 64 kB at a time."""
        command("ip", "-n", self.namespaces[host], "link", "set", "eth0", "gso_max_segs", "1")

    def filter(self, host: int, *rules: str) -> None:
        """Have rules of nftables looked at for what comes to a host."""
        chain = "\n".join(["type filter hook input priority 0; policy accept;", *rules])
        table = f"table inet t {{\nchain c {{\n{chain}\n}}\n}}\n"
        command(*self.namespace(host), "nft", table)

    def rename(self, host: int, address: str) -> None:
        """Have a host's own name resolve to some address there."""
        path = self._folder / f"hosts-{self.names[host]}"
        path.write_text(
            f"{address} {self.names[host]}\n{path.read_text()}".replace(
                f"{self.addresses[host]} {self.names[host]}\n", ""
            )
        )

    @contextlib.contextmanager
    def running(
        self, folder: Path, *arguments: str | Path, first: Mapping[int, str] | None = None
    ) -> Iterator[list[Running]]:
        """Start `allstep run` on all of them, each in a folder of its own; `first` has lines of shell for some."""
        with contextlib.ExitStack() as stack:
            jobs = []
            for host, name in enumerate(self.names):
                own = folder / name
                own.mkdir(parents=True)
                node = ["--nnodes", str(len(self.names)), "--node-rank", str(host), "--rdzv", f"{self.names[0]}:29400"]
                line = f"cd {shlex.quote(str(own))}; {(first or {}).get(host, ':')}"
                argv = [*self.inside(host, line), *ALLSTEP, "run", *node, *arguments]
                env = {"PATH": SYSTEM_PATH, "OMP_NUM_THREADS": "1"}
                jobs.append(stack.enter_context(start(own, argv, env=env)))
            yield jobs


def command(*arguments: str) -> None:
    """Run a program of the system; `HostsUnavailable` where it fails."""
    program = shutil.which(arguments[0], path=SYSTEM_PATH)
    done = subprocess.run([str(program), *arguments[1:]], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise HostsUnavailable(f"{' '.join(arguments)} failed: {done.stderr.strip()}")
