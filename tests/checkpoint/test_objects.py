"""What is kept of each kind of object, over real ranks where they shard or differ."""

from __future__ import annotations

import threading

import pytest
import torch
import torchmetrics
from torch import nn

from allstep.checkpoint import Checkpoint, PerRank, entries
from allstep.errors import CheckpointError
from allstep.testing import run_ranks
from tests.checkpoint.folders import Failing, Gated


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
    from allstep import Engine

    objects = {"one": PerRank(Counted(10 + world.rank)), "sum": PerRank(Summed(1 + world.rank))}
    Checkpoint(folder, objects, every=None).save(Engine(lambda e, b: None), wait=True)


def load_differing(world, folder):
    objects = {"one": PerRank(Counted()), "sum": PerRank(Summed())}
    Checkpoint(folder, objects, every=None).resume()
    return objects["one"].kept.value, objects["sum"].kept.value


@pytest.mark.slow
def test_each_rank_gets_its_own_back_and_what_can_be_dealt_anew_is(tmp_path):
    run_ranks(save_differing, 2, str(tmp_path))
    assert run_ranks(load_differing, 2, str(tmp_path)) == [(10, 3), (11, 3)]
    assert run_ranks(load_differing, 3, str(tmp_path)) == [(10, 3), (11, 3), (0, 3)]


@pytest.mark.slow
def test_an_object_that_is_new_since_the_save_is_an_error_unless_told(tmp_path):
    def both(world_objects, **how):
        return Checkpoint(tmp_path, world_objects, every=None).resume(**how)

    from allstep import Engine

    Checkpoint(tmp_path, {"one": Counted(3)}, every=None).save(Engine(lambda e, b: None), wait=True)
    one, ema = Counted(), Counted(9)
    with pytest.raises(CheckpointError, match="the checkpoint lacks ema; it has one"):
        both({"one": one, "ema": ema})
    both({"one": one, "ema": ema}, partial=True)
    assert (one.value, ema.value) == (3, 9)


def sharded(world, folder, steps, resumes):
    from torch.distributed.fsdp import fully_shard

    from allstep import Engine

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoint = Checkpoint(folder, {"model": model, "optimizer": optimizer}, every=None)
    if resumes:
        checkpoint.resume()
    for step in range(*steps):
        optimizer.zero_grad()
        model(torch.full((2, 6), float(step))).pow(2).mean().backward()
        optimizer.step()
    checkpoint.save(Engine(lambda e, b: None), wait=True)
    return [each.full_tensor().detach() for each in model.parameters()]


@pytest.mark.slow
def test_sharded_modules_and_optimizers_resume_at_any_world_size(tmp_path):
    whole = run_ranks(sharded, 2, str(tmp_path / "whole"), (0, 4), False, fresh=True)[0]
    run_ranks(sharded, 2, str(tmp_path / "parts"), (0, 2), False, fresh=True)
    three = run_ranks(sharded, 3, str(tmp_path / "parts"), (2, 4), True, fresh=True)[0]
    for mine, expected in zip(three, whole, strict=True):
        torch.testing.assert_close(mine, expected)


