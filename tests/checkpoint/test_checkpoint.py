"""When a run saves, what it rates a save by, and what its end waits for."""

from __future__ import annotations

import threading

import pytest
import torch

from allstep import Engine, Events
from allstep.checkpoint import Checkpoint, Store, entries
from allstep.errors import ArgumentError, CheckpointError
from tests.checkpoint.storages import Failing, Gated


@pytest.mark.parametrize("name", ["epoch", "iteration", "stop_reason", "seed", "launches"])
def test_facts_cannot_replace_what_the_checkpoint_says_of_itself(name, tmp_path):
    with pytest.raises(ArgumentError, match=f"facts has {name}, which"):
        Checkpoint(tmp_path, {}, facts={name: 0, "config": {"lr": 0.1}})


def test_generators_are_restored_once_inside_an_epoch(tmp_path):
    def resumed(stop_at):
        engine = Engine(lambda e, b: None)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda e: e.terminate())
        checkpoint = Checkpoint(tmp_path, {"engine": engine}, every=None).attach(engine)
        checkpoint.resume()
        before = engine.has_event_handler(checkpoint._before_first_batch)
        engine.run([1] * 6)
        return before, engine.has_event_handler(checkpoint._before_first_batch)

    assert resumed(3) == (False, False)
    assert resumed(5) == (True, False)


def test_an_engine_that_runs_inside_anothers_handler_leaves_its_saves_alone(tmp_path):
    outer, inner = Engine(lambda e, b: None), Engine(lambda e, b: None)
    checkpoint = Checkpoint(tmp_path, {"outer": outer, "inner": inner}, every=2, keep_last=None)
    checkpoint.attach(outer).attach(inner)
    outer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: inner.run([1] * 7))
    outer.run([1] * 6)
    assert [step for step, _ in kept_in(tmp_path)] == [2, 4, 6, 7, 2, 4, 6]


def test_metrics_are_numbers_of_any_library(tmp_path):
    import numpy as np

    engine = Engine(lambda e, b: None)
    engine.state.metrics.update(plain=0.5, tensor=torch.tensor(0.5), f32=np.float32(0.5), i64=np.int64(3), text="x")
    checkpoint = Checkpoint(tmp_path, {"engine": engine}, every=None, keep_best=(1, "f32", "max"))
    checkpoint.save(engine, wait=True)
    assert checkpoint.store.choose().manifest.metrics == {"plain": 0.5, "tensor": 0.5, "f32": 0.5, "i64": 3.0}


def trained_with_an_accuracy(folder, accuracies, **options):
    """A run of ten iterations an epoch whose accuracy is measured at each epoch's end; the engine and what is kept."""

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


def test_saves_inside_an_epoch_are_not_rated(tmp_path, caplog):
    options = {"every": ("epoch", 4), "keep_last": 1, "keep_best": (1, "accuracy", "max")}
    trainer, _ = trained_with_an_accuracy(tmp_path, (0.9, 0.1, 0.2, 0.3), **options)
    trainer.run(range(10), max_epochs=4)
    assert kept_in(tmp_path) == [(10, {"accuracy": 0.9}), (40, {"accuracy": 0.3})]
    assert "never among the best" not in caplog.text


def test_a_run_that_is_broken_off_is_not_rated_and_has_its_metrics_back(tmp_path):
    options = {"every": None, "keep_last": None}
    trainer, _ = trained_with_an_accuracy(tmp_path, (0.9, 0.1), stop=True, **options)
    trainer.run(range(10), max_epochs=4)
    assert kept_in(tmp_path) == [(26, {})]
    resumed, _ = trained_with_an_accuracy(tmp_path, (), **options)
    assert resumed.state.metrics == {"accuracy": 0.1}


def test_a_run_that_ends_is_rated_and_given_metrics_rate_every_save(tmp_path):
    trainer, _ = trained_with_an_accuracy(tmp_path / "end", (0.9,), every=15)
    trainer.run(range(10), max_iters=15)
    assert kept_in(tmp_path / "end")[-1] == (15, {"accuracy": 0.9})
    given = {"every": 4, "keep_last": None, "metrics": lambda engine: {"at": engine.state.iteration}}
    trainer, _ = trained_with_an_accuracy(tmp_path / "given", (), **given)
    trainer.run(range(10), max_epochs=1)
    assert kept_in(tmp_path / "given") == [(4, {"at": 4.0}), (8, {"at": 8.0}), (10, {"at": 10.0})]


def stopped_at_3(storage, before_the_end, **options):
    """The step that is saved at the end of a run that is terminated after its third iteration."""

    store = Store("", storage=storage, **options)
    engine = Engine(lambda e, b: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda e: e.terminate())
    engine.add_event_handler(Events.TERMINATE, lambda: before_the_end(store))
    Checkpoint(store, {"engine": engine}, every=1).attach(engine)
    engine.run([1] * 6)
    return store.choose().manifest.step


def test_the_last_save_is_made_even_where_the_one_before_is_slow(tmp_path):
    storage = Gated(str(tmp_path))
    assert stopped_at_3(storage, lambda store: storage.gate.set(), busy="skip") == 3


def raised_during_a_save(storage, meanwhile):
    """A run whose second step raises while the save behind the first one is under way."""

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
    monkeypatch.setattr("allstep.checkpoint.checkpoint.AT_EXCEPTION_S", 0.1)
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
    engine = Engine(lambda e, b: None)
    checkpoint = Checkpoint(tmp_path, {"engine": engine}, every=1, metrics=lambda engine: {"a": 1 / 0}).attach(engine)
    with pytest.raises(CheckpointError, match="nothing of this run was saved"):
        engine.run([1, 2])
    assert engine.state.iteration == 2
    assert checkpoint.store.choose() is None
    assert "the metrics cannot be had: ZeroDivisionError" in caplog.text


def test_a_metric_to_keep_the_best_by_that_is_not_saved_is_told_once(tmp_path, caplog):
    engine = Engine(lambda e, b: None)
    engine.state.metrics["accuracy"] = 0.5
    Checkpoint(tmp_path, {"engine": engine}, every="epoch", keep_best=(1, "acuracy", "max")).attach(engine)
    engine.run([1, 2], max_epochs=2)
    told = [record.getMessage() for record in caplog.records if "never among the best" in record.getMessage()]
    assert told == [
        "metric 'acuracy' is not among those that are saved (accuracy): checkpoints without it are never among the best"
    ]
