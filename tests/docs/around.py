"""What a fragment of a page takes for granted: a World, a model, data, engines; and how a page's fragments are run."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import allstep
from allstep import Checkpoint, Engine, Events, Mean, Metrics, create_supervised_evaluator


def around(world: allstep.World) -> dict[str, Any]:
    """New objects under the names that pages use."""
    train_set = TensorDataset(torch.randn(96, 4), torch.randint(10, (96,)))
    test_set = TensorDataset(torch.randn(24, 4), torch.randint(10, (24,)))
    model = world.wrap(nn.Linear(4, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)

    def train_step(engine: Engine, batch: object) -> dict[str, torch.Tensor]:
        x, y = world.to_device(batch)
        scores = model(x)
        loss = F.cross_entropy(scores, y)
        optimizer.zero_grad()
        (loss * engine.state.weight).backward()
        optimizer.step()
        return {"loss": loss.detach(), "scores": scores.detach(), "labels": y}

    evaluator = create_supervised_evaluator(model)
    return {
        "F": F,
        "torch": torch,
        "nn": nn,
        "DataLoader": DataLoader,
        "MulticlassAccuracy": MulticlassAccuracy,
        "Checkpoint": Checkpoint,
        "Engine": Engine,
        "Events": Events,
        "Mean": Mean,
        "Metrics": Metrics,
        "world": world,
        "train_set": train_set,
        "test_set": test_set,
        "dataset": train_set,
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "train_step": train_step,
        "loader": world.loader(train_set, global_batch_size=8, shuffle=True),
        "test_loader": world.loader(test_set, global_batch_size=8),
        "trainer": Engine(train_step),
        "evaluator": evaluator,
        "args": argparse.Namespace(lr=0.1, epochs=2),
        "download": lambda: "here",
    }


def run_fragments(world: allstep.World, fragments: list[tuple[str, str]]) -> dict[str, str]:
    """Run the fragments of one page in turn, each in an empty folder; what they left in plain names, as text.

    Where a fragment leaves its trainer unused the trainer is run for an epoch, so that what was attached to it works.
    """
    kept: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for name, text in fragments:
        given = around(world)
        module = sys.modules["page"] = types.ModuleType("page")  # where decorators and dataclasses look names up
        names = module.__dict__
        names.update(given | kept)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            exec(compile(text, name, "exec"), names)
            if names["trainer"] is given["trainer"] and given["trainer"].state.iteration == 0:
                given["trainer"].run(given["loader"], max_epochs=1)
        kept.update({key: value for key, value in names.items() if key not in given and not key.startswith("__")})
    return {key: repr(value) for key, value in kept.items() if isinstance(value, int | float | list | torch.Tensor)}


def run_script(world: allstep.World, name: str, text: str) -> str:
    """Run a whole script in this rank's process, which has left its World; what it printed."""
    world.close()
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        path = Path("train.py")
        path.write_text(text)
        sys.argv = [str(path)]
        module = types.ModuleType("__main__")
        module.__file__ = str(path.absolute())
        before, sys.modules["__main__"] = sys.modules["__main__"], module
        try:
            exec(compile(text, name, "exec"), module.__dict__)
        finally:
            sys.modules["__main__"] = before
    return printed.getvalue()
