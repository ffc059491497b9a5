"""How jobs are started: the command line of each launcher, and the environment."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).parents[2]

ALLSTEP = [sys.executable, "-m", "allstep"]

Launcher = Literal["allstep", "torchrun"]
also_under_torchrun_by_night = pytest.mark.parametrize(
    "launcher", ["allstep", pytest.param("torchrun", marks=pytest.mark.nightly)]
)

_NOT_INHERITED = ("OMP_NUM_THREADS", "NO_COLOR", "PYTHONUNBUFFERED", "RANK", "WORLD_SIZE")
_NOT_THOSE_OF = ("ALLSTEP_", "SLURM", "TORCHELASTIC_", "LOCAL_", "GROUP_", "ROLE_", "MASTER_")


def command(
    launcher: Launcher, script: Path, arguments: Sequence[str] = (), *, nproc: int = 2, options: Sequence[str] = ()
) -> list[str]:
    """The command line of a job on this machine; `options` are the launcher's own."""
    if launcher == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    else:
        start = [*ALLSTEP, "run", "--nproc", str(nproc)]
    return [*start, *options, str(script), *arguments]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what would change a job, and with `extra`."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_INHERITED and not name.startswith(_NOT_THOSE_OF)
    }
    path = [str(ROOT / "src"), *filter(None, [inherited.get("PYTHONPATH")])]
    return inherited | {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""} | dict(extra or {})


def place(rank: int, world_size: int, port: int, **more: str) -> dict[str, str]:
    """The variables with which a person starts a rank by hand on one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **more,
    }


def script(folder: Path, text: str, name: str = "script.py") -> Path:
    """Write a script that knows its `rank` once it has imported what it begins by importing."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = f"{text}\n".splitlines(keepends=True)
    imports = list(itertools.takewhile(lambda line: line.startswith(("import ", "from ")) and ";" not in line, lines))
    lines[: len(imports)] = ["import os, sys\n", *imports, "rank = int(os.environ.get('RANK', 0))\n"]
    path.write_text("".join(lines))
    return path
