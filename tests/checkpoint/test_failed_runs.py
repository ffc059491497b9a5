"""Issue 13 A1: a run that has failed keeps its good checkpoints, from before the ranks have agreed on its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from allstep import Engine, Events, TerminateOnNan
from allstep.checkpoint import Checkpoint, LocalStorage, Store, entries
from allstep.testing import run_ranks
from allstep.world import World
from tests.checkpoint.storages import Gated, some_state, states


def steps(folder: Path) -> list[int]:
    return [entry.manifest.step for entry in entries(str(folder)) if entry.manifest is not None]


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


def train_into_nan(world: World, folder: Path, nan_at: int, who: int) -> tuple[int, str | None]:
    model = world.wrap(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def step(engine: Engine, batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(batch).mean()
        if engine.state.iteration >= nan_at and world.rank == who:
            loss = loss * torch.nan
        loss.backward()
        optimizer.step()
        return loss.detach()

    engine = Engine(step)
    TerminateOnNan().attach(engine)
    Checkpoint(folder, {"model": model, "engine": engine}, every=20, keep_last=3).attach(engine)
    engine.run(world.loader(Numbers(), batch_size=2, shuffle=True), max_epochs=1)
    return engine.state.iteration, engine.state.outcome


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_saves_that_fall_due_before_the_vote_tells_of_a_nan_are_withheld(who: int, tmp_path: Path) -> None:
    ends = run_ranks(train_into_nan, 2, tmp_path, 200, who)
    assert ends[0] == ends[1]
    assert ends[0][1] == "failed"
    assert ends[0][0] > 220, "the vote came before another save was due; the test shows nothing"
    # An older one stays where the failure was known before the save of 180 was written.
    assert steps(tmp_path)[-3:] == [140, 160, 180]
    store = Store(str(tmp_path))
    found = store.choose()
    assert found is not None
    assert all(tensor.isfinite().all() for tensor in store.load(found).state["model"].values())


def test_a_save_of_a_state_that_is_not_trusted_is_withheld_and_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(str(tmp_path), strict=True, keep_last=1)
    assert store.save(1, some_state(1)).wait()
    pending = store.save(2, some_state(2), distrust=lambda: "the loss is NaN")
    assert not pending.wait()
    assert pending.error is None
    assert pending.withheld == "rank 0 says that the run has failed: the loss is NaN"
    assert "step 2 is not saved: rank 0 says that the run has failed: the loss is NaN" in caplog.text
    assert list(states(tmp_path)) == ["save-000001-step-1"]
    assert store.unsaved is None


def test_nothing_is_removed_once_the_state_is_distrusted_while_it_is_written(tmp_path: Path) -> None:
    said: list[str] = []

    class Late(LocalStorage):
        def write(self, folder: str, name: str, blocks: Any) -> None:
            if folder.startswith("tmp-save-000002"):
                said.append("the loss is NaN")
            super().write(folder, name, blocks)

    store = Store("", storage=Late(str(tmp_path)), keep_last=1)
    for step in (1, 2):
        assert store.save(step, some_state(step), distrust=lambda: said[-1] if said else None).wait()
    assert list(states(tmp_path)) == ["save-000001-step-1", "save-000002-step-2"]
    said.clear()
    assert store.save(3, some_state(3)).wait()
    assert list(states(tmp_path)) == ["save-000003-step-3"]


def test_a_run_that_goes_on_after_a_failed_one_saves_again(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: torch.tensor(float(batch)))
    TerminateOnNan().attach(engine)
    Checkpoint(tmp_path, {"engine": engine}, every=1, keep_last=None).attach(engine)
    engine.run([1, 2, float("nan"), 4], max_epochs=1)
    assert engine.state.outcome == "failed"
    assert steps(tmp_path) == [1, 2]
    engine.run([1, 2, 3, 4], max_epochs=3)
    assert len(steps(tmp_path)) > 2
    assert steps(tmp_path)[-1] == engine.state.iteration


def test_a_save_under_way_when_the_run_fails_is_not_lost_with_it(tmp_path: Path) -> None:
    storage = Gated(str(tmp_path))
    engine = Engine(lambda engine, batch: None)

    @engine.on(Events.ITERATION_STARTED(once=2))
    def fail() -> None:
        engine.terminate(outcome="failed", reason="seen")
        storage.gate.set()

    Checkpoint(Store("", storage=storage), {"engine": engine}, every=1).attach(engine)
    engine.run([1, 2, 3], max_epochs=1)
    assert engine.state.outcome == "failed"
    assert states(tmp_path) == {"save-000001-step-1": "whole"}
