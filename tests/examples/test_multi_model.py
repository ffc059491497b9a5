"""Two models, two optimizers and a dictionary output in one step, over two processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples.launching import TWO_RANKS, run


@pytest.mark.slow
@pytest.mark.nightly
def test_both_models_learn_over_two_processes(tmp_path: Path) -> None:
    printed = run(TWO_RANKS, "multi_model.py", folder=tmp_path)
    epochs = [
        tuple(map(float, found))
        for found in re.findall(r"reconstruction_loss (\S+), classifier_loss (\S+), accuracy (\S+)", printed)
    ]
    assert len(epochs) == 10
    (first_reconstruction, first_loss, _), (last_reconstruction, last_loss, last_accuracy) = epochs[0], epochs[-1]
    assert last_reconstruction < first_reconstruction / 2
    assert last_loss < first_loss / 2
    assert last_accuracy > 0.7
