"""The examples in docs/howto/ranks.md run, on two ranks, and give what they say."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from allstep.testing import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "ranks.md"


def run_examples(world, examples):
    dataset = TensorDataset(torch.randn(16, 4), torch.zeros(16, dtype=torch.long))
    names = {"world": world, "torch": torch, "nn": nn, "F": F, "dataset": dataset, "download": lambda: "here"}
    for example in examples:
        exec(example, names)
    return {name: repr(names[name]) for name in ("total", "mean", "summed", "parts", "choice", "names")}


def test_the_examples_give_what_the_page_says():
    page = PAGE.read_text()
    opening, *examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "allstep.init()" in opening
    first, second = run_ranks(run_examples, 2, examples)
    said = dict(re.findall(r"^(\w+) = world\..*  # (.+)$", page, re.MULTILINE))
    assert set(said) == {"total", "mean", "summed", "parts", "names"}
    assert {name: first[name] for name in said} == said == {name: second[name] for name in said}
    assert first["choice"] == second["choice"]
