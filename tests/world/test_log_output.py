"""What allstep logs is seen where nobody configured logging, once, and not where somebody did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.launchers import environment, script
from tests.jobs.running import run

TRAINS = """
import logging, sys
import allstep
from allstep import Engine, Events

{configures}
with allstep.init() as world:
    def train(engine, batch):
        return batch
    evaluator = Engine(lambda engine, batch: None, name="evaluator")
    trainer = Engine(train)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(range(2)) and None)
    trainer.run(range(5), max_epochs=2)
    logging.getLogger("allstep.data").info("for your information")
{afterwards}
print(logging.getLogger("allstep").handlers, logging.getLogger("allstep").level)
"""


def said(folder: Path, configures: str = "", afterwards: str = "") -> tuple[str, str]:
    path = script(folder, TRAINS.format(configures=configures, afterwards=afterwards))
    done = subprocess.run([sys.executable, path], env=environment(), capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_information_and_a_summary_are_shown_without_any_configuration(tmp_path: Path) -> None:
    out, err = said(tmp_path)
    first, second = err.splitlines()
    assert first == "allstep: for your information"
    assert second.startswith("allstep: done in ")
    assert "train: 2 epochs, 10 iterations in " in second
    assert "evaluator" not in second  # what ran inside of another's run is part of it
    assert out == "[] 0\n"  # all is as it was


def test_a_script_that_configures_logging_decides_by_itself(tmp_path: Path) -> None:
    _, err = said(tmp_path, "logging.basicConfig(level=logging.WARNING)")
    assert err == ""
    _, err = said(tmp_path, "logging.basicConfig(level=logging.INFO, format='%(message)s')")
    assert err.splitlines()[0] == "for your information"
    assert err.count("done in ") == 1


def test_a_run_that_fails_has_no_summary(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, script(tmp_path, TRAINS.format(configures="", afterwards="    raise ValueError('no')"))],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "done in" not in done.stderr


@pytest.mark.slow
def test_several_ranks_say_it_once(tmp_path: Path) -> None:
    done = run(tmp_path, "--nproc", "2", script(tmp_path, TRAINS.format(configures="", afterwards="")))
    assert done.code == 0
    assert done.err.count("for your information") == 1
    assert done.err.count("allstep: done in ") == 1
