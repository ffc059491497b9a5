"""Metrics that override `_sync_dist`, over ranks whose lists differ in length: exact, and nobody waits for nobody."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchmetrics import Metric

from allstep import Engine
from allstep.coordination import Coordinator
from allstep.errors import MetricError, MetricMismatchError
from allstep.metrics import Metrics
from allstep.metrics.nodes import nodes
from allstep.metrics.states import make_plan
from allstep.testing import run_ranks, simulate
from allstep.world import World
from tests.metrics.noting import Noting
from tests.metrics.worlds import all_same_bits, deal, on_one, over_ranks, take


class Boxes(Metric):
    """Keeps a list element for each image, as mean average precision does, and gathers what is no tensor by itself."""

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


class SyncedBoxes(Boxes):
    """Calls torchmetrics' own way first, and then collectives of its own."""

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        super()._sync_dist(dist_sync_fn=dist_sync_fn, process_group=process_group)
        self.masks = self._gathered(self.masks)

    def _gathered(self, masks: list[Any]) -> list[Any]:
        if not dist.is_initialized():
            return masks
        dist.barrier()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, masks)
        assert all(each == gathered[0] for each in gathered)  # torchmetrics' way has joined them already
        return masks


def images(*counts: int) -> list[list[torch.Tensor]]:
    """Batches of some images each, of one to three boxes each."""
    generator = torch.Generator().manual_seed(4)
    return [[torch.rand(1 + at % 3, 4, generator=generator) for at in range(count)] for count in counts]


def transform(batch: list[torch.Tensor]) -> Any:
    return (batch,)


@pytest.mark.parametrize("make", [Boxes, SyncedBoxes])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_with_any_numbers_of_images_give_the_result_of_one_process(make: Any, world_size: int) -> None:
    data = images(3, 1, 2, 5)
    single = on_one(lambda: {"it": make()}, data, transform)
    for empty in (None, 0) if world_size > 1 else (None,):
        found = over_ranks(lambda: {"it": make()}, deal(data, world_size, empty=empty), transform)
        assert all_same_bits(found)
        for name, value in single["it"].items():
            torch.testing.assert_close(found[0]["it"][name], value)


def over_a_group(world: World, dealt: list[Any]) -> dict[str, Any]:
    engine = Engine(take, uneven="longest", idle="skip")
    metric = SyncedBoxes()
    Metrics({"it": metric}).attach(engine, transform)
    engine.run(dealt[world.rank])
    assert type(metric) is SyncedBoxes
    assert len(metric.boxes) == sum(map(len, dealt[world.rank]))
    return dict(engine.state.metrics["it"])


@pytest.mark.slow
def test_collectives_of_its_own_meet_over_real_ranks_with_unequal_numbers_of_images() -> None:
    data = images(3, 1, 2, 5)
    single = on_one(lambda: {"it": Boxes()}, data, transform)["it"]
    for empty in (None, 1):
        found = run_ranks(over_a_group, 2, deal(data, 2, empty=empty), timeout=150)
        assert all_same_bits(found)
        for name, value in single.items():
            torch.testing.assert_close(found[0][name], value)


def test_shapes_that_do_not_fit_are_an_error_on_all_ranks_and_the_metric_is_as_before() -> None:
    class Growing(SyncedBoxes):
        def update(self, size: int) -> None:
            self.images = torch.zeros(size)

    def rank(coordinator: Coordinator) -> str:
        engine, metric = Engine(take, coordinator=coordinator), Growing()
        Metrics({"it": metric}).attach(engine)
        with pytest.raises(MetricError) as caught:
            engine.run([2 + coordinator.rank])
        assert type(metric) is Growing
        assert metric.images.shape == (2 + coordinator.rank,)
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors[0] == errors[1]
    assert "metric 'it' could not be reduced in its own way" in errors[0]


def test_a_gathering_function_of_the_users_that_gathers_unequally_is_an_error_on_all_ranks() -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        metric = Boxes(dist_sync_fn=lambda tensor, group: [tensor] * coordinator.world_size)
        Metrics({"it": metric}).attach(engine, transform)
        with pytest.raises(MetricMismatchError) as caught:
            engine.run(images(3, 1) if coordinator.rank else images(1))
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors[0] == errors[1]
    assert "gathers unequally often" in errors[0]


def test_torchmetrics_detection_is_reduced_with_all_others() -> None:
    class Detection(SyncedBoxes):
        def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
            raise AssertionError("it is not called")

    Detection._sync_dist.__module__ = "torchmetrics.detection.mean_ap"
    assert not make_plan("event", nodes({"it": Detection()}), {}).alone
    data = images(3, 1, 2)
    single = on_one(lambda: {"it": Detection()}, data, transform)["it"]
    found = over_ranks(lambda: {"it": Detection()}, deal(data, 3, empty=1), transform)
    assert all_same_bits(found)
    for name, value in single.items():
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


class SyncsItself(Noting):
    """Reduces in a way of its own: `times` gathers."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        for _ in range(self.times):
            self.count = torch.stack(dist_sync_fn(self.count, process_group)).amax(0)


def test_a_metric_with_a_way_of_its_own_is_reduced_in_it_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "allstep.engine"):
        found = over_ranks(lambda: {"own": SyncsItself(2), "n": Noting()}, [[1] * 4, [1], [1, 2]])
    assert [(int(rank["own"]), int(rank["n"])) for rank in found] == [(4, 7)] * 3
    assert "metric own (SyncsItself) reduces its states in a way of its own" in caplog.text


def test_a_way_of_its_own_that_gathers_unequally_is_an_error_on_all_ranks() -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"own": SyncsItself(1 + coordinator.rank)}).attach(engine)
        with pytest.raises(MetricMismatchError) as caught:
            engine.run([1])
        return str(caught.value)

    errors = simulate(rank, 3)
    assert errors == [errors[0]] * 3
    assert "metric 'own' (SyncsItself)" in errors[0]
    assert "on rank 0" in errors[0]


def test_a_way_of_its_own_that_fails_on_one_rank_is_an_error_on_all() -> None:
    class Failing(SyncsItself):
        def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
            if self.count == 2:
                raise OSError("broken")
            super()._sync_dist(dist_sync_fn, process_group)

    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        metric = Failing(1)
        Metrics({"own": metric}).attach(engine)
        with pytest.raises(MetricError) as caught:
            engine.run([1] * (1 + coordinator.rank))
        assert int(metric.count) == 1 + coordinator.rank
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors == [errors[0]] * 2
    assert "rank 1: OSError('broken')" in errors[0]