def partly_used(world, folder, steps, shards):
    """Two groups, a frozen parameter, and one that never has a gradient and so has no state in the optimizer."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from allstep import Engine

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    model[1].bias.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(7)))
    if shards:
        fully_shard(model)
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[0].bias, model[1].weight, model.unused]}]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    checkpoint = Checkpoint(folder, {"model": model, "optimizer": optimizer}, every=None, strict=True)
    checkpoint.resume()
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 3), step + 1.0)).pow(2).sum().backward()
        optimizer.step()
    if steps:
        checkpoint.save(Engine(lambda e, b: None), wait=True)

    def whole(tensor):
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()

    states = optimizer.state_dict()
    moments = {at: {key: whole(each) for key, each in state.items()} for at, state in states["state"].items()}
    return [whole(each) for each in model.parameters()], moments, [group["lr"] for group in states["param_groups"]]


@pytest.mark.slow
def test_a_sharded_optimizers_states_are_those_that_there_were_at_any_world_size(tmp_path):
    folder = str(tmp_path)
    saved = run_ranks(partly_used, 2, folder, 2, True, fresh=True)[0]
    assert set(saved[1]) == {0, 1, 2}
    assert run_ranks(partly_used, 3, folder, 0, True, fresh=True) == [saved] * 3
    assert run_ranks(partly_used, 1, folder, 0, True, fresh=True) == [saved]


@pytest.mark.slow
def test_what_was_saved_sharded_loads_whole_and_the_other_way_round(tmp_path):
    folder = str(tmp_path)
    saved = run_ranks(partly_used, 2, folder, 1, True, fresh=True)[0]
    assert run_ranks(partly_used, 1, folder, 0, False) == [saved]
    whole = run_ranks(partly_used, 1, folder, 1, False)[0]
    assert run_ranks(partly_used, 2, folder, 0, True, fresh=True) == [whole] * 2


def save_sharded_by_rank(world, folder):
    from torch.distributed.fsdp import fully_shard

    from allstep import Engine

    model = nn.Linear(3, 4)
    fully_shard(model)
    checkpoint = Checkpoint(folder, {"own": PerRank(model)}, every=None, strict=True)
    with pytest.raises(CheckpointError, match="own/weight is sharded over ranks"):
        checkpoint.save(Engine(lambda e, b: None), wait=True)


@pytest.mark.slow
def test_sharded_tensors_are_not_one_ranks_own(tmp_path):
    run_ranks(save_sharded_by_rank, 2, str(tmp_path), fresh=True)


def keep_flat_shards(world, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel

    flat = FullyShardedDataParallel(nn.Linear(3, 4), device_id=torch.device("cpu"))
    said = r"'model' is or holds a FullyShardedDataParallel.*fully_shard instead"
    for model in (flat, nn.Sequential(flat)):
        with pytest.raises(CheckpointError, match=said):
            Checkpoint(folder, {"model": model})


@pytest.mark.slow
def test_modules_sharded_by_the_first_fsdp_are_refused_with_what_to_use_instead(tmp_path):
    run_ranks(keep_flat_shards, 2, str(tmp_path), fresh=True)


class Stream(Counted):
    """Batches of one rank, which know where they are."""

    def __iter__(self):
        while self.value < 20:
            self.value += 1
            yield self.value


def take_from_streams(world, folder, iterations):
    """Go on with a stream for each rank; the batches that came, or why the run cannot go on."""
    from allstep import Engine, Events

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
def test_places_of_each_ranks_own_data_are_refused_on_all_ranks_at_another_world_size(tmp_path):
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
    from allstep import Engine

    model = world.wrap(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    trainer = Engine(lambda engine, batch: model(torch.ones(2, 2)).sum().backward())
    metric = Unready() if world.rank in unready else Counted(1)
    # Before the model, whose buffers are broadcast when its state is asked for.
    objects = {"metric": metric, "model": model, "trainer": trainer}
    checkpoint = Checkpoint(folder, objects, every=2, strict=strict).attach(trainer)
    trainer.run([1] * 6)
    checkpoint.close()
    assert checkpoint.store.choose() is None
    return trainer.state.iteration


@pytest.mark.slow
@pytest.mark.parametrize("unready", [[1], [0, 1]])
def test_an_object_that_has_no_state_to_give_fails_the_save_and_not_the_training(unready, tmp_path):
    assert run_ranks(train_with_unready, 2, str(tmp_path), unready, False) == [6, 6]


@pytest.mark.slow
def test_a_strict_checkpoint_says_which_object_had_no_state_to_give(tmp_path):
    from allstep.errors import RanksError

    with pytest.raises(RanksError, match="rank 1: the state of 'metric' cannot be had: RuntimeError: not consolidated"):
        run_ranks(train_with_unready, 2, str(tmp_path), [1], True)


def evaluating(folder, epochs, order):
    """Iterations that a trainer and, at each epoch's end, an evaluator did."""
    from allstep import Engine, Events

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
    from allstep import Engine

    assert evaluating(tmp_path, 2, ("trainer", "evaluator"))
    trainer, evaluator = Engine(lambda e, b: None), Engine(lambda e, b: None)
    evaluator.state_dict_user_keys.append("best")
    checkpoint = Checkpoint(tmp_path, {"trainer": trainer, "evaluator": evaluator}, every=None)
    assert checkpoint.resume() is not None
    with pytest.raises(CheckpointError, match=r"attach the checkpoint before resume\(\)"):
        checkpoint.attach(trainer)


def test_attaching_after_nothing_was_found_to_resume_from_is_no_error(tmp_path):
    from allstep import Engine

    trainer = Engine(lambda e, b: None)
    checkpoint = Checkpoint(tmp_path, {"trainer": trainer}, every=None)
    assert checkpoint.resume() is None
    checkpoint.attach(trainer)


