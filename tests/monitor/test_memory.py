"""What counts as evidence that memory ran out."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from allstep.monitor.memory import MemoryWatch, counters, kills_for_memory

KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("0::/user/job_3\n", "/sys/fs/cgroup/user/job_3/memory.events"),
        ("9:memory:/slurm/step\n8:cpu:/x\n", "/sys/fs/cgroup/memory/slurm/step/memory.oom_control"),
        ("8:cpu,memory:/x\n0::/\n", "/sys/fs/cgroup/memory/x/memory.oom_control"),
        ("", "/proc/vmstat"),
        ("garbage\n", "/proc/vmstat"),
    ],
)
def test_the_count_is_looked_for_in_the_processs_own_cgroup_first(text: str, first: str) -> None:
    assert counters(text)[0] == Path(first)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("low 0\noom 3\noom_kill 2\noom_group_kill 9\n", 2),
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 7", 7),
        ("oom_kill_disable 5\n", None),
        ("", None),
    ],
)
def test_the_count_is_read_from_either_kind_of_file(text: str, count: int | None) -> None:
    assert kills_for_memory(text) == count


def test_a_count_that_grew_explains_a_sigkill(tmp_path: Path) -> None:
    count = tmp_path / "memory.events"
    count.write_text("oom_kill 4\n")
    watch = MemoryWatch([tmp_path / "absent", count])
    assert (
        watch.note(KILLED, "") == "it came from outside the run; when memory runs short the kernel sends it (see dmesg)"
    )
    count.write_text("oom_kill 5\n")
    assert watch.note(KILLED, "") == ("likely out of memory: the kernel killed 1 process for it in this memory cgroup")
    assert watch.note(0, "") == ""
    assert watch.note(1, "ValueError: x") == ""


def test_the_supervisors_own_sigkill_is_no_evidence_but_last_words_are(tmp_path: Path) -> None:
    count = tmp_path / "memory.events"
    count.write_text("oom_kill 4\n")
    watch = MemoryWatch([count])
    count.write_text("oom_kill 5\n")
    assert watch.note(KILLED, "", killed=True) == ""
    assert "'MemoryError'" in watch.note(KILLED, "MemoryError", killed=True)


def test_what_the_worker_wrote_explains_it_where_nothing_is_counted(tmp_path: Path) -> None:
    watch = MemoryWatch([tmp_path / "absent"])
    assert watch.note(1, "Traceback\nMemoryError\n") == "likely out of memory: its last lines have 'MemoryError'"
    assert "'MemoryError'" in watch.note(KILLED, "MemoryError")
    assert "came from outside" in watch.note(KILLED, "MemoryError\n" + "line\n" * 20)
