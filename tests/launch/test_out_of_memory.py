"""A worker that the kernel kills because memory ran out, in a real memory cgroup."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.command import run, script

pytestmark = pytest.mark.slow

MIB = 1 << 20


def memory_cgroup(limit: int) -> Path:
    """Make a memory cgroup inside this process's own, of either version; raises OSError where that is not allowed."""
    own = Path("/proc/self/cgroup").read_text().splitlines()
    legacy = next((line.split(":", 2)[2] for line in own if "memory" in line.split(":")[1].split(",")), None)
    root = Path("/sys/fs/cgroup")
    parent = root / "memory" / legacy.strip("/") if legacy is not None else root / own[0].split(":", 2)[2].strip("/")
    group = Path(tempfile.mkdtemp(prefix="allstep-test-", dir=parent))
    try:
        if legacy is not None:
            (group / "memory.limit_in_bytes").write_text(str(limit))
        else:
            (group / "memory.max").write_text(str(limit))
            (group / "memory.swap.max").write_text("0")
    except OSError:
        group.rmdir()
        raise
    return group


@pytest.fixture
def group() -> Iterator[Path]:
    try:
        made = memory_cgroup(256 * MIB)
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield made
    made.rmdir()


def test_a_worker_killed_for_memory_is_reported_as_likely_out_of_memory(group: Path, tmp_path: Path) -> None:
    script(
        tmp_path,
        "import time\nif rank == 1:\n    hoard = bytearray(os.urandom(1 << 20)) * 1024\ntime.sleep(1000)\n",
    )
    inside = tmp_path / "inside.py"
    inside.write_text(
        f"import os, sys\nopen({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'allstep', *sys.argv[1:]])\n"
    )
    result = run(tmp_path, "--nproc", "2", "script.py", command=[sys.executable, str(inside), "run"])
    assert result.returncode == 137, result.stderr
    assert "rank 1 of 2 failed first\n  killed by SIGKILL (exit code 137)\n" in result.stderr
    assert "likely out of memory: the kernel killed 1 process for it in this memory cgroup" in result.stderr


def test_a_memory_error_is_reported_as_likely_out_of_memory(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\nbytearray(1 << 40)\n",
    )
    result = run(tmp_path, "script.py", env={"MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "1")})
    assert result.returncode == 1
    assert "    MemoryError\n" in result.stderr
    assert "likely out of memory: its last lines have 'MemoryError'" in result.stderr
