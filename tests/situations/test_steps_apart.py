"""Steps in which ranks do different things: a batch that one skips, a closure that is called as often as the loss says.
They train what one process would, or one error on all ranks says what to do."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from allstep import Engine, Events, Metrics, World
from allstep.errors import DivergenceError, EngineError, RanksError
from allstep.metrics import Mean
from allstep.testing import run_ranks
from tests.situations import changing_models as models
from tests.situations.test_one_models_buffers import normed, statistics

BATCH = 4
"""Samples of a global batch."""


def spoiled() -> TensorDataset:
    """Samples of which one, in the second global batch, is not a number."""
    x, y = models.samples().tensors
    x[BATCH + 1, 0] = torch.nan
    return TensorDataset(x, y)


def skipping(world: World, module: Callable[[], nn.Module], when: str, accumulate: int = 1) -> dict[str, Any]:
    """Train with a guard against batches that are not numbers, before or after the forward pass."""
    net = module()
    model = world.wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)

    def step(engine: Engine, batch: Any) -> torch.Tensor:
        x, y = batch
        if when == "before" and not torch.isfinite(x).all():
            engine.state.skip()
        loss = models.loss_of(model, x, y)
        if when == "after" and not torch.isfinite(loss):
            engine.state.skip()
            engine.state.skip()  # twice is once
        (loss * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    weights = []
    trainer = Engine(step, accumulate=accumulate)
    Metrics({"loss": Mean()}).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: weights.append(trainer.state.weight))
    trainer.run(world.loader(spoiled(), global_batch_size=BATCH), max_epochs=2)
    loss = float(trainer.state.metrics["loss"])
    return {"values": models.values_of(net), "loss": round(loss, 5), "weights": weights, "active": trainer.state.active}


def skipped_plainly(world_size: int) -> list[float]:
    """In one process: the samples of the rank with the bad one add nothing to the mean over the global batch."""
    net = models.new_net()
    optimizer = models.optimizer_for(net)
    x, y = spoiled().tensors
    for _ in range(2):
        for at in range(0, len(x), BATCH):
            optimizer.zero_grad()
            shares = [part + at for part in torch.arange(BATCH).tensor_split(world_size)]
            for share in shares:
                if torch.isfinite(x[share]).all():
                    (models.loss_of(net, x[share], y[share]) * len(share) / BATCH).backward()
            for each in net.parameters():
                each.grad = torch.zeros_like(each) if each.grad is None else each.grad
            optimizer.step()
    return models.values_of(net)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_batch_that_one_rank_skips_adds_nothing(world_size):
    """Lightning-AI/pytorch-lightning#4956, #5359."""
    for when in ("before", "after"):
        said = run_ranks(skipping, world_size, models.new_net, when)
        for found in said:
            assert found["values"] == pytest.approx(skipped_plainly(world_size), abs=1e-5)
            assert found["loss"] == said[0]["loss"] > 0  # and no NaN
            assert found["active"] is True
        assert sum(each["weights"].count(0.0) for each in said) == 2


def skipping_in_groups(world: World) -> list[float]:
    return skipping(world, models.new_net, "after", 3)["values"]


def test_a_skipped_batch_of_a_group_leaves_the_rest_of_it():
    first, second = run_ranks(skipping_in_groups, 2)
    assert first == second
    assert all(value == value for value in first)


def normed_skipping(world: World, when: str) -> list[float]:
    net = normed()
    skipping(world, lambda: net, when)
    return statistics(net)


def test_a_batch_skipped_before_its_forward_pass_leaves_no_trace_in_buffers():
    for world_size in (1, 2):
        for buffers in run_ranks(normed_skipping, world_size, "before"):
            assert all(value == value for value in buffers)


def test_a_skip_after_the_forward_pass_says_that_buffers_are_spoiled():
    with pytest.raises(RanksError) as raised:
        run_ranks(normed_skipping, 1, "after")
    assert isinstance(raised.value.__cause__, EngineError)
    assert "norm.running_mean" in str(raised.value)
    assert "before the forward pass" in str(raised.value)


def weightless(world: World, module: Callable[[], nn.Module]) -> tuple[list[float], list[float]]:
    """Bad batches count no samples, so that the vote gives the others their weight."""
    net = module()
    model = world.wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    trainer = models.trainer_of(world, model, optimizer)
    trainer = Engine(
        trainer.process_function, samples_in=lambda batch: len(batch[0]) if torch.isfinite(batch[0]).all() else 0
    )
    trainer.run(world.loader(spoiled(), global_batch_size=BATCH), max_epochs=1)
    return models.values_of(net), statistics(net)


def weightless_plainly(world_size: int) -> list[float]:
    """In one process: the mean over the samples of those ranks that have no bad one."""
    net = models.new_net()
    optimizer = models.optimizer_for(net)
    x, y = spoiled().tensors
    for at in range(0, len(x), BATCH):
        shares = [part + at for part in torch.arange(BATCH).tensor_split(world_size)]
        good = torch.cat([share for share in shares if torch.isfinite(x[share]).all()])
        optimizer.zero_grad()
        models.loss_of(net, x[good], y[good]).backward()
        optimizer.step()
    return models.values_of(net)


@pytest.mark.parametrize("world_size", [2, 3])
def test_bad_batches_of_no_samples_leave_the_exact_mean_of_the_others(world_size):
    for values, _ in run_ranks(weightless, world_size, models.new_net):
        assert values == pytest.approx(weightless_plainly(world_size), abs=1e-5)


def test_a_batch_of_no_samples_leaves_no_trace_in_buffers():
    for _, buffers in run_ranks(weightless, 2, normed):
        assert all(value == value for value in buffers)


