"""allstep's own handlers on an engine of Ignite's kind: each attaches and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import allstep
from allstep import handlers
from allstep.ignite import Engine, Events

EVALUATOR = Engine(lambda engine, batch: None)
EVALUATOR.state.metrics["score"] = 0.0

MAKE: dict[str, Callable[[Any, nn.Module, torch.optim.Optimizer, Path], Any]] = {
    "DeviceStats": lambda engine, model, optimizer, folder: handlers.DeviceStats(),
    "EMA": lambda engine, model, optimizer, folder: handlers.EMA(model),
    "EarlyStopping": lambda engine, model, optimizer, folder: handlers.EarlyStopping(3, lambda engine: 1.0, engine),
    "Evaluate": lambda engine, model, optimizer, folder: handlers.Evaluate(EVALUATOR, [1]),
    "Freeze": lambda engine, model, optimizer, folder: handlers.Freeze(model, {"weight": 2}),
    "GarbageCollection": lambda engine, model, optimizer, folder: handlers.GarbageCollection(),
    "GradientClipping": lambda engine, model, optimizer, folder: handlers.GradientClipping(optimizer, 1.0),
    "OutputStore": lambda engine, model, optimizer, folder: handlers.OutputStore(),
    "Preemption": lambda engine, model, optimizer, folder: handlers.Preemption(signals=[]),
    "Profiler": lambda engine, model, optimizer, folder: handlers.Profiler(folder, range(50, 51)),
    "ProgressBar": lambda engine, model, optimizer, folder: handlers.ProgressBar(),
    "SWA": lambda engine, model, optimizer, folder: handlers.SWA(model, 1),
    "SaveBest": lambda engine, model, optimizer, folder: handlers.SaveBest(folder, {"model": model}, "score"),
    "Schedule": lambda engine, model, optimizer, folder: handlers.Schedule(lambda step: 1.0, optimizer),
    "StopOnSignal": lambda engine, model, optimizer, folder: handlers.StopOnSignal(signals=[]),
    "TerminateOnNan": lambda engine, model, optimizer, folder: handlers.TerminateOnNan(),
    "Throughput": lambda engine, model, optimizer, folder: handlers.Throughput(flops=True),
    "TimeLimit": lambda engine, model, optimizer, folder: handlers.TimeLimit(60.0),
    "TimeProfiler": lambda engine, model, optimizer, folder: handlers.TimeProfiler(),
    "Timer": lambda engine, model, optimizer, folder: handlers.Timer(
        Events.ITERATION_STARTED, Events.ITERATION_COMPLETED
    ),
    "Track": lambda engine, model, optimizer, folder: allstep.Track(folder),
}
RUN_THEMSELVES = {"BatchSizeFinder", "LRFinder"}
RESULTS = {"AveragedWeights", "BatchSizes", "LRCurve"}


def test_every_handler_is_among_those_that_are_tried() -> None:
    assert {*MAKE} - {"Track"} | RUN_THEMSELVES | RESULTS == {*handlers.__all__}


@pytest.mark.parametrize("name", MAKE)
def test_a_handler_of_ours_sees_the_run_and_its_failure(name: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(lambda engine, batch: 1.0 / batch)
    engine.state.metrics["score"] = 0.0
    handler = MAKE[name](engine, model, optimizer, tmp_path)
    assert handler.attach(engine) is handler
    assert engine.run([1, 2], max_epochs=2).iteration == 4
    with pytest.raises(ZeroDivisionError):
        engine.run([1, 0])
