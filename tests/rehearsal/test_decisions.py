"""What is decided in a rehearsal without running anything: signals, requests, traces, causes, the report."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allstep.cli.main import main
from allstep.errors import ConfigurationError, LaunchError, RehearsalError
from allstep.rehearsal.interruption import job_variables, signals_of
from allstep.rehearsal.iteration_trace import Parting, RankTrace, RunTrace, first_parting, read_traces, trace_file
from allstep.rehearsal.probable_causes import Evidence, probable_causes
from allstep.rehearsal.rehearsal_report import Comparison, RehearsalReport, StartSummary, TensorDifference
from allstep.rehearsal.rehearsal_request import RehearsalRequest

# Signals


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("preemption", [(0, "SIGUSR1", "launcher"), (9, "SIGTERM", "all"), (12, "SIGKILL", "all")]),
        ("requeue", [(0, "SIGUSR1", "launcher"), (9, "SIGTERM", "all"), (12, "SIGKILL", "all")]),
        ("time-limit", [(0, "SIGTERM", "all"), (3, "SIGKILL", "all")]),
        ("failure", [(0, "SIGKILL", 1)]),
    ],
)
def test_each_kind_sends_what_the_cluster_sends(kind: Any, sent: list[tuple[Any, ...]]) -> None:
    found = signals_of(kind, lead=9, kill_wait=3, rank=1)
    assert [(each.after, each.number.name, each.to) for each in found] == sent


def test_a_requeued_job_keeps_its_number_and_counts_its_starts() -> None:
    first, second = (job_variables("requeue", start) for start in (0, 1))
    assert "SLURM_RESTART_COUNT" not in first
    assert second == {**first, "SLURM_RESTART_COUNT": "1"}


def test_a_job_behind_a_time_limit_is_another_job() -> None:
    first, second = (job_variables("time-limit", start) for start in (0, 1))
    assert first["SLURM_JOB_ID"] != second["SLURM_JOB_ID"]
    assert job_variables("preemption", 1) == job_variables("failure", 1) == {}


# Requests


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "preemtion"}, "kind is 'preemtion'"),
        ({"ranks": 0}, "ranks is 0"),
        ({"iterations": 1}, "iterations is 1; it must be 2 or more"),
        ({"at": 20}, "at is 20, and the run is compared after 20 iterations"),
        ({"rank": 2}, "rank is 2, and the ranks are 0 to 1"),
        ({"lead": -1.0}, "lead is -1.0"),
        ({"mesh": "shard"}, "mesh is 'shard'"),
        ({"env": {"RANK": "1"}}, "env sets RANK"),
    ],
)
def test_what_cannot_be_rehearsed_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        RehearsalRequest(**{"kind": "failure", "target": __file__, **options})


def test_a_script_that_is_not_there_is_named() -> None:
    with pytest.raises(LaunchError, match=r"script absent\.py does not exist"):
        RehearsalRequest("failure", "absent.py")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["preemption"], "a script to rehearse is missing"),
        (["--at", "3", "preemption", "-m"], "a module to rehearse is missing"),
        (["preempt", "train.py"], "invalid choice: 'preempt'"),
        (["failure", "--rank", "first", "train.py"], "rank is 'first'; it must be an integer"),
        (["failure", "--rank", "7", __file__], "rank is 7, and the ranks are 0 to 1"),
        (["failure", "absent.py", "--rank", "0"], "script absent.py does not exist"),
        (["failure", "--iteration", "7", __file__], "--iterations"),
    ],
)
def test_a_wrong_command_line_rehearses_nothing(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rehearse", *given]) == 2
    assert said in capsys.readouterr().err


# Traces

WHOLE = {
    "parameters": "p",
    "optimizers": "o",
    "options": "l",
    "schedulers": "s",
    "generators": "g",
    "own generators": "w",
    "samples": "1",
}


def trace(
    begins: int = 0,
    ends: int = 4,
    *,
    ranks: int = 1,
    differ_from: int | None = None,
    place: str = "/saved",
    **parts: str,
) -> RunTrace:
    """Iterations whose digests are those of `WHOLE` with the iteration, and `parts` from `differ_from` on."""

    def at(iteration: int) -> dict[str, str]:
        changed = parts if differ_from is not None and iteration >= differ_from else {}
        kept = {name: value if name == "samples" else f"{value}{iteration}" for name, value in WHOLE.items()}
        return {**kept, **changed}

    iterations = {iteration: at(iteration) for iteration in range(begins + 1, ends + 1)}
    at_begin = {name: value for name, value in at(begins).items() if name != "samples"}
    return RunTrace([RankTrace(7, [place], begins, at_begin, dict(iterations), ends) for _ in range(ranks)])


def test_a_trace_that_a_kill_has_cut_is_read_up_to_there(tmp_path: Path) -> None:
    path = trace_file(tmp_path, 0, 0)
    path.parent.mkdir()
    lines = [
        {"pid": 41},
        {"place": "/saved"},
        {"begins_at": 2, "parts": {"parameters": "a"}},
        {"iteration": 3, "parts": {"parameters": "b"}},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 4, "par')
    found = read_traces(tmp_path, 0)
    assert found.went_on_at == 2
    assert found.reached == 3
    assert found.main == RankTrace(41, ["/saved"], 2, {"parameters": "a"}, {3: {"parameters": "b"}})
    assert read_traces(tmp_path, 1) == RunTrace()


def test_runs_part_in_the_first_iteration_that_differs() -> None:
    assert first_parting(trace(), trace()) is None
    assert first_parting(trace(), trace(begins=4, ends=6)) is None
    other = trace(differ_from=3, parameters="x", generators="y")
    assert first_parting(trace(), other) == Parting(3, ("generators", "parameters"))


def test_an_iteration_that_only_some_ranks_completed_is_not_compared() -> None:
    cut = trace(ranks=2, differ_from=4, parameters="x")
    del cut.ranks[1].iterations[4]
    assert first_parting(trace(ranks=2), cut) is None


def test_samples_are_the_same_whichever_ranks_have_them() -> None:
    one, two = trace(ranks=1), trace(ranks=2)
    for iteration in range(1, 5):
        one.main.iterations[iteration]["samples"] = "fffffffffffffffe"
        two.ranks[0].iterations[iteration]["samples"] = "ffffffffffffffff"
        two.ranks[1].iterations[iteration]["samples"] = "ffffffffffffffff"
    assert first_parting(one, two, other_size=True) is None
    two.ranks[1].iterations[3]["samples"] = "5"
    assert first_parting(one, two, other_size=True) == Parting(3, ("samples",))


# Causes

GOOD = Evidence(first=trace(ends=4), second=trace(4, 8), unbroken=trace(ends=8), saved=4, objects=("model", "trainer"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"first": RunTrace([RankTrace()])}, "the script makes no Checkpoint"),
        ({"saved": None}, "Checkpoint(folder).attach(trainer).resume()"),
        ({"saved": None, "stopped": False}, "attach allstep.Preemption"),
        ({"saved": None, "stopped": False, "told": False}, "a failure comes without a notice"),
        ({"second": trace(4, 8, place="/other")}, "each start saves to another folder (/saved, then /other)"),
        ({"second": trace(0, 8)}, "iteration 4 was saved, and the second start began behind iteration 0"),
        ({"unbroken": trace(ends=8, differ_from=0, parameters="x")}, "begin with different weights"),
        ({"unbroken": trace(ends=8, differ_from=2, samples="2")}, "over different samples"),
        ({"unbroken": trace(ends=8, differ_from=2, generators="x")}, "with different random numbers"),
        ({"unbroken": trace(ends=8, differ_from=2, parameters="x")}, "a kernel is not deterministic"),
        ({"again": trace(ends=8, differ_from=7, parameters="x")}, "two runs part in iteration 7"),
        ({"second": trace(4, 8, differ_from=4, parameters="x")}, "the weights are not those that were saved"),
        ({"second": trace(4, 8, differ_from=4, optimizers="x")}, "(its moments) is not what it was when the run was"),
        ({"second": trace(4, 8, differ_from=4, options="x")}, "(such as its learning rate)"),
        ({"second": trace(4, 8, differ_from=4, schedulers="x")}, "a scheduler is not where it was"),
        ({"second": trace(4, 8, differ_from=5, samples="f")}, "the order of data is not the sampler's"),
        ({"second": trace(4, 8, differ_from=4, **{"own generators": "x"})}, "a generator of the script's own"),
        ({"second": trace(4, 8, differ_from=5, generators="x")}, "the random generators of Python, numpy or torch"),
        (
            {"other_size": trace(ends=8, ranks=2, differ_from=1, samples="2")},
            "unbroken runs on 1 and 2 ranks take different samples in iteration 1 already",
        ),
        ({}, "the traces show no cause"),
    ],
)
def test_the_first_thing_that_is_wrong_is_the_cause(changed: dict[str, Any], said: str) -> None:
    found = probable_causes(replace(GOOD, **changed))
    assert len(found) == 1
    assert said in found[0]


def test_what_is_saved_is_told_with_what_is_not() -> None:
    evidence = replace(GOOD, second=trace(4, 8, differ_from=4, optimizers="x", schedulers="x"))
    found = probable_causes(evidence)
    assert len(found) == 2
    assert all(each.endswith("it has: model, trainer") for each in found)


# The report

STARTS = (
    StartSummary(2, 0, 7, 7, 85, "stopped 0.4 s after SIGUSR1"),
    StartSummary(2, 7, 16, 16, 0, "ended"),
)


def test_a_good_report_says_what_was_compared() -> None:
    comparison = Comparison((16, 16), tensors=3, numbers=1234)
    report = RehearsalReport("preemption", "train.py --lr 1", "exact", STARTS, 16, comparison)
    assert comparison.is_exact
    assert report.is_good
    assert str(report).splitlines() == [
        "rehearsal of preemption: train.py --lr 1",
        "  start 0, 2 ranks: iterations 1 to 7, saved at 7; stopped 0.4 s after SIGUSR1 (exit code 85)",
        "  start 1, 2 ranks: iterations 8 to 16, saved at 16; ended (exit code 0)",
        "exact: after iteration 16 all 3 tensors (1,234 numbers) have the bits of the unbroken run's",
    ]


def test_a_bad_report_names_tensors_the_iteration_and_the_cause() -> None:
    differences = [TensorDifference(f"model/{name}", "values", 0.5, 0.25) for name in "abcdef"]
    differences.insert(0, TensorDifference("model/z", "only in the unbroken run"))
    comparison = Comparison((16, 16), ("model",), ("model",), 9, 99, differences)
    report = RehearsalReport(
        "failure",
        "train.py",
        "differs",
        STARTS,
        16,
        comparison,
        Parting(8, ("optimizers",)),
        ("this.",),
        folder="/runs/r",
    )
    text = str(report)
    assert not report.is_good
    assert "differs: after iteration 16 7 of 9 tensors are not the unbroken run's\n  model/z: only in" in text
    assert "  model/a: largest difference 5.0e-01, relative 2.5e-01\n" in text
    assert "  and 2 more\n  first seen after iteration 8, in: optimizers\nbecause: this.\n" in text
    assert text.endswith("logs, traces and checkpoints: /runs/r")


def test_a_report_in_json_has_no_number_that_json_has_not() -> None:
    comparison = Comparison(differences=[TensorDifference("a", "values", math.inf, math.nan)])
    report = RehearsalReport("failure", "train.py", "differs", STARTS, 16, comparison)
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["comparison"]["differences"][0]["largest"] == "inf"
    assert plain["starts"][0]["code"] == 85


def test_the_error_of_a_test_travels_with_its_report() -> None:
    report = RehearsalReport("failure", "train.py", "failed", STARTS, 16, output="first\nlast\n")
    error = pickle.loads(pickle.dumps(RehearsalError(str(report), report)))
    assert error.report == report
    assert "said last:\n  | first\n  | last" in str(error)
