"""What the progress bar says: epochs, iterations, numbers of all ranks, and a summary; and when it says it."""

from __future__ import annotations

import re
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from allstep import Alone, Engine, Events, Mean, Metrics, ProgressBar
from allstep.errors import MissingExtraError
from allstep.handlers.pace import MOST_APART, Pace
from allstep.handlers.progress_screens import LogScreen, choose_screen
from allstep.testing import run_ranks
from allstep.world import World
from tests.engine.recording import nothing


class RecordingScreen:
    def __init__(self, columns: int | None = 80, seconds: float = 0.0) -> None:
        self.columns, self.seconds = columns, seconds
        self.drawn: list[str] = []
        self.left: list[str] = []
        self.closed = 0

    def draw(self, text: str) -> None:
        self.drawn.append(text)

    def leave(self, text: str) -> None:
        self.left.append(text)

    def close(self) -> None:
        self.closed += 1


def shown(columns: int | None = 80, *, step: Any = nothing, attach: Any = None, **run: Any) -> RecordingScreen:
    screen = RecordingScreen(columns)
    trainer = Engine(step, coordinator=Alone())
    if attach is not None:
        attach(trainer)
    ProgressBar(screen=screen).attach(trainer)
    trainer.run(**({"data": [0] * 4, "max_epochs": 2} | run))
    return screen


def test_the_first_epoch_is_epoch_1_and_every_line_fits() -> None:
    screen = shown()
    assert screen.drawn[0].startswith("epoch 1/2:  25%|")
    assert "| 1/4 [" in screen.drawn[0]
    assert any(line.startswith("epoch 2/2:") for line in screen.drawn)
    assert {len(line) for line in screen.drawn} == {80}


def test_data_of_unknown_length_is_counted_without_a_bar() -> None:
    screen = shown(data=(each for each in range(3)), max_epochs=1)
    assert screen.drawn[0].startswith("epoch 1/1: 1it [")


def test_the_run_leaves_a_summary() -> None:
    screen = shown()
    assert re.fullmatch(r"done: epoch 2, iteration 8, 8 iterations in 00:0\d, \S+ it/s", screen.left[-1])
    assert screen.closed == 1


def test_the_summary_says_who_ended_the_run() -> None:
    def attach(trainer: Engine) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: trainer.terminate(reason="enough"))

    assert shown(attach=attach).left[-1].startswith("stopped by rank 0: enough: epoch 1, iteration 3, ")


def test_numbers_of_outputs_and_results_are_shown() -> None:
    def attach(trainer: Engine) -> None:
        Metrics({"mean": Mean()}).attach(trainer, lambda output: output["loss"], "running")

    screen = shown(
        200, step=lambda engine, batch: {"loss": torch.tensor(float(engine.state.iteration)), "y": torch.zeros(3)},
        attach=attach, max_epochs=1,
    )  # fmt: skip
    assert "loss=3, mean=2]" in screen.drawn[2]
    assert screen.left[-1].endswith("it/s, mean=2.5")


def test_numbers_that_do_not_fit_are_left_out_whole() -> None:
    screen = shown(80, step=lambda engine, batch: {"loss": 0.5, "a quite long name of a number": 0.25})
    assert all("loss=0.5]" in line and len(line) == 80 for line in screen.drawn)
    assert not any("quite" in line for line in screen.drawn)


def test_a_run_that_goes_on_inside_an_epoch_shows_its_place() -> None:
    screen = RecordingScreen()
    trainer = Engine(nothing, coordinator=Alone())
    trainer.load_state_dict({"iteration": 6, "epoch_length": 4, "max_epochs": 2})
    ProgressBar(screen=screen).attach(trainer)
    trainer.run([0] * 4)
    assert screen.drawn[0].startswith("epoch 2/2:  75%|")


def test_an_epoch_of_a_second_leaves_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    left = shown().left
    assert [line[:19] for line in left[:2]] == ["epoch 1/2: 4/4 [00:", "epoch 2/2: 4/4 [00:"]


def test_a_failed_run_takes_the_line_away() -> None:
    screen = RecordingScreen()
    trainer = Engine(lambda engine, batch: 1 / 0, coordinator=Alone())
    ProgressBar(screen=screen).attach(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.run([0])
    assert (screen.closed, screen.left) == (1, [])


def test_an_evaluation_shows_its_line_and_leaves_none() -> None:
    screen = RecordingScreen()
    trainer = Engine(nothing, coordinator=Alone())
    evaluator = Engine(nothing, coordinator=Alone(), name="evaluator")
    ProgressBar(screen=screen).attach(evaluator)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0] * 3))
    trainer.run([0])
    assert screen.drawn[0].startswith("evaluator:  33%|")
    assert (screen.left, screen.closed) == ([], 1)


def test_in_a_log_lines_come_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(choose_screen({}, log_seconds=30), LogScreen)
    trainer = Engine(lambda engine, batch: time.sleep(0.001), coordinator=Alone())
    ProgressBar(log_seconds=0.05).attach(trainer)
    trainer.run([0] * 200)
    *lines, last = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 30
    assert re.fullmatch(r"epoch 1/1: \d+/200 \[00:0\d<00:0\d, +\d+\.\d\dit/s\]", lines[0])
    assert last.startswith("done: epoch 1, iteration 200, ")


def _lines_of_ranks(world: World) -> tuple[list[str], list[str]]:
    screen = RecordingScreen(200)
    trainer = Engine(lambda engine, batch: float(world.rank))
    Metrics({"mean": Mean()}).attach(trainer)
    ProgressBar(screen=screen).attach(trainer)
    trainer.run([0] * 3, max_epochs=2)
    return screen.drawn, screen.left


@pytest.mark.slow
def test_over_two_ranks_the_main_one_shows_numbers_of_both() -> None:
    (drawn, left), other = run_ranks(_lines_of_ranks, 2)
    assert other == ([], [])
    assert left[-1].endswith("mean=0.5")
    assert "mean=0.5]" in drawn[-1]
    assert "output=0," in drawn[-1]


def test_without_tqdm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'allstep[progress]'")):
        ProgressBar()


@pytest.mark.parametrize(
    ("options", "text"), [({"log_seconds": 0}, "log_seconds is 0"), ({"output": 3}, "output is 3")]
)
def test_wrong_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        ProgressBar(**options)


def test_a_clock_is_looked_at_seldom_and_lets_through_in_time() -> None:
    now = [0.0]
    looks: list[int] = []
    pace = Pace(1.0, clock=lambda: now[0])
    due = []
    for count in range(1, 50_001):  # 10,000 counts a second
        now[0] += 1e-4
        if pace.next_due(count) <= count:
            looks.append(count)
            if pace.matches(None, count):
                due.append(now[0])
    assert len(looks) < 300
    assert [round(at) for at in due] == [1, 2, 3, 4]
    assert max(later - earlier for earlier, later in pairwise(due)) < 1.1
    assert pace.next_due(50_001) <= 50_000 + MOST_APART


def test_import_of_the_handlers_needs_no_extra() -> None:
    source = (Path(sys.modules["allstep"].__file__ or "").parent / "handlers").glob("*.py")
    for path in source:
        assert not re.search(r"^(from|import) (tqdm|psutil|pynvml|IPython)", path.read_text(), re.MULTILINE)
