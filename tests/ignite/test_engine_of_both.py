"""An engine of this package is Ignite's and allstep's at once: it takes the events and the handlers of both."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import ignite.engine
import ignite.handlers
import pytest
import torch
from torch import nn

import allstep
from allstep.ignite import Engine, Events, State, create_supervised_evaluator, create_supervised_trainer
from allstep.metrics import Metrics


def step(engine: Any, batch: Any) -> Any:
    return batch


def test_it_is_an_instance_of_both_classes() -> None:
    engine = Engine(step)
    assert isinstance(engine, ignite.engine.Engine)
    assert isinstance(engine, allstep.Engine)
    assert isinstance(engine.state, ignite.engine.State)
    assert isinstance(engine.state, allstep.State)


def test_events_of_both_have_the_same_handlers() -> None:
    engine, heard = Engine(step), []
    engine.add_event_handler(allstep.Events.EPOCH_STARTED, lambda: heard.append("ours"))
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: heard.append("theirs"))
    engine.add_event_handler("EPOCH_STARTED", lambda: heard.append("text"))
    engine.run([1])
    assert heard == ["ours", "theirs", "text"]


@pytest.mark.parametrize("event", allstep.Events)
def test_an_event_of_ours_is_equal_to_theirs_of_the_same_name(event: Any) -> None:
    for theirs in Events:
        assert (event == theirs) is (theirs == event) is (event.name == theirs.name)
    if event.name in Events.__members__:
        assert {event: 1}[Events[event.name]] == 1


def test_filters_and_lists_of_ours_are_taken() -> None:
    engine, heard = Engine(step), []
    chosen = allstep.Events.ITERATION_COMPLETED(every=2) | allstep.Events.COMPLETED
    engine.add_event_handler(chosen, lambda engine: heard.append(engine.state.iteration))
    engine.run(range(5))
    assert heard == [2, 4, 5]


def test_the_optimizers_step_is_an_event_of_its_own() -> None:
    engine, heard = Engine(step, accumulate=2), []
    event = allstep.Events.OPTIMIZER_STEP_COMPLETED(every=2)
    engine.add_event_handler(event, lambda engine: heard.append(engine.state.iteration))
    engine.run(range(8))
    assert heard == [4, 8]


def test_an_exception_is_swallowed_where_a_handler_lets_it_pass() -> None:
    engine, heard = Engine(lambda engine, batch: 1 / batch), []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: heard.append(type(error)))
    state = engine.run([1, 0, 1], max_epochs=2)
    assert heard == [ZeroDivisionError, ZeroDivisionError]
    assert (state.epoch, state.iteration) == (2, 4)


def test_an_exception_that_a_handler_raises_again_is_told_once() -> None:
    engine, heard = Engine(lambda engine, batch: 1 / batch), []

    @engine.on(Events.EXCEPTION_RAISED)
    def again(engine: Any, error: Exception) -> None:
        heard.append(error)
        raise error

    with pytest.raises(ZeroDivisionError):
        engine.run([1, 0, 1])
    assert len(heard) == 1


def test_an_exception_without_a_handler_leaves_the_run_and_nothing_is_lost() -> None:
    failures, seen = [OSError("once")], []

    def failing_once(engine: Any, batch: int) -> None:
        if engine.state.iteration == 6 and failures:
            raise failures.pop()
        seen.append(batch)

    engine = Engine(failing_once)
    with pytest.raises(OSError, match="once"):
        engine.run(range(4), max_epochs=2)
    engine.run(range(4), max_epochs=2)
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3]


def test_data_that_a_handler_puts_into_the_state_is_taken_at_the_next_pass() -> None:
    engine = Engine(step)

    @engine.on(Events.DATALOADER_STOP_ITERATION)
    def begin_again() -> None:
        engine.state.dataloader = iter(range(3))

    state = engine.run(iter(range(3)), max_epochs=3)
    assert (state.epoch, state.iteration) == (3, 9)


def batches_after_new_data(kind: Any, event: Any) -> tuple[list[Any], int]:
    seen: list[Any] = []
    engine = kind(lambda engine, batch: seen.append(batch))
    engine.add_event_handler(event, lambda: engine.set_data("abcdef"))
    return seen, engine.run(range(4), max_epochs=4).epoch_length


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED(once=3), Events.EPOCH_STARTED(once=2)])
def test_data_that_is_set_leaves_the_length_of_all_epochs_as_ignites_does(event: Any) -> None:
    assert batches_after_new_data(Engine, event) == batches_after_new_data(ignite.engine.Engine, event)


def test_every_name_of_ignites_engine_can_be_imported_from_here() -> None:
    namespace: dict[str, Any] = {}
    exec("from allstep.ignite import *\nfrom allstep.ignite import _prepare_batch", namespace)
    assert {*ignite.engine.__all__, "_prepare_batch"} <= {*namespace}
    with pytest.raises(ImportError, match=r"allstep\.ignite"):
        exec("from allstep.ignite import Motor", namespace)


def test_a_state_may_be_set_between_runs_and_its_terms_hold() -> None:
    engine = Engine(step)
    engine.state = State(iteration=4, epoch=2, epoch_length=2, max_epochs=4)
    assert engine.run(range(2)).iteration == 8


def test_a_bound_method_can_be_removed_by_its_handle() -> None:
    class Counter:
        called = 0

        def count(self) -> None:
            self.called += 1

    engine, counter = Engine(step), Counter()
    plain = engine.add_event_handler(Events.ITERATION_COMPLETED, counter.count)
    filtered = engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), counter.count)
    engine.run(range(2))
    plain.remove()
    filtered.remove()
    engine.run(range(2))
    assert counter.called == 3


def test_an_engine_that_nobody_holds_is_freed_at_once() -> None:
    engine = Engine(step)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: None)
    gc.disable()
    try:
        engine.run(range(2))
        freed = weakref.ref(engine)
        del engine
        assert freed() is None
    finally:
        gc.enable()


def test_a_state_has_ignites_keys_and_loads_into_ignites_engine() -> None:
    engine = Engine(step)
    engine.run(range(3), max_epochs=2)
    saved = engine.state_dict()
    assert dict(saved) == {"epoch_length": 3, "iteration": 6, "max_epochs": 2}
    other = ignite.engine.Engine(step)
    other.load_state_dict(saved)
    assert other.state.iteration == 6


def test_a_run_goes_on_inside_an_epoch_at_the_batch_that_was_next() -> None:
    seen: list[int] = []
    engine = Engine(lambda engine, batch: seen.append(batch))
    engine.load_state_dict({"iteration": 4, "epoch_length": 3, "max_epochs": 2})
    engine.run(range(3))
    assert seen == [1, 2]


def test_a_terminated_epoch_is_over_as_ignite_documents_it() -> None:
    seen: list[int] = []
    engine = Engine(lambda engine, batch: seen.append(batch))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate, True)
    engine.run(range(4), max_epochs=2)
    engine.run(range(4), max_epochs=2)
    assert seen == [0, 1, 0, 1, 2, 3]


def test_a_state_that_ignite_refuses_changes_nothing() -> None:
    engine = Engine(step)
    engine.run(range(3))
    with pytest.raises(ValueError, match="exactly one of"):
        engine.load_state_dict({"iteration": 1, "epoch_length": 3})
    assert engine.state.iteration == 3


def small_run(folder: Path, epochs: int, *, is_cut: bool = False) -> list[float]:
    """Train with allstep's checkpoint on Ignite's engine; the weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 3, generator=draw), torch.randint(0, 2, (4,), generator=draw)) for _ in range(4)]
    trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
    ignite.handlers.EMAHandler(model).attach(trainer)
    checkpoint = allstep.Checkpoint(folder, {"model": model, "optimizer": optimizer, "trainer": trainer}, every=3)
    checkpoint.attach(trainer)
    checkpoint.resume()
    if is_cut:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=7), lambda: 1 / 0)
    trainer.run(data, max_epochs=epochs)
    return [float(value) for value in model.weight.flatten()]


def test_allsteps_checkpoint_resumes_it_to_the_last_bit(tmp_path: Path) -> None:
    unbroken = small_run(tmp_path / "unbroken", 3)
    with pytest.raises(ZeroDivisionError):
        small_run(tmp_path / "cut", 3, is_cut=True)
    assert small_run(tmp_path / "cut", 3) == unbroken


def test_allsteps_metrics_and_early_stopping_attach_to_it() -> None:
    evaluator = create_supervised_evaluator(nn.Linear(3, 2))
    Metrics({"rows": allstep.Sum(weighted=False)}).attach(evaluator, lambda output: float(len(output[0])))
    trainer = Engine(step)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([(torch.ones(4, 3), torch.ones(4))] * 2))
    allstep.EarlyStopping(2, lambda engine: engine.state.metrics["rows"], trainer).attach(evaluator)
    assert trainer.run(range(2), max_epochs=9).epoch == 3
    assert evaluator.state.metrics == {"rows": 8.0}
