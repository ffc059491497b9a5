"""Running a script under a real torchrun, and seeing that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

_TOKEN = "ALLSTEP_TEST_TOKEN"


@dataclass(frozen=True)
class Ran:
    """How it ended: torchrun's exit code, all output, seconds, and the processes of it that were left."""

    code: int
    output: str
    seconds: float
    left: list[str]

    @property
    def report(self) -> str:
        """allstep's report, from its first line on."""
        return self.output[self.output.index("allstep: ") :]


def torchrun(folder: Path, script: str, *, ranks: int = 2, timeout: float = 90.0, **env: str) -> Ran:
    """Run a script as `torchrun --nproc-per-node RANKS`, and wait until every process that came of it is gone."""
    path = folder / "script.py"
    path.write_text(script)
    token = uuid.uuid4().hex
    options = ("--nnodes=1", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ALLSTEP_", "SLURM"))}
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env={**environment, "OMP_NUM_THREADS": "1", _TOKEN: token, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        seconds = time.monotonic() - began
        left = _gone(token)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
    return Ran(process.returncode, output, seconds, [str(each) for each in left])


def _gone(token: str, seconds: float = 15.0) -> list[int]:
    """Processes with the token that are still there after a while."""
    deadline = time.monotonic() + seconds
    while (left := _with(token)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _with(token: str) -> list[int]:
    mark = f"{_TOKEN}={token}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended while we looked
            continue
    return found
