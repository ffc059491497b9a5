"""When a job is told to stop, how its end is read, and whether it is started again: pure functions and the record."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.protocol.save_record import SAVES, CommittedSave, note_save, read_saves
from allstep.submission.batch_process import StopNotice, judge
from allstep.submission.job_record import JobRecord, JobStart, another_start
from allstep.submission.lead_time import UNKNOWN_S, lead_seconds


def save(step: int, seconds: float, time: float, run: int = 1) -> CommittedSave:
    return CommittedSave(step, seconds, time, run)


def test_the_lead_follows_the_longest_save_and_the_slowest_iterations() -> None:
    assert lead_seconds([save(10, 4.0, 100.0)], 30.0) == 2 * 4.0 + 30.0
    saves = [save(10, 4.0, 100.0), save(20, 9.0, 150.0), save(30, 5.0, 170.0)]
    assert lead_seconds(saves, 30.0) == 2 * 9.0 + 2 * 5.0 + 30.0


def test_a_wait_in_the_queue_is_no_slow_iteration() -> None:
    assert lead_seconds([save(10, 1.0, 100.0, run=1), save(11, 1.0, 9000.0, run=2)], 0.0) == 2.0


def test_without_a_measured_save_the_lead_is_long() -> None:
    assert lead_seconds([], 30.0) == UNKNOWN_S + 30.0


TOLD = StopNotice(used_up=True, saved=10)


@pytest.mark.parametrize(
    ("code", "notice", "saved", "ending"),
    [
        (0, None, 10, "finished"),
        (0, TOLD, 10, "finished"),
        (85, None, 10, "stopped"),
        (85, TOLD, 20, "stopped"),
        (1, None, 10, "failed"),
        (1, TOLD, 20, "failed"),
        (138, TOLD, 10, "stopped"),
        (138, None, 10, "failed"),
        (137, TOLD, 20, "stopped"),
        (137, TOLD, 10, "failed"),
        (-9, TOLD, 10, "failed"),
    ],
)
def test_a_step_is_judged_by_its_code_its_notice_and_what_is_saved(
    code: int, notice: StopNotice | None, saved: int, ending: str
) -> None:
    assert judge(code, notice, saved) == ending


def starts(*saved: int) -> list[JobStart]:
    return [JobStart("7", 1, each, 0.0) for each in saved]


@pytest.mark.parametrize(
    ("begun_at", "saved", "used_up", "goes_on"),
    [
        ([-1], 5, True, True),
        ([-1], -1, False, True),
        ([-1], -1, True, False),
        ([-1, 5], 5, True, False),
        ([-1, 5, 5], 5, False, True),
        ([-1, 5, 5, 5], 5, False, False),
        ([-1, 5, 5, 5], 6, False, True),
        ([5, 5, 7, 7], 7, False, True),
    ],
)
def test_a_job_is_started_again_as_long_as_it_gets_further(
    begun_at: list[int], saved: int, used_up: bool, goes_on: bool
) -> None:
    refusal = another_start(starts(*begun_at), saved, used_up=used_up)
    assert (refusal is None) == goes_on, refusal


def test_the_record_counts_starts_and_takes_the_highest_save(tmp_path: Path) -> None:
    record = JobRecord(tmp_path)
    record.begin("7", 2)
    for step in (10, 20):
        note_save(step, 1.5, {SAVES: str(tmp_path / "saves.jsonl")})
    record.end("7", 85, "stopped")
    record.begin("7", 4)
    assert [(each.nodes, each.saved) for each in record.starts()] == [(2, -1), (4, 20)]
    assert [(each.step, each.seconds) for each in record.saves()] == [(10, 1.5), (20, 1.5)]


def test_a_line_that_was_cut_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "saves.jsonl"
    note_save(10, 1.0, {SAVES: str(path)})
    path.write_bytes(path.read_bytes() + b'{"step": 15, "sec')
    note_save(20, 1.0, {SAVES: str(path)})
    assert [each.step for each in read_saves(path)] == [10, 20]


def test_nothing_is_noted_where_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    note_save(10, 1.0, {})
    assert list(tmp_path.iterdir()) == []
    assert read_saves(tmp_path / "absent") == ()
