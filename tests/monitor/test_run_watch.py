"""The record of an attempt follows the ranks, at a pace that does not depend on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allstep.diagnosis.rank_outcome import OutcomeKind
from allstep.monitor.run_watch import PERIOD_S, STILL_S, RunWatch, summary_of
from allstep.protocol.messages import CheckpointSaved, Goodbye
from allstep.run_record.event_log import read_events
from allstep.run_record.recorder import RunRecorder
from tests.monitor.driving import Caller, Driven, serving, world


def recorder(folder: Path) -> RunRecorder:
    return RunRecorder(folder, {"run": "r"}, warn=print)


def kinds(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["kind"] == kind]


def heard(driven: Driven, caller: Caller, iteration: int) -> None:
    caller.beat(iteration=iteration, engine="Trainer", goal=500)
    driven.until(lambda: (last := driven.service.status(caller.rank)) is not None and last.iteration == iteration)


def test_progress_is_written_as_often_as_time_says_and_not_as_ranks_do(tmp_path: Path) -> None:
    with serving() as driven, world(driven) as ranks:
        now = [0.0]
        watch = RunWatch(recorder(tmp_path), driven.service, 2, clock=lambda: now[0])
        for second in range(60):
            now[0] = float(second)
            for rank in ranks:
                heard(driven, rank, second + 1)
            watch.tick()
        watch.finish()
    written = kinds(tmp_path, "progress")
    assert len(written) <= 60 / PERIOD_S + 2
    assert [(each["ranks"], each["goal"]) for each in written] == [(2, 500)] * len(written)
    assert written[-1]["iteration"] == 60
    assert 0.9 < written[-1]["rate"] < 1.1
    assert [each["hosts"] for each in kinds(tmp_path, "arrived")] == [["a"]]


def test_a_run_that_stands_still_is_written_down_now_and_then(tmp_path: Path) -> None:
    with serving() as driven, world(driven) as ranks:
        now = [0.0]
        watch = RunWatch(recorder(tmp_path), driven.service, 2, clock=lambda: now[0])
        heard(driven, ranks[0], 7)
        for second in range(300):
            now[0] = float(second)
            watch.tick()
        watch.finish()
    assert 300 / STILL_S - 1 <= len(kinds(tmp_path, "progress")) <= 300 / STILL_S + 1


def test_a_save_is_written_when_the_rank_says_it(tmp_path: Path) -> None:
    keeper = recorder(tmp_path)
    with serving(saved=keeper.saved) as driven, world(driven) as ranks:
        ranks[0].say(CheckpointSaved(0, 40, 1.5, "/c/save-40"))
        ranks[0].say(Goodbye(0, True, 85))
        driven.until(lambda: driven.service.leaving_codes())
        assert driven.service.leaving_codes() == {0: 85}
    (save,) = kinds(tmp_path, "save")
    assert (save["step"], save["seconds"], save["address"]) == (40, 1.5, "/c/save-40")


def test_a_failure_is_the_first_cause_in_a_line(tmp_path: Path) -> None:
    with serving() as driven, world(driven) as ranks:
        ranks[1].fail()
        summary = summary_of(driven.verdict(), tmp_path / "failure.json")
    assert (summary.rank, summary.iteration, summary.report) == (1, 7, str(tmp_path / "failure.json"))
    assert "ValueError" in summary.what
    assert OutcomeKind.ERROR.value not in summary.what
