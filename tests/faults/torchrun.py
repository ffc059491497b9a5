"""Running a script under a real torchrun, and seeing that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from allstep.launch.port import ReservedPort

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


def torchrun(folder: Path, script: str, *, ranks: int = 2, nodes: int = 1, timeout: float = 90.0, **env: str) -> Ran:
    """Run a script as `torchrun --nproc-per-node RANKS`, and wait until every process that came of it is gone.

    With several nodes there is a torchrun for each, all on this machine; `code` is then the worst of theirs.
    """
    path = folder / "script.py"
    path.write_text(script)
    token = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ALLSTEP_", "SLURM"))}
    agents = []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(ReservedPort()).port if nodes > 1 else 0
        for node in range(nodes):
            options = [f"--nnodes={nodes}", f"--nproc-per-node={ranks}"]
            if nodes > 1:
                options += [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
            else:
                options += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
            output = stack.enter_context((folder / f"output-{node}").open("w+"))
            agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *options, str(path)],
                env={**environment, "OMP_NUM_THREADS": "1", _TOKEN: token, **env},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            agents.append((agent, output))
        try:
            for agent, _ in agents:
                agent.wait(timeout)
        finally:
            seconds = time.monotonic() - began
            left = _gone(token)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            texts = []
            for agent, output in agents:
                agent.kill()
                agent.wait()
                output.seek(0)
                texts.append(output.read())
    return Ran(max(agent.returncode for agent, _ in agents), "".join(texts), seconds, [str(each) for each in left])


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
