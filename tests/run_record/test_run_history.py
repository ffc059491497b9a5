"""A record read back: attempts, what they came to, and a log that says less than it might."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allstep.run_record.run_history import history_of, read_history


def events(*said: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    made, attempt = [], 0
    for n, (kind, fields) in enumerate(said):
        attempt = fields.get("attempt", attempt)
        made.append({"n": n, "time": float(n), "kind": kind, "attempt": attempt, **fields})
    return made


STORY = events(
    ("attempt", {"attempt": 0, "world": 4, "nodes": 2, "job": "47", "process": {"pid": 1}}),
    ("arrived", {"hosts": ["a", "b"]}),
    ("progress", {"iteration": 10, "epoch": 1}),
    ("save", {"step": 8, "address": "/c/8", "seconds": 0.5}),
    ("failure", {"attempt": 0, "rank": 3, "what": "rank 3: killed by SIGKILL"}),
    ("attempt_end", {"outcome": "failed", "code": 137}),
    ("attempt", {"attempt": 1, "world": 3, "nodes": 1, "job": "47"}),
    ("signal", {"signal": "SIGUSR1"}),
    ("attempt_end", {"outcome": "preempted", "code": 85}),
    ("end", {"outcome": "preempted", "code": 85}),
    ("requeue", {"job": "48", "code": 85, "what": "stopped; goes on in job 48"}),
)


def test_each_attempt_has_what_happened_in_it() -> None:
    history = history_of({"run": "r"}, STORY)
    first, second = history.attempts
    assert (first.world, first.hosts, first.saves, first.outcome, first.ended) == (4, ["a", "b"], 1, "failed", 5.0)
    assert first.failure["what"] == "rank 3: killed by SIGKILL"
    assert (second.world, second.signal, second.outcome, second.code) == (3, "SIGUSR1", "preempted", 85)
    assert history.last_save["step"] == 8
    assert history.end["outcome"] == "preempted"
    assert history.heard == 10.0


def test_the_job_is_the_one_that_goes_on_with_the_run() -> None:
    assert history_of({}, STORY).job == "48"
    assert history_of({}, [*STORY, {"n": 11, "time": 11.0, "kind": "attempt", "job": "48"}]).job == "48"
    assert history_of({}, STORY[:3]).job == "47"


def test_what_a_writer_adds_late_is_of_its_own_attempt() -> None:
    late = [("attempt_end", {"attempt": 0, "outcome": "failed"}), ("end", {"attempt": 0, "outcome": "failed"})]
    history = history_of({}, events(("attempt", {"attempt": 0}), ("attempt", {"attempt": 1}), *late))
    assert [attempt.outcome for attempt in history.attempts] == ["failed", ""]
    assert history.end == {}


def test_a_job_that_was_put_back_has_ended_where_nobody_else_could_say_so() -> None:
    history = history_of({}, events(("attempt", {"attempt": 0}), ("requeue", {"job": "47", "code": 85})))
    assert history.end["outcome"] == "preempted"


def test_a_new_attempt_makes_the_end_before_it_no_end() -> None:
    assert history_of({}, [*STORY, {"n": 11, "time": 11.0, "kind": "attempt"}]).end == {}


def test_kinds_that_are_unknown_and_a_lost_beginning_do_no_harm() -> None:
    history = history_of({}, events(("moon", {}), ("progress", {"iteration": 3}), ("end", {"outcome": "finished"})))
    assert history.attempts == []
    assert history.end["outcome"] == "finished"


def test_a_folder_without_a_record_has_an_empty_history(tmp_path: Path) -> None:
    history = read_history(tmp_path)
    assert (history.attempts, history.heard, history.job) == ([], 0.0, "")
