"""Preemption: which ends of a run make the process ask to be started again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from allstep import Alone, Engine, Events, Preemption, TimeLimit
from allstep.errors import Preempted
from allstep.exit_codes import PREEMPTED
from tests.engine.recording import nothing


@pytest.fixture(autouse=True)
def _handlers_stay_as_they_were() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def signalled_at_3(*others: Any, accumulate: int = 1) -> Engine:
    """An engine to which a signal comes in iteration 3, after `others` have been attached."""
    engine = Engine(nothing, coordinator=Alone(), accumulate=accumulate)
    for each in others:
        each(engine)
    engine.add_event_handler(Events.ITERATION_STARTED(once=3), lambda: os.kill(os.getpid(), signal.SIGTERM))
    return engine


def end_at_3(**how: Any) -> Any:
    return lambda engine: engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: engine.terminate(**how))


def run_out_of_time(engine: Engine) -> None:
    TimeLimit(1, clock=lambda: float(engine.state.iteration > 2)).attach(engine)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("other", [end_at_3(), run_out_of_time], ids=["terminate", "time limit"])
def test_a_signal_counts_where_another_asked_for_the_same_end_before(other: Any, accumulate: int) -> None:
    engine = signalled_at_3(other, accumulate=accumulate)
    with Preemption().attach(engine), pytest.raises(Preempted) as left:
        engine.run(range(20))
    assert left.value.code == PREEMPTED
    assert (engine.state.outcome, engine.state.stop_reason) == ("preempted", "rank 0: signal SIGTERM")


def test_a_reason_that_speaks_of_a_signal_is_none() -> None:
    engine = Engine(nothing, coordinator=Alone())
    end_at_3(reason="signal to noise is good enough")(engine)
    with Preemption().attach(engine):
        assert engine.run(range(20)).outcome == "left"


@pytest.mark.parametrize("outcome", ["finished", "failed"])
def test_a_run_that_others_ended_for_good_does_not_ask_to_be_started_again(outcome: str) -> None:
    engine = signalled_at_3(end_at_3(outcome=outcome))
    with Preemption().attach(engine):
        assert engine.run(range(20)).outcome == outcome


def test_a_run_that_was_complete_does_not_either() -> None:
    engine = signalled_at_3()
    with Preemption().attach(engine):
        assert engine.run(range(20), max_iters=3).iteration == 3


def test_whoever_ends_a_run_as_preempted_has_it_started_again() -> None:
    engine = Engine(nothing, coordinator=Alone())
    end_at_3(outcome="preempted", reason="spot notice")(engine)
    with Preemption().attach(engine), pytest.raises(Preempted):
        engine.run(range(20))


@pytest.mark.parametrize("is_submitted", [False, True])
def test_a_job_of_allstep_submit_is_requeued_by_its_own_process_only(
    is_submitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "47")
    if is_submitted:
        monkeypatch.setenv("ALLSTEP_SAVES", str(tmp_path / "saves.jsonl"))
    engine = signalled_at_3()
    with Preemption(requeue=True).attach(engine), pytest.raises(Preempted):
        engine.run(range(5))
    assert (tmp_path / "asked").exists() != is_submitted
