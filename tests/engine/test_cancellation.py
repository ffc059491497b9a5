"""Ctrl-C during a run: one line, a save, the end; a second one at once; on real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from allstep.checkpoint import entries, verify
from allstep.engine import Engine, Events
from allstep.errors import Cancelled
from tests.jobs.launchers import ALLSTEP, ROOT, script
from tests.jobs.running import start

ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}

TRAINS = """
import sys, time
import torch
import allstep
from allstep import Checkpoint, Engine, Events

with allstep.init(seed=0) as world:
    model = world.wrap(torch.nn.Linear(1, 1))

    def step(engine, batch):
        time.sleep(0.01 if engine.state.iteration < 4 else float(sys.argv[2]))

    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: print("under way", flush=True))
    Checkpoint(sys.argv[1], {"model": model, "trainer": trainer}, every=None).attach(trainer)
    trainer.run(range(100_000), epoch_length=100_000)
    print("went on", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([sys.executable, "-u"], id="alone", marks=pytest.mark.nightly),
        pytest.param([*ALLSTEP, "run", "--nproc", "2"], id="two"),
    ],
)
def test_ctrl_c_saves_and_ends_the_process_with_one_line(tmp_path: Path, launcher: list[str]) -> None:
    arguments = [str(script(tmp_path, TRAINS)), str(tmp_path / "saved"), "0.01"]
    with start(tmp_path, [*launcher, *arguments], env=ENV) as running:
        running.await_line("under way", 2 if "run" in launcher else 1)
        running.process.send_signal(signal.SIGINT)
        done = running.end()
    assert done.code == 130
    assert done.text.count("Ctrl-C: the run ends after the present iteration") == 1
    assert "Traceback" not in done.text
    assert "went on" not in done.text
    [saved] = entries(str(tmp_path / "saved"))
    assert saved.state == "whole"
    assert verify(saved) == []
    assert saved.manifest is not None
    assert "Ctrl-C" in str(saved.manifest.facts["stop_reason"])


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-u", str(script(tmp_path, TRAINS)), str(tmp_path / "saved"), "60"]
    with start(tmp_path, command, env=ENV) as running:
        running.await_line("under way")
        running.process.send_signal(signal.SIGINT)
        running.await_line("Ctrl-C: the run ends")
        time.sleep(0.5)  # as a person's fingers take
        running.process.send_signal(signal.SIGINT)
        done = running.end(limit=30.0)
    assert done.code in (130, -signal.SIGINT)


def test_a_run_that_is_cancelled_raises_and_can_go_on() -> None:
    seen: list[int] = []
    engine = Engine(lambda engine, batch: seen.append(batch))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Cancelled) as raised:
        engine.run(range(5))
    assert raised.value.code == 130
    assert seen == [0, 1, 2]
    assert engine.state.outcome == "cancelled"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    engine.run(range(5))
    assert seen == [0, 1, 2, 3, 4]


def test_ctrl_c_in_an_evaluation_ends_the_run_around_it() -> None:
    evaluated: list[int] = []
    evaluator = Engine(lambda engine, batch: evaluated.append(batch))
    evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: signal.raise_signal(signal.SIGINT))
    trainer = Engine(lambda engine, batch: None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: evaluator.run(range(4)) and None)
    with pytest.raises(Cancelled):
        trainer.run(range(9))
    assert evaluated == [0, 1, 2, 3]
    assert trainer.state.iteration == 2


def test_a_handler_of_the_scripts_own_keeps_the_signal() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        engine = Engine(lambda engine, batch: None)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: signal.raise_signal(signal.SIGINT))
        engine.run(range(3))
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [signal.SIGINT]
    assert engine.state.iteration == 3


def test_ctrl_c_after_the_last_iteration_is_raised_in_the_same_way() -> None:
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.COMPLETED(once=1), lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Cancelled):
        engine.run(range(3))
    assert engine.state.iteration == 3
    engine.run(range(3), max_epochs=2)  # nothing of it is left
    assert engine.state.iteration == 6


LATE = """
import os, signal, sys
import torch
import allstep
from allstep import Checkpoint, Engine, Events

with allstep.init(seed=0) as world:
    trainer = Engine(lambda engine, batch: None)
    if world.rank in map(int, sys.argv[2].split(",")):
        trainer.add_event_handler(Events.COMPLETED, lambda: os.kill(os.getpid(), signal.SIGINT))
    Checkpoint(sys.argv[1], {"trainer": trainer}).attach(trainer)
    trainer.run(range(3))
    world.barrier()
    print("went on", flush=True)
"""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("reached", "code", "said"),
    [
        ("0,1", 130, "Ctrl-C: the run ends after the present iteration"),  # as a terminal and the launcher do it
        ("1", 1, "rank 1 of 2 left first"),
    ],
)
def test_ctrl_c_behind_the_last_vote_ends_the_job_saved(tmp_path: Path, reached: str, code: int, said: str) -> None:
    command = [*ALLSTEP, "run", "--nproc", "2", str(script(tmp_path, LATE)), str(tmp_path / "saved"), reached]
    with start(tmp_path, command, env=ENV) as running:
        done = running.end(limit=60.0)
    assert done.code == code
    assert said in done.text
    assert ("Traceback" in done.text) == (code == 1)  # of the rank that the other one left
    assert "went on" not in done.text
    [saved] = entries(str(tmp_path / "saved"))
    assert saved.state == "whole"
