"""A container of an image's root, run by crun as an engine would: read-only, without rights, as any user.

Contract: `started` begins one and yields it as a job; at the end of the block it is gone. Its root is read-only; what
can be written is /tmp and what is mounted. The process has no capabilities, cannot gain any, and is the first of its
own PID namespace, as in Docker. The network is the machine's. `stop` sends what an engine sends to end it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.jobs.programs import SYSTEM_PATH
from tests.jobs.running import Running, start

_WITHOUT_HYBRID = """
if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
exec "$@"
"""  # crun refuses a machine that has both versions of cgroups; it uses none of them here

NAME = "container"
NOBODY_KNOWN = 54321
"""A user that no /etc/passwd has."""


@dataclass(frozen=True)
class Container:
    """A container that runs."""

    job: Running
    name: str
    crun: Sequence[str]

    def stop(self) -> None:
        """Send SIGTERM to its first process."""
        subprocess.run([*self.crun, "kill", self.name, "TERM"], check=True, capture_output=True, timeout=30)


@contextlib.contextmanager
def started(
    root: Path,
    settings: Mapping[str, Any],
    folder: Path,
    *arguments: str,
    user: int | None = None,
    mounts: Mapping[str, Path] | None = None,
    entrypoint: Sequence[str] | None = None,
) -> Iterator[Container]:
    """Start a container.

    Args:
        root: of the image.
        settings: of the image; see `ImageStore.settings`.
        folder: for what crun keeps; need not be there.
        arguments: after the entrypoint.
        user: a user's number, in group 0 as engines have it; None is the image's own user.
        mounts: folders of this machine by the place at which they are inside, where they can be written.
        entrypoint: in place of the image's own.
    """
    folder.mkdir(exist_ok=True)
    command = [*(settings["Entrypoint"] if entrypoint is None else entrypoint), *arguments]
    number = int(settings["User"]) if user is None else user
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {NAME}\n")  # which engines write, too
    mounts = {**(mounts or {}), "/etc/hosts": folder / "hosts"}
    (folder / "config.json").write_text(json.dumps(_description(root, settings, command, number, mounts)))
    crun = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _WITHOUT_HYBRID, "sh"]
    crun += [str(shutil.which("crun", path=SYSTEM_PATH)), "--root", str(folder / "state"), "--cgroup-manager=disabled"]
    name = f"allstep-{uuid.uuid4().hex[:12]}"
    try:
        with start(folder, [*crun, "run", "--bundle", str(folder), name]) as job:
            yield Container(job, name, crun)
    finally:
        subprocess.run([*crun, "delete", "--force", name], check=False, capture_output=True, timeout=30)


def _description(
    root: Path, settings: Mapping[str, Any], command: list[str], user: int, mounts: Mapping[str, Path]
) -> dict[str, Any]:
    """A container in the words of the OCI runtime specification."""
    bound = [
        {"destination": inside, "type": "bind", "source": str(outside), "options": ["rbind", "rw"]}
        for inside, outside in mounts.items()
    ]
    memory = {"type": "tmpfs", "source": "tmpfs"}
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": command,
            "env": settings["Env"],
            "cwd": settings["WorkingDir"],
            "user": {"uid": user, "gid": 0},
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "hostname": NAME,
        "root": {"path": str(root), "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", **memory, "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", **memory, "options": ["nosuid", "nodev", "mode=1777", "size=2g"]},
            {"destination": "/tmp", **memory, "options": ["nosuid", "nodev", "mode=1777", "size=1g"]},
            *bound,
        ],
        "linux": {"namespaces": [{"type": each} for each in ("pid", "mount", "ipc", "uts")]},
    }
