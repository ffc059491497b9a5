"""Training over XLA gives the CPU's curve, and compiles what it needs in the first epoch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "digits_curve.py"
PER_EPOCH = 23


@cache
def curve(*arguments: str, **environment: str) -> dict[str, list[float]]:
    """What the script printed."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=os.environ | {"PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def by_epoch(losses: list[float]) -> list[float]:
    return [sum(losses[at : at + PER_EPOCH]) / PER_EPOCH for at in range(0, len(losses), PER_EPOCH)]


def runs() -> list[object]:
    several = {"CPU_NUM_DEVICES": "4"}
    return [
        pytest.param((), {}, id="one_device"),
        pytest.param(("--spmd",), several, id="spmd_over_four"),
        pytest.param(("--accumulate", "4"), {}, id="accumulated"),
        pytest.param(("--spmd", "--accumulate", "4"), several, id="accumulated_over_four"),
    ]


@pytest.mark.parametrize(("arguments", "environment"), runs())
def test_loss_curve_is_that_of_the_cpu(arguments, environment):
    accumulated = tuple(each for each in arguments if each != "--spmd")
    expected, found = curve("cpu", *accumulated), curve("xla", *arguments, **environment)
    assert len(found["losses"]) == 3 * PER_EPOCH
    assert by_epoch(found["losses"]) == pytest.approx(by_epoch(expected["losses"]), abs=1e-4)
    assert found["accuracies"] == pytest.approx(expected["accuracies"], abs=2 / 360)


@pytest.mark.parametrize(("arguments", "environment"), runs())
def test_nothing_is_compiled_after_the_first_epoch(arguments, environment):
    before, first, *later = curve("xla", *arguments, **environment)["compiled"]
    assert before < first < PER_EPOCH  # so none is compiled for each step
    assert later == [first] * 2


def test_a_metric_of_training_compiles_no_more_once_the_second_epoch_began():
    """Its update is collected with the next step, so that the second epoch's first step is a graph of its own."""
    expected, found = curve("cpu", "--metric"), curve("xla", "--metric")
    assert found["means"] == pytest.approx(expected["means"], abs=1e-4)
    _, first, second, third = found["compiled"]
    assert first < second == third <= first + 2


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [pytest.param((), {}, id="one_device"), pytest.param(("--spmd",), {"CPU_NUM_DEVICES": "4"}, id="spmd_over_four")],
)
def test_bf16_learns_and_compiles_once(arguments, environment):
    found = curve("xla", "--precision", "bf16", *arguments, **environment)
    assert found["accuracies"][-1] > 0.9
    assert len(set(found["compiled"][1:])) == 1


def test_digits_are_trained_by_allstep_run(tmp_path):
    out = tmp_path / "digits.jsonl"
    example = Path(__file__).parents[2] / "examples" / "digits.py"
    command = [sys.executable, "-m", "allstep", "run", "--device", "xla", example, "--epochs", "2", "--out", out]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | {"PJRT_DEVICE": "CPU"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "1 rank(s) on xla" in done.stdout
    assert json.loads(out.read_text().splitlines()[-1])["test_accuracy"] > 0.85