def test_skip_outside_a_run_says_where_it_belongs():
    with pytest.raises(EngineError, match="outside a run"):
        Engine(lambda engine, batch: None).state.skip()


def test_a_copy_of_a_state_belongs_to_no_engine():
    state = Engine(lambda engine, batch: None).run([1])
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert copied.iteration == 1
        assert "skip" not in repr(copied)
        with pytest.raises(EngineError, match="no engine runs"):
            copied.skip()


# Steps that come apart


def leaves_out(world: World, iterations: int) -> None:
    """Rank 1 returns before its backward pass in iteration 5, as guards do that know of one process only."""
    net = models.new_net()
    model = world.wrap(net)
    optimizer = models.optimizer_for(net)

    def step(engine: Engine, batch: Any) -> None:
        loss = models.loss_of(model, *batch)
        if world.rank == 1 and engine.state.iteration == 5:
            return
        optimizer.zero_grad()
        (loss * engine.state.weight).backward()
        optimizer.step()

    data = [tuple(each[:2] for each in models.samples().tensors)] * iterations
    Engine(step).run(data)


def test_a_batch_left_out_on_one_rank_is_an_error_in_words():
    """Lightning-AI/pytorch-lightning#5243, NVIDIA-NeMo/Speech#3801."""
    with pytest.raises(RanksError) as raised:
        run_ranks(leaves_out, 2, 300)
    assert isinstance(raised.value.__cause__, DivergenceError)
    assert "rank 1 made no backward pass in iteration 5" in str(raised.value)
    assert "state.skip()" in str(raised.value)


def test_where_a_rank_waits_for_ever_the_report_names_the_batch_left_out():
    with pytest.raises(RanksError) as raised:
        run_ranks(leaves_out, 2, 7, env={"ALLSTEP_LIMITS": "step=2"})
    assert "rank 1 made no backward pass in iteration 5" in str(raised.value)
    assert "state.skip()" in str(raised.value)


def line_searched(world: World, reduced: bool, epochs: int = 2) -> list[float]:
    """L-BFGS over the whole set, whose closure gives each rank's own loss or the loss of all."""
    net = models.new_net()
    model = world.wrap(net)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=8, line_search_fn="strong_wolfe")

    def step(engine: Engine, batch: Any) -> float:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = models.loss_of(model, *batch) * engine.state.weight
            loss.backward()
            return world.all_reduce(loss.detach(), "mean") if reduced else loss.detach()

        return float(optimizer.step(closure))

    Engine(step).run(world.loader(models.samples(), global_batch_size=12), max_epochs=epochs)
    return models.values_of(net)


def reduced_line_search(world: World) -> list[float]:
    return line_searched(world, True)


def test_lbfgs_with_a_reduced_loss_trains_as_in_one_process(same_at_every_world_size):
    """pytorch/pytorch#30439."""
    net = models.new_net()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=8, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = models.loss_of(net, *models.samples().tensors)
        loss.backward()
        return loss.detach()

    for _ in range(2):
        optimizer.step(closure)
    same_at_every_world_size(reduced_line_search, models.values_of(net), tolerance=1e-3)


def own_line_search(world: World) -> None:
    """Each rank's loss decides how often its closure is called: rank 1 is nearly done from the beginning."""
    net = models.new_net()
    model = world.wrap(net)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=8, tolerance_change=1e-2)

    def step(engine: Engine, batch: Any) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = models.loss_of(model, *batch)
            loss.backward()
            return loss.detach() * (1e-3 if world.rank == 1 else 1.0)

        optimizer.step(closure)

    Engine(step).run(world.loader(models.samples(), global_batch_size=12), max_epochs=30)


def test_closures_called_unlike_often_are_a_named_error_and_no_hang():
    with pytest.raises(RanksError) as raised:
        run_ranks(own_line_search, 2, env={"ALLSTEP_LIMITS": "step=2"})
    assert "backward passes" in str(raised.value)
    assert "LBFGS" in str(raised.value)


def drifting(world: World) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line_searched(world, False, 3)
    return [str(each.message) for each in caught if "different models" in str(each.message)]


def test_ranks_that_train_different_models_are_named_by_one_warning():
    first, second = run_ranks(drifting, 2)
    assert len(first) == 1
    assert "rank 1's first.weight is not that of rank 0" in first[0]
    assert second == []
    assert run_ranks(drifting, 1) == [[]]


def past_ddp(world: World, how: str) -> list[str]:
    """Train with gradients that DDP does not reduce."""
    net = models.new_net()
    model = world.wrap(net)
    optimizer = models.optimizer_for(net)

    def step(engine: Engine, batch: Any) -> None:
        optimizer.zero_grad()
        with model.no_sync() if how == "no_sync" and world.world_size > 1 else contextlib.nullcontext():
            called = world.unwrap(model) if how == "module" else model
            (models.loss_of(called, *batch) * engine.state.weight).backward()
        optimizer.step()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Engine(step).run(world.loader(models.samples(), global_batch_size=6), max_epochs=2)
    return [str(each.message) for each in caught if "different models" in str(each.message)]


@pytest.mark.parametrize("how", ["module", "no_sync"])
def test_a_step_that_trains_past_ddp_is_named_by_a_warning(how):
    """jingyaogong/minimind#854, rosinality/swapping-autoencoder-pytorch#22."""
    first, second, third = run_ranks(past_ddp, 3, how)
    assert len(first) == 1
    assert "rank 1's first.weight, rank 2's first.weight" in first[0]
    assert "model.module(x) or inside model.no_sync()" in first[0]
    assert second == third == []


def test_a_step_that_trains_alike_is_not_warned_of():
    assert run_ranks(past_ddp, 2, "as it should be") == [[], []]
