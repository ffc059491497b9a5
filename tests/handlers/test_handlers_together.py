"""All handlers for watching at once: over ranks, and what they cost when none is due, told by counting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from allstep import (
    EMA,
    SWA,
    Alone,
    Checkpoint,
    Engine,
    Evaluate,
    Events,
    Freeze,
    GradientClipping,
    Mean,
    Metrics,
    ProgressBar,
    SaveBest,
    Schedule,
    Throughput,
    Track,
)
from allstep.engine.registry import HandlerSlot
from allstep.handlers import DeviceStats, GarbageCollection, OutputStore, Profiler, TimeProfiler, Timer
from allstep.testing import SimulatedRank, run_ranks, simulate
from allstep.world import World
from tests.engine.recording import CountingRank, nothing

NEVER = 10**9


def attach_all(trainer: Engine, folder: str, due: int = NEVER) -> Engine:
    """Attach every handler, with something to do in each `due` iterations; the evaluator."""
    evaluator = Engine(lambda engine, batch: batch, coordinator=trainer.coordinator, name="evaluator")
    Metrics({"score": Mean()}).attach(evaluator)
    ProgressBar().attach(trainer)
    Track(f"{folder}/track", every=due).attach(trainer)
    Evaluate(evaluator, [torch.ones(1)], every=(due, "10 hours")).attach(trainer)
    TimeProfiler(range(due, due + 1)).attach(trainer)
    Timer(name="epoch, s").attach(trainer)
    GarbageCollection(due).attach(trainer)
    OutputStore(every=due).attach(trainer)
    Profiler(f"{folder}/traces", range(due, due + 1), warm_up=0).attach(trainer)
    DeviceStats(due).attach(trainer)
    SaveBest(f"{folder}/best", {"trainer": trainer}, "score").attach(trainer, evaluator)
    return evaluator


def test_when_none_is_due_iterations_are_hardly_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Engine(nothing, coordinator=Alone())
    attach_all(trainer, str(tmp_path))
    looked: list[Any] = []
    call = HandlerSlot.call

    def counting(self: HandlerSlot, engine: Any, *rest: Any) -> None:
        if engine is trainer and "EPOCH" not in self.event.name:
            looked.append(self.event)
        call(self, engine, *rest)

    monkeypatch.setattr(HandlerSlot, "call", counting)
    trainer.run([0] * 20_000)
    # Two clocks are looked at: some twenty times a second, and never more than a thousand iterations apart.
    assert set(looked) == {Events.STARTED, Events.ITERATION_COMPLETED, Events.COMPLETED}
    assert len(looked) < 1000


def _collectives(coordinator: SimulatedRank, folder: str, handlers: bool) -> list[str]:
    counting = CountingRank(coordinator)
    trainer = Engine(nothing, coordinator=counting, name="trainer")  # type: ignore[arg-type]
    if handlers:
        evaluator = Engine(nothing, coordinator=Alone(), name="evaluator")
        Evaluate(evaluator, [0], every=("10 hours", "epoch")).attach(trainer)
        Throughput(lambda batch: 1, flops=1.0, every=5).attach(trainer)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters())
        attached: list[Any] = [
            *(ProgressBar(), TimeProfiler(), Timer(name="s"), DeviceStats(5), OutputStore(), GarbageCollection(5)),
            *(Schedule(lambda steps: 1.0, optimizer, batch_size=3), EMA(model, batch_size=3), SWA(model, start=1)),
            *(Freeze(model, {"bias": 2}), GradientClipping(optimizer, 1.0), Profiler(folder, range(3, 5))),
            Track(folder, every=5),
        ]
        for handler in attached:
            handler.attach(trainer)
    trainer.run(
        [torch.zeros(2)] * 30, max_epochs=2, window=1
    )  # else the number of votes depends on how long windows take
    return counting.calls


def test_handlers_add_no_collective(tmp_path: Path) -> None:
    assert simulate(_collectives, 2, str(tmp_path), True) == simulate(_collectives, 2, str(tmp_path), False)


def _train(world: World, folder: str) -> dict[str, float]:
    trainer = Engine(lambda engine, batch: torch.ones(2, 2).mm(torch.ones(2, 2))[0, 0])
    attach_all(trainer, folder, due=5)
    Throughput(torch.Tensor.numel, unit="tokens", flops=True, peak=1e9, every=5).attach(trainer)
    trainer.run([torch.ones(3)] * 12, max_epochs=2)
    return {name: float(value) for name, value in trainer.state.metrics.items()}


@pytest.mark.slow
def test_over_two_ranks_all_work_together_and_agree_on_every_number(tmp_path: Path) -> None:
    first, second = run_ranks(_train, 2, str(tmp_path))
    assert first == second
    assert {"tokens/s", "TFLOP/s", "MFU", "epoch, s", "val/score", "device/memory_gib"} <= first.keys()
    assert all(value > 0 for name, value in first.items() if "percent" not in name)
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["rank_0_iterations_5-5.json.gz"]


def test_a_checkpoint_finds_what_handlers_keep_by_itself(tmp_path: Path) -> None:
    def start(stop_at: int) -> tuple[float, list[int], int, float | None]:
        trainer = Engine(lambda engine, batch: engine.state.iteration, coordinator=Alone())
        evaluator = Engine(lambda engine, batch: torch.tensor([1.0 / trainer.state.iteration]), coordinator=Alone())
        Metrics({"score": Mean()}).attach(evaluator)
        throughput = Throughput(lambda batch: 10).attach(trainer)
        store = OutputStore().attach(trainer)
        timer = Timer(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED).attach(trainer)
        best = SaveBest(tmp_path / "best", {"trainer": trainer}, "score").attach(trainer, evaluator)
        Evaluate(evaluator, [0], every=2).attach(trainer)
        Checkpoint(tmp_path / "run").attach(trainer).resume()
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda: trainer.terminate())
        trainer.run([0] * 6)
        return throughput.total, store.data, timer.count, best.best

    start(stop_at=3)
    assert start(stop_at=99) == (60, [1, 2, 3, 4, 5, 6], 6, 0.5)
