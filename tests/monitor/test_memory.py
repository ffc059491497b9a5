"""What counts as evidence that memory ran out; the files of cgroups are made by the test."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from allstep.exit_codes import PEER_LOST
from allstep.monitor.memory import MemoryWatch, counters, kills_for_memory

KILLED = -signal.SIGKILL
V2, V1 = "memory.events", "memory.oom_control"
ONE = "likely out of memory: the kernel killed 1 process for it in this job's memory cgroup"
FROM_OUTSIDE = "it came from outside the run; when memory runs short the kernel sends it (see dmesg)"


def count(root: Path, path: str, kills: int) -> Path:
    """Have a file of the kernel's say how many were killed."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"low 0\noom 3\noom_kill {kills}\n" if V2 in path else f"under_oom 0\noom_kill {kills}\n")
    return file


def watch(root: Path, cgroups: str, machine: int = 0) -> MemoryWatch:
    vmstat = root / "vmstat"
    vmstat.parent.mkdir(parents=True, exist_ok=True)
    vmstat.write_text(f"pgfault 5\noom_kill {machine}\n")
    return MemoryWatch(cgroups, root / "cgroup", vmstat)


@pytest.mark.parametrize(
    ("cgroups", "files", "found"),
    [
        ("0::/user/own\n", [f"user/own/{V2}", f"user/{V2}"], [f"user/own/{V2}"]),
        ("0::/slurm/job_3/step_0/task_1\n", [f"slurm/job_3/{V2}"], [f"slurm/job_3/{V2}"]),
        ("0::/slurm/job_3/step_0\n", [f"slurm/job_3/step_0/{V2}"], [f"slurm/job_3/step_0/{V2}"]),
        ("0::/the/hosts/path\n", [V2], [V2]),  # inside a container
        ("0::/../above\n", [V2], [V2]),
        ("9:memory:/own\n8:cpu:/x\n", [f"memory/own/{V1}", f"memory/own/below/{V1}"], [f"memory/own/{V1}"]),
        (
            "9:cpu,memory:/slurm/uid_0/job_3/step_0/task_0\n0::/\n",
            [
                f"memory/slurm/uid_0/job_{job}"
                for job in (f"3/{V1}", f"3/step_0/task_0/{V1}", f"3/step_0/task_1/{V1}", f"4/{V1}")
            ],
            [f"memory/slurm/uid_0/job_3/{each}{V1}" for each in ("", "step_0/task_0/", "step_0/task_1/")],
        ),
        ("9:memory:/\n", [f"memory/{V1}", f"memory/anybody/{V1}"], [f"memory/{V1}"]),
        ("garbage\n", [V2], []),
        ("", [V2], []),
    ],
)
def test_the_kernel_counts_for_a_job_in_its_own_groups(
    cgroups: str, files: list[str], found: list[str], tmp_path: Path
) -> None:
    for file in files:
        count(tmp_path, file, 0)
    assert counters(cgroups, tmp_path) == sorted(tmp_path / each for each in found)


@pytest.mark.parametrize(
    ("text", "kills"),
    [
        ("low 0\noom 3\noom_kill 2\noom_group_kill 9\n", 2),
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 7", 7),
        ("oom_kill_disable 5\n", None),
        ("", None),
    ],
)
def test_the_count_is_read_from_either_kind_of_file(text: str, kills: int | None) -> None:
    assert kills_for_memory(text) == kills


@pytest.mark.parametrize(
    ("cgroups", "file"),
    [
        ("0::/job_7/task_0\n", f"cgroup/job_7/{V2}"),
        ("9:memory:/job_7/task_0\n", f"cgroup/memory/job_7/task_1/{V1}"),
    ],
)
def test_a_kill_in_the_jobs_group_explains_any_failure_of_a_rank(cgroups: str, file: str, tmp_path: Path) -> None:
    count(tmp_path, f"cgroup/memory/job_7/{V1}", 9)
    count(tmp_path, file, 4)
    watching = watch(tmp_path, cgroups)
    assert watching.remark() == ""
    assert watching.note(KILLED, "") == FROM_OUTSIDE
    count(tmp_path, file, 5)
    assert watching.remark() == ONE
    assert watching.note(KILLED, "") == ONE
    assert watching.note(1, "RuntimeError: DataLoader worker (pid 9) is killed by signal: Killed.") == ONE
    assert watching.note(0, "") == ""
    assert watching.note(PEER_LOST, "") == ""
    assert watching.note(1, "RuntimeError: Connection closed by peer") == ""
    assert watching.note(KILLED, "", killed=True) == ""


def test_groups_that_are_made_later_count_from_nothing(tmp_path: Path) -> None:
    count(tmp_path, f"cgroup/memory/job_7/{V1}", 0)
    watching = watch(tmp_path, "9:memory:/job_7/step_0\n")
    count(tmp_path, f"cgroup/memory/job_7/step_1/{V1}", 2)
    assert "killed 2 processes" in watching.remark()


def test_where_no_group_counts_the_machine_explains_a_sigkill_alone(tmp_path: Path) -> None:
    watching = watch(tmp_path, "", machine=4)
    (tmp_path / "vmstat").write_text("oom_kill 5\n")
    assert watching.note(KILLED, "") == "likely out of memory: the kernel killed 1 process for it on this machine"
    assert watching.note(1, "ValueError: x") == ""
    assert watching.remark() == ""


def test_last_words_are_evidence_whoever_killed_the_worker(tmp_path: Path) -> None:
    watching = watch(tmp_path, "")
    assert watching.note(1, "Traceback\nMemoryError\n") == "likely out of memory: its last lines have 'MemoryError'"
    assert "'MemoryError'" in watching.note(KILLED, "MemoryError")
    assert "'MemoryError'" in watching.note(KILLED, "MemoryError", killed=True)
    assert watching.note(KILLED, "MemoryError\n" + "line\n" * 20) == FROM_OUTSIDE
