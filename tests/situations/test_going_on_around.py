"""Going on after something, in what is around a training step: evaluations, loaders, schedules, scalers.

As in `test_going_on`, the value to come to is that of a run in which nothing happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from allstep import Engine, Events, Metrics, World
from allstep.metrics import Mean
from allstep.trainers import create_supervised_evaluator, create_supervised_trainer
from tests.situations.judge import Judge
from tests.situations.test_going_on import (
    BATCHES,
    EPOCHS,
    GLOBAL_BATCH,
    SAMPLES,
    Once,
    Stopped,
    Training,
    failing,
    plain_weights,
    samples,
)


def caught(run: Callable[[], Any]) -> bool:
    """Whether a run was stopped by `failing`."""
    try:
        run()
    except Stopped:
        return True
    return False


def _evaluations(world: World, case: str) -> list[float]:
    """The result of an evaluation after each epoch, where the one after the second epoch is stopped at first."""
    training, found = Training(world), []
    supervised = case.startswith("supervised")

    def step(engine: Engine, batch: torch.Tensor) -> torch.Tensor:
        return training.net.weight.detach() * batch

    evaluator = (
        create_supervised_evaluator(
            training.model, prepare_batch=lambda batch, *_: (batch[:, None], batch), output_transform=lambda x, y, z: z
        )
        if supervised
        else Engine(step, name="evaluation")
    )
    Metrics({"mean": Mean()}).attach(evaluator, lambda output: output.flatten())
    stop = Once(BATCHES + 2, failing if "fail" in case else lambda: evaluator.terminate(agreed=True))
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, stop)

    def evaluate() -> None:
        found.append(float(evaluator.run(training.loader).metrics["mean"]))

    def evaluate_until_it_works() -> None:
        if not caught(evaluate) and stop.left == 0 and "terminate" in case:
            stop.left = -1
            found.pop()  # of a part
        elif stop.left != 0:
            return
        if stop.left <= 0 and len(found) == 1:
            stop.left = -1
            evaluate()

    if case.endswith("outside"):
        for epoch in range(1, EPOCHS + 1):
            training.engine.run(training.loader, max_epochs=epoch)
            evaluate_until_it_works()
    elif case.endswith("uncaught"):
        training.engine.add_event_handler(Events.EPOCH_COMPLETED, evaluate)
        assert caught(training.run)
        training.run()
    else:
        training.engine.add_event_handler(Events.EPOCH_COMPLETED, evaluate_until_it_works)
        training.run()
    return found


EVALUATIONS = ("fails inside", "fails uncaught", "terminates inside", "supervised fails outside")


def _all_evaluations(world: World) -> dict[str, list[float]]:
    return {case: _evaluations(world, case) for case in EVALUATIONS}


def test_an_evaluation_that_was_left_is_done_whole(same_at_every_world_size: Judge) -> None:
    """A result over the second half of the data, of the next epoch's model, was reported as that of all of it."""
    mean = float(samples().mean())
    expected = [plain_weights(epochs=epoch)[0] * mean for epoch in range(1, EPOCHS + 1)]
    same_at_every_world_size(_all_evaluations, dict.fromkeys(EVALUATIONS, expected))


class Reading(Dataset[torch.Tensor]):
    """Reads samples; fails once at one of them, as a file system does."""

    def __init__(self, fails_at: int | None) -> None:
        self.fails_at = fails_at

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.fails_at:
            raise Stopped
        return samples()[index]


