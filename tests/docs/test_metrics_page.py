"""The examples in docs/howto/metrics.md run, with what each imports and the engines, model and data around it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allstep import Alone, Engine, create_supervised_evaluator

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "metrics.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def around() -> dict[str, Any]:
    """What the page takes for granted."""
    model = nn.Linear(4, 10)
    loader = [(torch.randn(6, 4), torch.randint(10, (6,))) for _ in range(12)]
    trainer = Engine(lambda e, b: {"loss": 0.5, "scores": model(b[0]), "labels": b[1]}, coordinator=Alone())
    return {
        "model": model,
        "trainer": trainer,
        "evaluator": create_supervised_evaluator(
            model, output_transform=lambda x, y, y_pred: {"y_pred": y_pred, "y": y}
        ),
        "test_loader": loader,
    }


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[-1][:40] for block in BLOCKS])
def test_an_example_of_the_page_runs(block: str) -> None:
    if "torchvision" in block:
        pytest.importorskip("torchvision")  # an example for those who have it; it is no part of dev
        compile(block, str(PAGE), "exec")
        exec("\n".join(line for line in block.splitlines() if "import" in line), {})
        return
    names = around()
    exec(block, names)
    names["trainer"].run(names["test_loader"])


def test_what_examples_import_of_allstep_is_there() -> None:
    lines = [line for block in BLOCKS for line in block.splitlines() if line.startswith("from allstep")]
    assert len(lines) >= 5
    for line in lines:
        exec(line, {})