@pytest.mark.parametrize("name", ["epoch", "iteration", "stop_reason", "seed", "launches"])
def test_facts_cannot_replace_what_the_checkpoint_says_of_itself(name, tmp_path):
    with pytest.raises(CheckpointError, match=f"facts has {name}, which"):
        Checkpoint(tmp_path, {}, facts={name: 0, "config": {"lr": 0.1}})


def test_what_restores_the_generators_inside_an_epoch_does_it_once_and_listens_no_longer(tmp_path):
    from allstep import Engine, Events

    def resumed(stop_at):
        engine = Engine(lambda e, b: None)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda e: e.terminate())
        checkpoint = Checkpoint(tmp_path, {"engine": engine}, every=None).attach(engine)
        checkpoint.resume()
        before = engine.has_event_handler(checkpoint._go_on_inside)
        engine.run([1] * 6)
        return before, engine.has_event_handler(checkpoint._go_on_inside)

    assert resumed(3) == (False, False)
    assert resumed(5) == (True, False)


def test_an_engine_that_runs_inside_anothers_handler_leaves_its_saves_alone(tmp_path):
    from allstep import Engine, Events

    outer, inner = Engine(lambda e, b: None), Engine(lambda e, b: None)
    checkpoint = Checkpoint(tmp_path, {"outer": outer, "inner": inner}, every=2, keep_last=None)
    checkpoint.attach(outer).attach(inner)
    outer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: inner.run([1] * 7))
    outer.run([1] * 6)
    assert [step for step, _ in kept_in(tmp_path)] == [2, 4, 6, 7, 2, 4, 6]


def test_metrics_are_numbers_of_any_library(tmp_path):
    import numpy as np

    from allstep import Engine

    engine = Engine(lambda e, b: None)
    engine.state.metrics.update(plain=0.5, tensor=torch.tensor(0.5), f32=np.float32(0.5), i64=np.int64(3), text="x")
    checkpoint = Checkpoint(tmp_path, {"engine": engine}, every=None, keep_best=(1, "f32", "max"))
    checkpoint.save(engine, wait=True)
    assert checkpoint.store.choose().manifest.metrics == {"plain": 0.5, "tensor": 0.5, "f32": 0.5, "i64": 3.0}


def trained_with_an_accuracy(folder, accuracies, **options):
    """A run of ten iterations an epoch whose accuracy is measured at each epoch's end; the engine and what is kept."""
    from allstep import Engine, Events

    trainer = Engine(lambda e, b: None)

    def measure(engine):
        if engine.state.epoch <= len(accuracies):
            engine.state.metrics["accuracy"] = accuracies[engine.state.epoch - 1]

    trainer.add_event_handler(Events.EPOCH_COMPLETED, measure)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=26), lambda e: e.terminate() if e.state.stop else None)
    trainer.state.stop = options.pop("stop", False)
    checkpoint = Checkpoint(folder, {"trainer": trainer}, **options).attach(trainer)
    checkpoint.resume()
    return trainer, checkpoint


def kept_in(folder):
    return [(entry.manifest.step, entry.manifest.metrics) for entry in entries(str(folder))]


def test_saves_inside_an_epoch_are_not_rated_and_the_best_that_was_measured_is_kept(tmp_path, caplog):
    options = {"every": ("epoch", 4), "keep_last": 1, "keep_best": (1, "accuracy", "max")}
    trainer, _ = trained_with_an_accuracy(tmp_path, (0.9, 0.1, 0.2, 0.3), **options)
    trainer.run(range(10), max_epochs=4)
    assert kept_in(tmp_path) == [(10, {"accuracy": 0.9}), (40, {"accuracy": 0.3})]
    assert "never among the best" not in caplog.text


def test_a_run_that_is_broken_off_inside_an_epoch_is_not_rated_and_has_its_metrics_back_when_it_goes_on(tmp_path):
    options = {"every": None, "keep_last": None}
    trainer, _ = trained_with_an_accuracy(tmp_path, (0.9, 0.1), stop=True, **options)
    trainer.run(range(10), max_epochs=4)
    assert kept_in(tmp_path) == [(26, {})]
    resumed, _ = trained_with_an_accuracy(tmp_path, (), **options)
    assert resumed.state.metrics == {"accuracy": 0.1}


