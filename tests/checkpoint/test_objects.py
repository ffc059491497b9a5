"""What is saved of each kind of object, over real ranks where they differ."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torchmetrics
from torch import nn

from allstep import Engine, Events
from allstep.checkpoint import Checkpoint, PerRank, Store
from allstep.errors import CheckpointError, RanksError
from allstep.testing import run_ranks


class Counted:
    """State that differs by rank."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Summed(Counted):
    """And that can be dealt anew."""

    def load_rank_states(self, states):
        self.value = sum(state["value"] for state in states)


def test_an_object_without_a_state_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match="'loss' is a function"):
        Checkpoint(tmp_path, {"loss": lambda: None})


def test_a_metric_that_would_save_nothing_is_an_error_that_says_what_to_give(tmp_path):
    for metric in (torchmetrics.MeanMetric(), torchmetrics.MetricCollection({"mean": torchmetrics.MeanMetric()})):
        with pytest.raises(CheckpointError, match=r"'loss' is a metric of torchmetrics.*allstep\.Metrics"):
            Checkpoint(tmp_path, {"loss": metric})


def save_differing(world, folder):
    objects = {"one": PerRank(Counted(10 + world.rank)), "sum": PerRank(Summed(1 + world.rank))}
    Checkpoint(folder, objects, every=None).save(Engine(lambda e, b: None), wait=True)


def load_differing(world, folder):
    objects = {"one": PerRank(Counted()), "sum": PerRank(Summed())}
    Checkpoint(folder, objects, every=None).resume()
    return objects["one"].stateful.value, objects["sum"].stateful.value


@pytest.mark.slow
def test_each_rank_gets_its_own_back_and_what_can_be_dealt_anew_is(tmp_path):
    run_ranks(save_differing, 2, str(tmp_path))
    assert run_ranks(load_differing, 2, str(tmp_path)) == [(10, 3), (11, 3)]
    assert run_ranks(load_differing, 3, str(tmp_path)) == [(10, 3), (11, 3), (0, 3)]


@pytest.mark.slow
def test_an_object_that_is_new_since_the_save_is_an_error_unless_told(tmp_path):
    def both(world_objects, **how):
        return Checkpoint(tmp_path, world_objects, every=None).resume(**how)

    Checkpoint(tmp_path, {"one": Counted(3)}, every=None).save(Engine(lambda e, b: None), wait=True)
    one, ema = Counted(), Counted(9)
    with pytest.raises(CheckpointError, match="the checkpoint lacks ema; it has one"):
        both({"one": one, "ema": ema})
    both({"one": one, "ema": ema}, partial=True)
    assert (one.value, ema.value) == (3, 9)


class Stream(Counted):
    """Batches of one rank, which know where they are."""

    def __iter__(self):
        while self.value < 20:
            self.value += 1
            yield self.value


def take_from_streams(world, folder, iterations):
    """Go on with a stream for each rank; the batches that came, or why the run cannot go on."""

    taken = []
    trainer = Engine(lambda engine, batch: taken.append(batch))
    checkpoint = Checkpoint(folder, {"trainer": trainer}, every=None).attach(trainer)
    try:
        checkpoint.resume()
    except CheckpointError as error:
        return str(error)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=iterations), trainer.terminate)
    trainer.run(Stream(), max_epochs=1, epoch_length=18, window=1)
    return taken


@pytest.mark.slow
def test_places_in_each_ranks_own_data_are_refused_at_another_world_size(tmp_path):
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    assert run_ranks(take_from_streams, 2, two, 3) == [[1, 2, 3]] * 2
    (refused,) = run_ranks(take_from_streams, 1, two, 5)
    assert "saved at world size 2, and this run has 1. Resume at world size 2" in refused
    assert run_ranks(take_from_streams, 2, two, 5) == [[4, 5]] * 2
    assert run_ranks(take_from_streams, 1, one, 3) == [[1, 2, 3]]
    said = run_ranks(take_from_streams, 2, one, 5)
    assert ["saved at world size 1, and this run has 2" in each for each in said] == [True, True]


class Unready(Counted):
    """State that cannot be had."""

    def state_dict(self):
        raise RuntimeError("not consolidated")


