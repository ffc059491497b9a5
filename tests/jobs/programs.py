"""Programs of the system that some tests need: whether they are here, and how they come here."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SYSTEM_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
"""Where programs are looked for: daemons are not on everybody's PATH."""


class ProgramsUnavailable(Exception):
    """What a test needs of the system is not here; the message says what, and how it could be."""


def ensure_programs(programs: Sequence[str], packages: Sequence[str], environ: Mapping[str, str]) -> None:
    """Return once every program is here.

    With CI or ALLSTEP_TEST_INSTALL set, as root and with apt-get, the packages are installed, by one process at a time.

    Raises:
        ProgramsUnavailable: some are missing and may not be installed, or could not be.
    """
    if not _missing(programs):
        return
    names = ", ".join(_missing(programs))
    if not (environ.get("CI") or environ.get("ALLSTEP_TEST_INSTALL")):
        raise ProgramsUnavailable(f"{names} not found; install {' '.join(packages)} or set ALLSTEP_TEST_INSTALL=1")
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ProgramsUnavailable(f"{names} not found, and installing needs root and apt-get")
    with (Path(tempfile.gettempdir()) / "allstep-test-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _missing(programs):  # another process was first
            return
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", *command], env=quiet, capture_output=True, text=True, timeout=100)
            if done.returncode:
                raise ProgramsUnavailable(f"apt-get {' '.join(command)} failed: {(done.stderr or done.stdout)[-500:]}")


def _missing(programs: Sequence[str]) -> list[str]:
    return [program for program in programs if shutil.which(program, path=SYSTEM_PATH) is None]
