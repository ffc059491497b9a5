"""What allstep logs is seen where nobody configured logging, once, and not where somebody did."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.forked import Script, run_forked
from tests.jobs.job import Job
from tests.jobs.launchers import script
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


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """What came of scripts that configure nothing, something, or fail, by what they do."""
    folder = tmp_path_factory.mktemp("logs")
    scripts = {
        "nothing": ("", ""),
        "warnings": ("logging.basicConfig(level=logging.WARNING)", ""),
        "information": ("logging.basicConfig(level=logging.INFO, format='%(message)s')", ""),
        "fails": ("", "    raise ValueError('no')"),
    }
    given = [
        Script(script(folder, TRAINS.format(configures=configures, afterwards=afterwards), f"says_{name}.py"))
        for name, (configures, afterwards) in scripts.items()
    ]
    return dict(zip(scripts, run_forked(folder, *given), strict=True))


def test_information_and_a_summary_are_shown_without_any_configuration(jobs: dict[str, Job]) -> None:
    assert jobs["nothing"].code == 0
    first, second = jobs["nothing"].err.splitlines()
    assert first == "allstep: for your information"
    assert second.startswith("allstep: done in ")
    assert "train: 2 epochs, 10 iterations in " in second
    assert "evaluator" not in second  # what ran inside of another's run is part of it
    assert jobs["nothing"].out == "[] 0\n"  # all is as it was


def test_a_script_that_configures_logging_decides_by_itself(jobs: dict[str, Job]) -> None:
    assert (jobs["warnings"].code, jobs["warnings"].err) == (0, "")
    assert jobs["information"].code == 0
    assert jobs["information"].err.splitlines()[0] == "for your information"
    assert jobs["information"].err.count("done in ") == 1


def test_a_run_that_fails_has_no_summary(jobs: dict[str, Job]) -> None:
    assert jobs["fails"].code == 1
    assert "done in" not in jobs["fails"].err


@pytest.mark.slow
def test_several_ranks_say_it_once(tmp_path: Path) -> None:
    done = run(tmp_path, "--nproc", "2", script(tmp_path, TRAINS.format(configures="", afterwards="")))
    assert done.code == 0
    assert done.err.count("for your information") == 1
    assert done.err.count("allstep: done in ") == 1