def _loaders(world: World, workers: int, source: str) -> list[float]:
    training = Training(world)
    reading = Reading(15 if source == "dataset" else None)
    more = {"persistent_workers": True} if workers else {}
    training.loader = world.loader(reading, global_batch_size=GLOBAL_BATCH, num_workers=workers, **more)
    if source == "step":
        training.after_backward = Once(6, failing)
    # The batch of sample 15 is read by one rank alone, so this is a job of one rank where the data fails.
    with pytest.raises(Exception, match=r"^$|Stopped"):
        training.run()
    reading.fails_at = None
    if source == "dataset" and workers:  # its workers have copies of the dataset
        training.loader = world.loader(reading, global_batch_size=GLOBAL_BATCH, num_workers=workers, **more)
    training.run()
    return training.weights()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_the_failed_steps_batch_again(same_at_every_world_size: Judge, workers: int) -> None:
    same_at_every_world_size(_loaders, plain_weights(), workers, "step", world_sizes=(1, 2) if workers else (1, 2, 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_failed_once_gives_every_sample_once(same_at_every_world_size: Judge, workers: int) -> None:
    same_at_every_world_size(_loaders, plain_weights(), workers, "dataset", world_sizes=(1,))


def _iterator(world: World, accumulate: int) -> tuple[list[float], int]:
    training = Training(world, accumulate)
    passes = [batch for _ in range(EPOCHS) for batch in training.loader]
    training.after_backward = Once(6, failing)
    data = iter(passes)
    terms = {"max_epochs": EPOCHS, "epoch_length": BATCHES}
    assert caught(lambda: training.engine.run(data, **terms))
    training.engine.run(data, **terms)
    return training.weights(), training.engine.state.iteration


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_iterator_gives_what_was_read_ahead_once(same_at_every_world_size: Judge, accumulate: int) -> None:
    """What ranks read ahead of an iterator, and the failed group's batches, come again, and nothing comes twice."""
    same_at_every_world_size(_iterator, (plain_weights(accumulate=accumulate), EPOCHS * BATCHES), accumulate)


def _smaller_batches(world: World, way: str) -> list[float]:
    """Out of memory in iteration 6: the same global batch in halves that are accumulated, from the same sample on."""
    training = Training(world)
    training.after_backward = Once(6, failing)
    assert caught(training.run)
    halves = world.loader(
        samples(), global_batch_size=GLOBAL_BATCH, max_batch_per_rank=GLOBAL_BATCH // world.world_size // 2 or 1
    )
    if way == "saved":
        state, training.engine = training.engine.state_dict(), Engine(training.step, name="training")
        training.engine.load_state_dict(state)
        training.optimizer.zero_grad()
    training.loader = halves
    training.run()
    return training.weights()


@pytest.mark.parametrize("way", ["alive", "saved"])
def test_out_of_memory_and_on_with_smaller_batches(same_at_every_world_size: Judge, way: str) -> None:
    """The new loader deals the same samples in other pieces, so its place is that of the old one."""
    same_at_every_world_size(_smaller_batches, plain_weights(), way)


def _schedule(world: World, accumulate: int) -> list[float]:
    training, rates = Training(world, accumulate), []
    schedule = torch.optim.lr_scheduler.ExponentialLR(training.optimizer, 0.5)
    training.engine.add_event_handler(Events.OPTIMIZER_STEP_COMPLETED, schedule.step)
    training.engine.add_event_handler(
        Events.OPTIMIZER_STEP_COMPLETED(every=2), lambda e: rates.append(schedule.get_last_lr()[0])
    )
    training.after_backward = Once(7, failing)
    assert caught(training.run)
    training.run()
    return rates


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_schedule_steps_once_for_each_optimizer_step(same_at_every_world_size: Judge, accumulate: int) -> None:
    """huggingface/accelerate#963, Lightning-AI/pytorch-lightning#1476: the schedule ran ahead of the optimizer."""
    steps = EPOCHS * -(-BATCHES // accumulate)
    same_at_every_world_size(_schedule, [0.1 * 0.5**step for step in range(2, steps + 1, 2)], accumulate)


class FailsOnce(torch.optim.SGD):
    """An optimizer whose third step fails before it changes anything."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == 3:
            raise Stopped
        return super().step(closure)


def _scaled(world: World) -> list[float]:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 2.0)
    optimizer = FailsOnce(net.parameters(), lr=0.1, momentum=0.9)
    trainer = create_supervised_trainer(
        world.wrap(net),
        optimizer,
        nn.functional.mse_loss,
        prepare_batch=lambda batch, *_: (batch[:, None], torch.ones(len(batch), 1)),
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0),
    )
    loader = world.loader(samples().float(), global_batch_size=GLOBAL_BATCH)
    assert caught(lambda: trainer.run(loader, max_epochs=EPOCHS))
    trainer.run(loader, max_epochs=EPOCHS)
    return net.weight.flatten().tolist()


def test_a_grad_scaler_unscales_what_a_failed_step_left(same_at_every_world_size: Judge) -> None:
    """The scaler took the gradients of the repeated step for unscaled already, and the step was 1024 times too long."""
    same_at_every_world_size(_scaled, plain_weights(), tolerance=1e-4)