def test_a_run_that_ends_by_its_iterations_is_rated_and_metrics_that_were_asked_for_rate_every_save(tmp_path):
    trainer, _ = trained_with_an_accuracy(tmp_path / "end", (0.9,), every=15)
    trainer.run(range(10), max_iters=15)
    assert kept_in(tmp_path / "end")[-1] == (15, {"accuracy": 0.9})
    given = {"every": 4, "keep_last": None, "metrics": lambda engine: {"at": engine.state.iteration}}
    trainer, _ = trained_with_an_accuracy(tmp_path / "given", (), **given)
    trainer.run(range(10), max_epochs=1)
    assert kept_in(tmp_path / "given") == [(4, {"at": 4.0}), (8, {"at": 8.0}), (10, {"at": 10.0})]


def stopped_at_3(storage, before_the_end, **options):
    """The step that is saved at the end of a run that is terminated after its third iteration."""
    from allstep import Engine, Events
    from allstep.checkpoint import Store

    store = Store("", storage=storage, **options)
    engine = Engine(lambda e, b: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda e: e.terminate())
    engine.add_event_handler(Events.TERMINATE, lambda: before_the_end(store))
    Checkpoint(store, {"engine": engine}, every=1).attach(engine)
    engine.run([1] * 6)
    return store.choose().manifest.step


def test_the_last_save_is_made_even_where_the_one_before_is_slow_and_others_are_left_out(tmp_path):
    storage = Gated(str(tmp_path))
    assert stopped_at_3(storage, lambda store: storage.gate.set(), busy="skip") == 3


def raised_during_a_save(storage, meanwhile):
    """A run whose second step raises while the save behind the first one is under way."""
    from allstep import Engine
    from allstep.checkpoint import Store

    def step(engine, batch):
        if engine.state.iteration == 2:
            meanwhile()
            raise ZeroDivisionError("in the step")

    engine = Engine(step)
    Checkpoint(Store("", storage=storage), {"engine": engine}, every=1).attach(engine)
    with pytest.raises(ZeroDivisionError, match="in the step"):
        engine.run([1] * 6)


def test_a_save_under_way_is_committed_when_an_exception_ends_the_run(tmp_path):
    storage = Gated(str(tmp_path))
    raised_during_a_save(storage, threading.Timer(0.3, storage.gate.set).start)
    assert kept_in(tmp_path) == [(1, {})]


def test_an_exception_waits_for_a_save_no_longer_than_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr("allstep.checkpoint.checkpoint._AT_EXCEPTION_S", 0.1)
    storage = Gated(str(tmp_path))
    raised_during_a_save(storage, lambda: None)
    assert [entry.state for entry in entries(str(tmp_path))] == ["unfinished"]
    storage.gate.set()


def test_a_save_that_failed_is_tried_again_at_the_end(tmp_path):
    storage = Failing(str(tmp_path), "state.json")

    def mend(store):
        assert not store.wait()
        storage.failing = False

    assert stopped_at_3(storage, mend) == 3


def test_metrics_that_cannot_be_had_fail_the_save_and_not_the_training(tmp_path, caplog):
    from allstep import Engine

    engine = Engine(lambda e, b: None)
    checkpoint = Checkpoint(tmp_path, {"engine": engine}, every=1, metrics=lambda engine: {"a": 1 / 0}).attach(engine)
    engine.run([1, 2])
    assert engine.state.iteration == 2
    assert checkpoint.store.choose() is None
    assert "the metrics cannot be had: ZeroDivisionError" in caplog.text


def test_a_metric_to_keep_the_best_by_that_is_not_saved_is_told_once(tmp_path, caplog):
    from allstep import Engine

    engine = Engine(lambda e, b: None)
    engine.state.metrics["accuracy"] = 0.5
    Checkpoint(tmp_path, {"engine": engine}, every="epoch", keep_best=(1, "acuracy", "max")).attach(engine)
    engine.run([1, 2], max_epochs=2)
    told = [record.getMessage() for record in caplog.records if "never among the best" in record.getMessage()]
    assert told == [
        "metric 'acuracy' is not among those that are saved (accuracy): checkpoints without it are never among the best"
    ]


def test_what_a_store_saved_without_an_engine_loads_into_objects_of_its_names(tmp_path):
    from allstep.checkpoint import Store

    model = nn.Linear(2, 2)
    assert Store(str(tmp_path)).save(1, {"model": model.state_dict()}).wait()
    other = nn.Linear(2, 2)
    Checkpoint(tmp_path, {"model": other}, every=None).resume()
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(CheckpointError, match="the checkpoint lacks optimizer; it has model"):
        Checkpoint(tmp_path, {"optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}, every=None).resume()