def train_with_unready(world, folder, unready, strict):
    model = world.wrap(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    trainer = Engine(lambda engine, batch: model(torch.ones(2, 2)).sum().backward())
    metric = Unready() if world.rank in unready else Counted(1)
    # Before the model, whose buffers are broadcast when its state is asked for.
    objects = {"metric": metric, "model": model, "trainer": trainer}
    checkpoint = Checkpoint(folder, objects, every=2, strict=strict).attach(trainer)
    with nullcontext() if strict else pytest.raises(CheckpointError, match="nothing of this run was saved"):
        trainer.run([1] * 6)
    checkpoint.close()
    assert checkpoint.store.choose() is None
    return trainer.state.iteration


@pytest.mark.slow
@pytest.mark.parametrize("unready", [[1], [0, 1]])
def test_an_object_without_a_state_to_give_fails_the_save_not_the_training(unready, tmp_path):
    assert run_ranks(train_with_unready, 2, str(tmp_path), unready, False) == [6, 6]


@pytest.mark.slow
def test_a_strict_checkpoint_says_which_object_had_no_state_to_give(tmp_path):
    with pytest.raises(RanksError, match="rank 1: the state of 'metric' cannot be had: RuntimeError: not consolidated"):
        run_ranks(train_with_unready, 2, str(tmp_path), [1], True)


def evaluating(folder, epochs, order):
    """Iterations that a trainer and, at each epoch's end, an evaluator did."""

    trainer, evaluator = Engine(lambda e, b: None), Engine(lambda e, b: None)
    evaluator.state_dict_user_keys.append("best")
    evaluator.state.best = evaluator.state.best if hasattr(evaluator.state, "best") else 0
    counted = []

    def evaluate():
        evaluator.state.best += 1
        evaluator.run([1, 2, 3])
        counted.append((trainer.state.epoch, evaluator.state.iteration, evaluator.state.best))

    trainer.add_event_handler(Events.EPOCH_COMPLETED, evaluate)
    engines = {"trainer": trainer, "evaluator": evaluator}
    checkpoint = Checkpoint(folder, {name: engines[name] for name in order}, every=None).attach(trainer)
    checkpoint.resume()
    trainer.run([1, 2], max_epochs=epochs)
    return counted


@pytest.mark.parametrize("order", [("trainer", "evaluator"), ("evaluator", "trainer")])
def test_an_evaluator_in_the_checkpoint_evaluates_in_the_resumed_run_too(order, tmp_path):
    assert evaluating(tmp_path, 2, order) == [(1, 3, 1), (2, 3, 2)]
    assert evaluating(tmp_path, 4, order) == [(3, 3, 3), (4, 3, 4)]
    assert evaluating(tmp_path, 4, order) == []


def test_attaching_after_engines_were_loaded_is_an_error_that_says_the_order(tmp_path):
    assert evaluating(tmp_path, 2, ("trainer", "evaluator"))
    trainer, evaluator = Engine(lambda e, b: None), Engine(lambda e, b: None)
    evaluator.state_dict_user_keys.append("best")
    checkpoint = Checkpoint(tmp_path, {"trainer": trainer, "evaluator": evaluator}, every=None)
    assert checkpoint.resume() is not None
    with pytest.raises(CheckpointError, match=r"attach the checkpoint before resume\(\)"):
        checkpoint.attach(trainer)


def test_attaching_after_resume_is_refused_on_the_first_start_too(tmp_path):
    trainer = Engine(lambda e, b: None)
    checkpoint = Checkpoint(tmp_path, {"trainer": trainer}, every=None)
    assert checkpoint.resume() is None
    with pytest.raises(CheckpointError, match=r"attach the checkpoint before resume\(\)"):
        checkpoint.attach(trainer)


def test_what_a_store_saved_without_an_engine_loads_into_objects_of_its_names(tmp_path):
    model = nn.Linear(2, 2)
    assert Store(str(tmp_path)).save(1, {"model": model.state_dict()}).wait()
    other = nn.Linear(2, 2)
    Checkpoint(tmp_path, {"model": other}, every=None).resume()
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(CheckpointError, match="the checkpoint lacks optimizer; it has model"):
        Checkpoint(tmp_path, {"optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}, every=None).resume()


def grown(folder, resumes):
    """A trainer whose optimizer gets a second parameter group in a handler after the first epoch."""
    torch.manual_seed(0)
    body, head = nn.Linear(2, 3), nn.Linear(3, 1)
    optimizer = torch.optim.Adam(head.parameters())

    def step(engine, batch):
        optimizer.zero_grad()
        head(body(torch.full((2, 2), float(engine.state.iteration)))).sum().backward()
        optimizer.step()

    trainer = Engine(step)

    def unfreeze():
        optimizer.add_param_group({"params": list(body.parameters()), "lr": 0.01})

    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), unfreeze)
    objects = {"body": body, "head": head, "optimizer": optimizer, "trainer": trainer}
    checkpoint = Checkpoint(folder, objects).attach(trainer)
    found = checkpoint.store.choose()
    if resumes == "with its groups" and found is not None and found.manifest.facts["epoch"] >= 1:
        unfreeze()
    if resumes:
        checkpoint.resume()
    return trainer, [*body.parameters(), *head.parameters()]


def test_groups_that_were_added_on_the_way_are_asked_for_in_words(tmp_path):
    trainer, expected = grown(tmp_path / "whole", "")
    trainer.run([0] * 3, max_epochs=4)
    trainer, _ = grown(tmp_path / "c", "")
    trainer.run([0] * 3, max_epochs=2)
    with pytest.raises(
        CheckpointError, match=r"saved with 2 parameter groups \(of 2, 2 parameters\), and this run's has 1 p"
    ):
        grown(tmp_path / "c", "as it is")
    trainer, parameters = grown(tmp_path / "c", "with its groups")
    trainer.run([0] * 3, max_epochs=4)
    assert all(map(torch.equal, parameters, expected))
