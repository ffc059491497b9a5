"""Results that leave the run: as plain numbers for a log, and sample by sample with their names."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate
from torchmetrics.classification import MulticlassConfusionMatrix

from allstep import Engine, World
from allstep.metrics import Mean, Metrics
from allstep.outputs import Gather
from tests.situations.judge import Judge

VALUES = [float(value) for value in range(10)]


class Named(Dataset[dict[str, Any]]):
    """Ten samples with a name each."""

    def __len__(self) -> int:
        return len(VALUES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": f"image-{index:03}.png", "x": VALUES[index], "odd": index % 2}


def logged(world: World) -> str:
    loader = world.loader(Named(), global_batch_size=4)
    engine = Engine(lambda e, b: b)
    metrics = {"mean": Mean(), "confusion": MulticlassConfusionMatrix(2)}
    transforms = {"mean": lambda b: b["x"].mean(), "confusion": lambda b: (b["odd"], b["odd"])}
    Metrics(metrics).attach(engine, transforms)
    return json.dumps(world.to_numbers(engine.run(loader, uneven="longest").metrics))


def test_metrics_can_be_written_as_json(same_at_every_world_size: Judge) -> None:
    """A line of JSON for each epoch, as scripts write for a plot."""
    right = json.dumps({"mean": sum(VALUES) / 10, "confusion": [[5, 0], [0, 5]]})
    same_at_every_world_size(logged, right)


def predictions(world: World) -> dict[str, Any]:
    loader = world.loader(Named(), global_batch_size=4, shuffle=True)
    engine = Engine(lambda e, b: {"id": b["id"], "score": b["x"] * 2})
    Gather("id", "score").attach(engine)
    return dict(engine.run(loader, uneven="longest").gathered)  # type: ignore[attr-defined]


def test_predictions_come_with_the_names_of_their_samples(same_at_every_world_size: Judge) -> None:
    """huggingface/accelerate#226: predictions of all ranks, of which one wants to know whose they are."""
    right = {
        "id": [f"image-{index:03}.png" for index in range(10)],
        "score": torch.tensor(VALUES).double() * 2,
        "index": torch.arange(10),
    }
    same_at_every_world_size(predictions, right)


def without_bad(samples: list[dict[str, Any]]) -> Any:
    return default_collate([sample for sample in samples if sample["x"] not in (3.0, 7.0)])


def predictions_without_bad(world: World) -> list[str]:
    loader = world.loader(Named(), global_batch_size=6, collate_fn=without_bad)
    engine = Engine(lambda e, b: b["id"])
    Gather("id").attach(engine)
    return engine.run(loader, uneven="longest").gathered["id"]  # type: ignore[attr-defined, no-any-return]


def test_predictions_are_of_the_samples_that_collation_left(same_at_every_world_size: Judge) -> None:
    """pytorch/pytorch#57429: samples that cannot be read are filtered in the collate function."""
    right = [f"image-{index:03}.png" for index in range(10) if index not in (3, 7)]
    same_at_every_world_size(predictions_without_bad, right)
