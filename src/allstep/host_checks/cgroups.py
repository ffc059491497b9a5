"""Limits that control groups set for this process, in both versions of them.

Contract: `texts` gives the contents of one file in this process's group and in all groups above it, the nearest first:
any of them may set the limit that holds. In a container the path in /proc/self/cgroup is the host's and what is mounted
is the container's own group, which is then the only one.
"""

from __future__ import annotations

from pathlib import Path

from allstep.host_checks.finding import Host

_MOUNT = Path("sys/fs/cgroup")


def texts(host: Host, controller: str, name: str, old_name: str) -> list[str]:
    """The contents of a limit's file, from this process's group up.

    Args:
        host: where to look.
        controller: such as "memory".
        name: of the file in version 2.
        old_name: of the file in version 1.
    """
    found: list[str] = []
    for line in host.read("proc/self/cgroup").splitlines():
        hierarchy, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            mounts = [each for each in host.names(str(_MOUNT)) if controller in each.split(",")]
            found += [text for each in mounts for text in _upwards(host, _MOUNT / each, path, old_name)]
        elif hierarchy == "0" and not controllers:
            found += [text for mount in (_MOUNT, _MOUNT / "unified") for text in _upwards(host, mount, path, name)]
    return found


def smallest(values: list[str], unlimited: int = 1 << 62) -> int | None:
    """The smallest number among texts, of which "max", -1 and what is as large as `unlimited` mean none."""
    numbers = [int(each) for each in values if each.isdecimal()]
    return min((each for each in numbers if each < unlimited), default=None)


def _upwards(host: Host, mount: Path, path: str, name: str) -> list[str]:
    parts = Path(path.strip("/")).parts
    if ".." in parts:  # the process is above what is mounted here
        parts = ()
    groups = [mount.joinpath(*parts[:length]) for length in range(len(parts), -1, -1)]
    return [text for group in groups if (text := host.read(str(group / name)))]
