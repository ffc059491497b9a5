"""What a step uses is found, by the name that the script has for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from allstep.checkpoint.references import can_be_saved, objects_used_by
from allstep.data import ShardedBatchSampler

shared_model = nn.Linear(2, 2)
unused_model = nn.Linear(2, 2)


def names(*functions):
    return [name for name, _ in objects_used_by(functions)]


def uses_a_global(engine, batch):
    return shared_model(batch)


def uses_it_through_another(engine, batch):
    return uses_a_global(engine, batch)


def test_closures_and_globals_that_the_code_reads_are_found():
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())

    def step(engine, batch):
        def loss():
            return shared_model(model(batch)).unused_model

        optimizer.step()
        return loss()

    assert names(step) == ["model", "optimizer", "shared_model"]
    assert names(uses_it_through_another) == ["shared_model"]
    assert other is not model


class Trainer:
    def __init__(self):
        self.nets = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}
        self.optimizer = torch.optim.SGD(self.nets["a"].parameters())
        self.rate = 0.1

    def step(self, engine, batch):
        return batch

    def __call__(self, engine, batch):
        return self.step(engine, batch)


@pytest.mark.parametrize("form", ["method", "object", "partial"])
def test_attributes_of_the_object_whose_step_it_is_are_found(form):
    trainer = Trainer()
    step = {"method": trainer.step, "object": trainer, "partial": partial(trainer.step, None)}[form]
    assert names(step) == ["nets.a", "nets.b", "optimizer"]


def test_an_optimizer_is_found_through_its_scheduler():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert names(lambda: scheduler.step()) == ["scheduler", "scheduler.optimizer"]


def test_each_object_is_found_once_under_its_first_name():
    model = nn.Linear(1, 1)
    same = model
    assert names(lambda e, b: model(b), lambda e: same.train()) == ["model"]


def test_what_has_a_place_in_data_is_not_taken_for_state():
    assert not can_be_saved(ShardedBatchSampler(range(4), global_batch_size=2))
    assert not can_be_saved([1])
    assert can_be_saved(nn.ModuleList())
