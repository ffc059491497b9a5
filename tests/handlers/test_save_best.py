"""Only what is better is saved, on all ranks, and a run that goes on decides as the unbroken one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allstep import Alone, Checkpoint, Engine, Events, Mean, Metrics, SaveBest
from allstep.checkpoint import entries
from allstep.testing import run_ranks
from allstep.world import World
from tests.engine.recording import nothing


def kept_in(folder: Path) -> dict[int, float]:
    """The result of each save that is kept, by its iteration."""
    manifests = [each.manifest for each in entries(str(folder))]
    return {each.step: each.metrics["score"] for each in manifests if each is not None and each.metrics}


def best_of(scores: Sequence[float], folder: Path, mode: Any = "max", count: int = 1) -> SaveBest:
    trainer = Engine(nothing, coordinator=Alone())

    @trainer.on(Events.EPOCH_COMPLETED)
    def score() -> None:
        trainer.state.metrics["score"] = scores[trainer.state.epoch - 1]

    best = SaveBest(folder, {"trainer": trainer}, "score", mode, count=count).attach(trainer)
    trainer.run([0], max_epochs=len(scores))
    return best


@pytest.mark.parametrize(
    ("scores", "options", "kept"),
    [
        ([1, 3, 2], {}, {2: 3}),
        ([3, 1, 2], {"mode": "min"}, {2: 1}),
        ([1, 3, 2, 5, 4], {"count": 2}, {4: 5, 5: 4}),
        ([2, 2, 2], {}, {1: 2}),
        ([math.nan, 1, math.nan], {}, {2: 1}),
    ],
)
def test_the_best_are_kept(
    scores: list[float], options: dict[str, Any], kept: dict[int, float], tmp_path: Path
) -> None:
    best = best_of(scores, tmp_path, **options)
    assert kept_in(tmp_path) == kept
    assert best.best == (min if options.get("mode") == "min" else max)(kept.values())


def test_what_is_no_better_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, engine: (saved.append(engine.state.epoch), save(self, engine)))
    best_of([1, 0, 2, 2, 1, 3], tmp_path)
    assert saved == [1, 3, 6]


def test_a_name_that_no_result_has_is_named_with_those_there_are(tmp_path: Path) -> None:
    trainer = Engine(nothing, coordinator=Alone())
    trainer.state.metrics["accuracy"] = 1.0
    SaveBest(tmp_path, {"trainer": trainer}, "acuracy").attach(trainer)
    with pytest.raises(ValueError, match=r"metric is 'acuracy', and state\.metrics of nothing has accuracy"):
        trainer.run([0])


def _train(world: World, folder: str, epochs: int) -> list[float | None]:
    model = nn.Linear(2, 2)
    trainer = Engine(lambda engine, batch: None)
    evaluator = Engine(lambda engine, batch: torch.tensor([float(batch)]), name="evaluator")
    Metrics({"score": Mean()}).attach(evaluator)
    scores = [5.0, 1.0, 4.0, 7.0]
    best = SaveBest(f"{folder}/best", {"model": model}, "score").attach(trainer, evaluator)
    # Ranks see 2 less and 2 more: the result is that of both.
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda: evaluator.run([scores[trainer.state.epoch - 1] + 4 * world.rank - 2]),
    )
    Checkpoint(f"{folder}/run", {"trainer": trainer, "best": best}).attach(trainer).resume()
    seen: list[float | None] = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(best.best))
    trainer.run([0] * 3, max_epochs=epochs)
    return seen


@pytest.mark.slow
def test_two_ranks_save_together_and_a_resumed_run_knows_the_best(tmp_path: Path) -> None:
    assert run_ranks(_train, 2, str(tmp_path), 1) == [[5.0]] * 2
    assert run_ranks(_train, 2, str(tmp_path), 3) == [[5.0, 5.0]] * 2
    assert kept_in(tmp_path / "best") == {3: 5.0}
    assert run_ranks(_train, 2, str(tmp_path), 4) == [[7.0]] * 2
    assert 12 in kept_in(tmp_path / "best")
