"""A sidecar keeps the record of ranks that have no supervisor: real sidecars, and ranks that import no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from allstep.protocol.address import new_key
from allstep.run_record.event_log import read_events
from allstep.run_record.process_identity import identity_of
from allstep.run_record.recorder import about_run
from tests.monitor.driving import gone, rank_processes, wait_for
from tests.monitor.test_sidecar import close, ended, sidecar

pytestmark = pytest.mark.slow


def setup(workdir: Path, **other: Any) -> dict[str, Any]:
    about = about_run(
        name="",
        run_id="host:29500",
        launcher="torchrun",
        command=["dir/train.py", "--token", "hunter2hunter2"],
        process=identity_of(os.getpid()),
        job="",
    )
    return {"about": {**about, "workdir": str(workdir)}, "secrets": ("hunter2hunter2",), **other}


def happened(folder: Path) -> list[str]:
    return [event["kind"] for event in read_events(folder) if event["kind"] != "progress"]


def test_ranks_that_finish_leave_a_record_in_the_folder_where_they_work(tmp_path: Path) -> None:
    key = new_key()
    with (
        sidecar(2, key, **setup(tmp_path)) as service,
        rank_processes(service.address, ("close",), ("close",), key=key) as ranks,
    ):
        close(ranks)
        wait_for(lambda: ended(ranks))
        service.release()
        wait_for(lambda: gone(service.pid))
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("train-2")
    assert happened(folder) == ["attempt", "arrived", "attempt_end", "end"]
    assert [event["outcome"] for event in read_events(folder)[-2:]] == ["finished", "finished"]
    assert "hunter2" not in "".join(path.read_text() for path in folder.iterdir())


def test_a_failure_is_in_the_record_and_a_restart_goes_on_in_it(tmp_path: Path) -> None:
    for attempt in (0, 1):
        key = new_key()
        with (
            sidecar(2, key, **setup(tmp_path)) as service,
            rank_processes(service.address, ("wait",), ("raise",), key=key) as ranks,
        ):
            wait_for(lambda ranks=ranks: ended(ranks))
            service.release()
            wait_for(lambda service=service: gone(service.pid))
        (folder,) = (tmp_path / "runs").iterdir()
        assert happened(folder).count("attempt") == attempt + 1
    assert happened(folder)[-4:] == ["arrived", "failure", "attempt_end", "end"]
    (failure, *_) = [event for event in read_events(folder) if event["kind"] == "failure"]
    assert failure["rank"] == 1
    assert "bad batch" in failure["what"]


@pytest.mark.parametrize("folder", ["", "kept"])
def test_the_record_is_where_it_was_asked_for_or_nowhere(folder: str, tmp_path: Path) -> None:
    with sidecar(2, new_key(), **setup(tmp_path, run_folder=folder)) as service:
        service.release()
        wait_for(lambda: gone(service.pid))
    assert [each.name for each in tmp_path.iterdir()] == ([folder] if folder else [])
