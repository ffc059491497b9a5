"""Outputs of all ranks in the order of the samples, in memory."""

from __future__ import annotations

import logging
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from allstep import Alone, Engine, Events
from allstep.coordination import Coordinator
from allstep.errors import MetricError
from allstep.outputs import Gather
from allstep.outputs.gather import cuda_devices
from allstep.testing import run_ranks, simulate
from allstep.world import World, internals
from tests.metrics.worlds import all_same_bits, same_bits
from tests.outputs.predicting import dealt_loader, gathered, predict, ragged


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("samples", [1, 11, 21])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_outputs_are_in_the_datasets_order_at_any_world_size(world_size: int, samples: int, shuffle: bool) -> None:
    def rank(coordinator: Coordinator) -> Any:
        return gathered(coordinator, Gather("y_pred", "y"), samples, shuffle=shuffle)

    every = torch.arange(samples)
    for found in simulate(rank, world_size) if world_size > 1 else [rank(Alone())]:
        assert same_bits(found["y"], every)
        assert same_bits(found["y_pred"], torch.stack([every * 2, every * 3], 1))
        assert same_bits(found["index"], every)


def test_a_tuples_elements_and_a_single_output_are_named_in_order() -> None:
    pair = gathered(Alone(), Gather("a", "b"), 7, shuffle=True, step=lambda e, b: (b[0], b[0] + 1))
    single = gathered(Alone(), Gather("a"), 7, shuffle=True, step=lambda e, b: b[0])
    assert pair["b"].tolist() == [*range(1, 8)]
    assert single["a"].tolist() == [*range(7)]


def test_ragged_outputs_are_a_list_in_the_datasets_order() -> None:
    def rank(coordinator: Coordinator) -> Any:
        return gathered(coordinator, Gather("wide", "boxes"), 11, shuffle=True, step=ragged)

    found = simulate(rank, 3)
    assert all_same_bits(found)
    assert [len(boxes) for boxes in found[0]["boxes"]] == [i % 4 for i in range(11)]
    assert all(bool((boxes == i).all()) for i, boxes in enumerate(found[0]["boxes"]))
    assert len(found[0]["wide"]) == 11


NAMES = ["", "é", "a longer name", "日本", "x\0y"]


def naming(engine: Engine, batch: Any) -> Any:
    (x,) = batch
    names = [f"{NAMES[int(i) % len(NAMES)]}{int(i)}" for i in x]
    return {"id": names, "path": np.array(names), "y": x}


@pytest.mark.parametrize(("samples", "world_size"), [(11, 3), (2, 4), (11, 1)])
def test_texts_are_a_list_in_the_datasets_order(samples: int, world_size: int) -> None:
    def rank(coordinator: Coordinator) -> Any:
        return gathered(coordinator, Gather("id", "path", "y"), samples, shuffle=True, step=naming)

    right = [f"{NAMES[i % len(NAMES)]}{i}" for i in range(samples)]
    for found in simulate(rank, world_size) if world_size > 1 else [rank(Alone())]:
        assert found["id"] == found["path"] == right
        assert found["y"].tolist() == [*range(samples)]


def test_copies_from_every_device_that_outputs_were_on_are_waited_for() -> None:
    with FakeTensorMode():
        near, far = torch.empty(2, device="cuda:0"), torch.empty(2, device="cuda:1")
    assert cuda_devices({"a": [near, (far,)], "b": torch.empty(1), "c": "text"}) == {near.device, far.device}
    with (
        patch("allstep.outputs.gather.cuda_devices", lambda output: {far.device}),
        patch("allstep.outputs.gather.recorded_event") as recorded,
    ):
        gathered(Alone(), Gather("y_pred", "y"), 7, shuffle=False)
    assert {call.args for call in recorded.call_args_list} == {(far.device,)}
    assert recorded.return_value.synchronize.call_count >= recorded.call_count > 0


def test_a_few_batches_at_a_time_are_held_in_pinned_memory() -> None:
    """Stand-in: a batch's values count as pinned, and events of a device as mocks that come to pass at once."""
    pinned: set[int] = set()
    held: list[int] = []
    gather, events = Gather("y_pred", "y"), []

    def step(engine: Engine, batch: Any) -> Any:
        records = gather._batches.values()
        held.append(sum(id(value) in pinned for each in records for value in each.values.values()))
        return {"y_pred": batch[0] * 2, "y": batch[0]}

    def copied(value: torch.Tensor) -> torch.Tensor:
        copy = value.clone()
        pinned.add(id(copy))
        kept.append(copy)
        return copy

    kept: list[torch.Tensor] = []
    with (
        patch("allstep.outputs.gather.cuda_devices", lambda output: {torch.device("cuda", 0)}),
        patch("allstep.outputs.gather.recorded_event", lambda device: events.append(MagicMock()) or events[-1]),
        patch("allstep.outputs.samples._copied", copied),
        patch.object(torch.Tensor, "is_pinned", lambda value: id(value) in pinned),
    ):
        found = gathered(Alone(), gather, 60, shuffle=False, step=step)
    assert found["y"].tolist() == [*range(60)]
    assert 8 <= max(held) // 2 <= 9
    assert events[0].synchronize.call_count == 1  # the copy has arrived before its memory is given back
    assert all(each.synchronize.call_count for each in events)  # and before anybody reads what was gathered


def test_only_the_main_rank_is_given_what_is_for_it() -> None:
    def rank(coordinator: Coordinator) -> Any:
        return gathered(coordinator, Gather("y_pred", "y", to="main"), 11, shuffle=False)

    first, *others = simulate(rank, 3)
    assert first["y"].tolist() == [*range(11)]
    assert others == [None, None]


