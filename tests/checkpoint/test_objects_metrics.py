"""Metrics that were saved in the middle of an epoch come to what they come to in an unbroken one."""

from __future__ import annotations

import pytest
import torch
from torchmetrics import MeanMetric

from allstep import Engine, Events
from allstep.checkpoint import Checkpoint
from allstep.metrics import Metrics
from allstep.testing import run_ranks

pytestmark = pytest.mark.slow


class Stopped(Exception):
    pass


def mean_of_epoch(world, folder, stop_at, attach_first=True):
    engine = Engine(lambda engine, batch: batch)
    data = world.loader(torch.arange(24.0).square(), global_batch_size=4)
    metrics = Metrics({"mean": MeanMetric()})
    if attach_first:
        metrics.attach(engine)
    checkpoint = Checkpoint(folder, {"engine": engine, "metrics": metrics}, every=1)
    checkpoint.attach(engine)
    checkpoint.resume()
    if not attach_first:
        metrics.attach(engine)

    def stop(engine):
        if engine.state.iteration == stop_at:
            raise Stopped

    engine.add_event_handler(Events.ITERATION_COMPLETED, stop)
    try:
        engine.run(data, max_epochs=1)
    except Stopped:
        checkpoint.close()
        return None
    return float(engine.state.metrics["mean"])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_metric_in_the_middle_of_an_epoch_is_counted_once_at_any_world_size(world_size, tmp_path):
    run_ranks(mean_of_epoch, 2, str(tmp_path), 4)
    expected = float(torch.arange(24.0).square().mean())
    assert run_ranks(mean_of_epoch, world_size, str(tmp_path), None) == pytest.approx([expected] * world_size)


def test_metrics_that_are_attached_after_resuming_are_counted_once_too(tmp_path):
    run_ranks(mean_of_epoch, 2, str(tmp_path), 4)
    expected = float(torch.arange(24.0).square().mean())
    assert run_ranks(mean_of_epoch, 2, str(tmp_path), None, False) == pytest.approx([expected] * 2)
