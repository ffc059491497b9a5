"""The event log: it goes on behind a torn line, stays small, and loses nothing that matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.run_record import event_log
from allstep.run_record.event_log import EventLog, read_events, thinned


def test_a_second_writer_goes_on_behind_a_line_that_a_kill_cut(tmp_path: Path) -> None:
    EventLog(tmp_path).add("attempt", attempt=0)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"n": 1, "time": 5, "kind": "prog')
    EventLog(tmp_path).add("attempt", attempt=1)
    assert [(event["n"], event["attempt"]) for event in read_events(tmp_path)] == [(0, 0), (1, 1)]


def test_a_long_run_s_log_stays_small_and_keeps_what_happened_once(tmp_path: Path) -> None:
    log = EventLog(tmp_path, limit=20_000, clock=lambda: 1.0)
    for attempt in range(5):
        log.add("attempt", attempt=attempt)
        for iteration in range(1000):
            log.add("progress", iteration=1000 * attempt + iteration)
        log.add("failure", attempt=attempt, what="killed")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    events = read_events(tmp_path)
    assert size < 30_000 + 200
    assert [event["attempt"] for event in events if event["kind"] == "failure"] == [0, 1, 2, 3, 4]
    assert [event["attempt"] for event in events if event["kind"] == "attempt"] == [0, 1, 2, 3, 4]
    assert [event["iteration"] for event in events if event["kind"] == "progress"][-1] == 4999
    numbers = [event["n"] for event in events]
    assert numbers == sorted(set(numbers))


def test_a_reader_between_the_two_writes_of_thinning_sees_no_event_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = event_log.write_whole, []

    def looking(path: Path, data: bytes) -> None:
        seen.append([event["n"] for event in read_events(tmp_path)])
        write(path, data)
        seen.append([event["n"] for event in read_events(tmp_path)])

    monkeypatch.setattr(event_log, "write_whole", looking)
    log = EventLog(tmp_path, limit=4000)
    for _ in range(300):
        log.add("progress", iteration=1)
    assert len(seen) > 4
    assert all(numbers == sorted(set(numbers)) for numbers in seen)


def test_the_last_event_of_each_kind_is_kept_when_the_others_are_thinned_out() -> None:
    events = [{"n": n, "time": 0.0, "kind": ("progress", "save")[n % 2]} for n in range(100)]
    kept = thinned(events, 500)
    assert {98, 99} <= {event["n"] for event in kept}
    assert len(kept) < 12


def test_what_is_no_event_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"n": 0}\n[1]\n{"n": 1, "time": 2.0, "kind": "end"}\n')
    assert [event["kind"] for event in read_events(tmp_path)] == ["end"]