def test_other_data_is_ordered_by_iteration_and_rank() -> None:
    def rank(coordinator: Coordinator) -> Any:
        engine = Engine(lambda e, b: b, coordinator=coordinator, uneven="longest", idle="skip")
        Gather("x").attach(engine)
        engine.run([torch.full((2,), 10 * at + coordinator.rank) for at in range(3 - coordinator.rank)])
        return engine.state.gathered  # type: ignore[attr-defined]

    for found in simulate(rank, 2):
        assert found["x"].tolist() == [0, 0, 1, 1, 10, 10, 11, 11, 20, 20]
        assert "index" not in found


def test_a_step_may_use_its_outputs_memory_again() -> None:
    tensor, rows = torch.zeros(2, dtype=torch.int64), [np.zeros(1), np.zeros(1)]

    def step(engine: Engine, batch: int) -> Any:
        tensor[:] = batch
        for row in rows:
            row[:] = batch
        return {"tensor": tensor, "array": tensor.numpy(), "rows": rows}

    engine = Engine(step, coordinator=Alone())
    Gather("tensor", "array", "rows").attach(engine)
    found = engine.run([1, 2, 3]).gathered  # type: ignore[attr-defined]
    assert found["tensor"].tolist() == found["array"].tolist() == [1, 1, 2, 2, 3, 3]
    assert [float(row) for row in found["rows"]] == [1, 1, 2, 2, 3, 3]


def resumed(coordinator: Coordinator, caught: list[logging.LogRecord]) -> Any:
    """A run of five batches that was left after two, gone on with by another engine."""
    first = Engine(predict, coordinator=coordinator, uneven="longest", idle="skip")
    first.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: first.terminate(agreed=True))
    loader = dealt_loader(coordinator, 25, shuffle=True)
    first.run(loader, window=1)
    second = Engine(predict, coordinator=coordinator, uneven="longest", idle="skip")
    second.logger.addFilter(lambda record: (caught.append(record), True)[1])
    second.load_state_dict(first.state_dict())
    loader = dealt_loader(coordinator, 25, shuffle=True)
    Gather("y").attach(second)
    done = set(loader.batch_sampler.indices(0).tolist()) | set(loader.batch_sampler.indices(1).tolist())  # type: ignore
    second.run(loader)
    return second.state.gathered, done  # type: ignore[attr-defined]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_resumed_in_its_middle_has_the_rest_and_says_what_is_missing(world_size: int) -> None:
    caught: list[logging.LogRecord] = []
    found = simulate(resumed, world_size, caught) if world_size > 1 else [resumed(Alone(), caught)]
    given_before = set.union(*(done for _, done in found))
    assert len(given_before) == 10
    for rest, _ in found:
        assert set(rest["index"].tolist()) == set(range(25)) - given_before
        assert same_bits(rest["y"], rest["index"])
    warnings = {record.getMessage() for record in caught if record.levelno == logging.WARNING}
    assert warnings == {
        "epoch 1 was resumed after its iteration 2: what is gathered lacks the outputs of the iterations before"
    }


def test_a_run_that_fails_and_goes_on_from_before_has_each_sample_once() -> None:
    engine = Engine(predict, coordinator=Alone())
    Gather("y").attach(engine)
    saved: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: saved.append(engine.state_dict()))
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), fail)
    loader = dealt_loader(Alone(), 25, shuffle=True)
    with pytest.raises(ArithmeticError):
        engine.run(loader)
    handle.remove()
    engine.load_state_dict(saved[0])
    found = engine.run(loader).gathered  # type: ignore[attr-defined]
    assert found["y"].tolist() == [*range(25)]


def test_a_run_that_goes_on_from_a_later_place_says_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(predict, coordinator=Alone())
    Gather("y").attach(engine)
    loader = dealt_loader(Alone(), 25, shuffle=False)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: engine.terminate())
    engine.run(loader)
    other = Engine(predict, coordinator=Alone())
    other.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: other.terminate())
    other.run(dealt_loader(Alone(), 25, shuffle=False))
    engine.load_state_dict(other.state_dict())
    found = engine.run(loader).gathered  # type: ignore[attr-defined]
    assert found["y"].tolist() == [*range(15, 25)]
    assert "resumed after its iteration 3" in caplog.text


def test_an_epoch_whose_data_is_replaced_is_in_order_of_its_iterations() -> None:
    engine = Engine(predict, coordinator=Alone())
    Gather("y").attach(engine)
    rest = [(torch.tensor([3 - at]),) for at in range(3)]
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.set_data(rest))
    found = engine.run(dealt_loader(Alone(), 25, shuffle=False)).gathered  # type: ignore[attr-defined]
    assert found["y"].tolist() == [*range(10), 3, 2, 1]
    assert "index" not in found


def fail() -> None:
    raise ArithmeticError("rehearsed")


def test_an_engine_has_one_gather() -> None:
    engine = Engine(predict)
    Gather("y").attach(engine)
    with pytest.raises(MetricError, match="has a Gather already"):
        Gather("y_pred").attach(engine)


def test_arguments_that_cannot_be_are_refused() -> None:
    for names in ((), ("a", "a"), ("index",)):
        with pytest.raises(ValueError, match="names are"):
            Gather(*names)
    with pytest.raises(ValueError, match="'some'"):
        Gather("a", to="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'csv'"):
        Gather("a", format="csv")  # type: ignore[arg-type]


def over_real_ranks(world: World) -> Any:
    return gathered(internals(world).coordinator, Gather("y_pred", "y"), 21, shuffle=True)


@pytest.mark.slow
def test_over_real_ranks_too() -> None:
    for found in run_ranks(over_real_ranks, 3):
        assert found["y"].tolist() == [*range(21)]
        assert found["y_pred"][:, 1].tolist() == [3 * at for at in range(21)]
