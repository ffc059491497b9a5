"""Metrics whose states are lists of tensors and objects, over ranks whose lists differ in length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics import Metric

from tests.metrics.worlds import all_same_bits, deal, on_one, over_ranks


class Boxes(Metric):
    """Keeps a list element for each image, as mean average precision does, and beside these what is no tensor."""

    full_state_update = False
    boxes: list[torch.Tensor]
    scores: list[torch.Tensor]
    masks: list[tuple[int, bytes]]
    images: torch.Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("boxes", [], dist_reduce_fx=None)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("masks", [], dist_reduce_fx=None)
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("top", torch.tensor(0.0), dist_reduce_fx="max")
        self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, images: list[torch.Tensor]) -> None:
        for image in images:
            self.boxes.append(image)
            self.scores.append(image.reshape(-1)[:1])
            self.masks.append((len(image), bytes(len(image))))
            self.images += 1
            self.top = torch.maximum(self.top, image.max())
            self.mean = self.mean * 0 + 3

    def compute(self) -> dict[str, torch.Tensor]:
        assert len(self.boxes) == len(self.masks) == int(self.images)
        scores = torch.cat(self.scores) if isinstance(self.scores, list) else self.scores
        return {
            "images": self.images,
            "boxes": torch.tensor(sum(len(box) for box in self.boxes)),
            "area": torch.stack([box.double().sum() for box in self.boxes]).sort().values,
            "masks": torch.tensor(sorted(len(mask) for _, mask in self.masks)),
            "scores": scores.sort().values,
            "top": self.top,
            "mean": self.mean,
        }


class Detection(Boxes):
    """Overrides torchmetrics' synchronisation as its detection metrics do, only because its lists hold tuples."""

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        raise AssertionError("it is not called")


Detection._sync_dist.__module__ = "torchmetrics.detection.mean_ap"


def images(*counts: int) -> list[list[torch.Tensor]]:
    """Batches of some images each, of one to three boxes each."""
    generator = torch.Generator().manual_seed(4)
    return [[torch.rand(1 + at % 3, 4, generator=generator) for at in range(count)] for count in counts]


def transform(batch: list[torch.Tensor]) -> Any:
    return (batch,)


@pytest.mark.parametrize("make", [Boxes, Detection])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_with_any_numbers_of_images_give_the_result_of_one_process(make: Any, world_size: int) -> None:
    data = images(3, 1, 2, 5)
    single = on_one(lambda: {"it": make()}, data, transform)
    for empty in (None, 0) if world_size > 1 else (None,):
        found = over_ranks(lambda: {"it": make()}, deal(data, world_size, empty=empty), transform)
        assert all_same_bits(found)
        for name, value in single["it"].items():
            torch.testing.assert_close(found[0]["it"][name], value)


def detections(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(5)

    def one(boxes: int, *, scored: bool) -> dict[str, torch.Tensor]:
        corner = torch.rand(boxes, 2, generator=generator) * 50
        size = 5 + torch.rand(boxes, 2, generator=generator) * 50
        found = {"boxes": torch.cat([corner, corner + size], 1), "labels": torch.arange(boxes) % 3}
        return {**found, "scores": torch.rand(boxes, generator=generator)} if scored else found

    made = []
    for at in range(count):
        target = one(1 + at % 3, scored=False)
        jitter = {name: value.clone() for name, value in target.items()}
        jitter["boxes"] += torch.rand(jitter["boxes"].shape, generator=generator) * 6
        made.append(([{**jitter, "scores": torch.rand(1 + at % 3, generator=generator)}], [target]))
    return made


def test_mean_average_precision_over_ranks_is_that_of_all_images() -> None:
    pytest.importorskip("torchvision")  # large, and no part of dev
    pytest.importorskip("pycocotools")  # no part of dev either
    from torchmetrics.detection import MeanAveragePrecision

    def make() -> dict[str, Metric]:
        return {"map": MeanAveragePrecision()}

    data = detections(7)
    single = on_one(make, data)["map"]
    assert 0 < float(single["map"]) < 1
    for world_size in (2, 3):
        found = over_ranks(make, deal(data, world_size, empty=0))
        assert all_same_bits(found)
        for name, value in single.items():
            torch.testing.assert_close(found[0]["map"][name], value)
