"""Where in its data a run stands: data with a state of its own, places of other splits, data that can only be read."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from allstep.data import make_loader
from allstep.engine import Engine, Events
from allstep.engine.position import RunPosition, translated
from allstep.testing import SimulatedRank, simulate
from tests.engine.recording import nothing


class Counter:
    """Batches of a stream that knows where it is; one epoch after another goes on counting."""

    def __init__(self, length: int = 7, rank: int = 0) -> None:
        self.length, self.at, self.rounds, self.rank = length, 0, 0, rank

    def __iter__(self) -> Any:
        while self.at < self.length:
            self.at += 1
            yield 1000 * self.rank + 100 * self.rounds + self.at
        self.at, self.rounds = 0, self.rounds + 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at, "rounds": self.rounds}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.rounds = state["at"], state["rounds"]


class Stream(Counter, IterableDataset[int]):
    """The same as a dataset, for a DataLoader to read."""


def taken_with(engine: Engine) -> list[Any]:
    taken: list[Any] = []

    def note(engine: Engine) -> None:
        if engine.state.active:
            batch = engine.state.batch
            taken.append(batch.tolist() if hasattr(batch, "tolist") else batch)

    engine.add_event_handler(Events.ITERATION_COMPLETED, note)
    return taken


def resumed_everywhere(make: Any, accumulate: int = 1, **terms: Any) -> None:
    """Save a run after each group and go on from each of the states: the same batches come."""
    engine = Engine(nothing, accumulate=accumulate)
    states: list[tuple[int, Any]] = []
    taken = taken_with(engine)

    def save(engine: Engine) -> None:
        if engine.state.group_end:
            states.append((len(taken), copy.deepcopy(engine.state_dict())))

    engine.add_event_handler(Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED | Events.COMPLETED, save)
    engine.run(make(), **terms)
    states.append((len(taken), engine.state_dict()))
    for done, state in states:
        assert "own" in state["data"]
        again = Engine(nothing, accumulate=accumulate)
        rest = taken_with(again)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again.load_state_dict(state)
            again.run(make(), **terms)
        assert rest == taken[done:], done


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("terms", [{"max_epochs": 3}, {"max_epochs": 3, "epoch_length": 7}, {"max_iters": 15}], ids=str)
def test_data_with_a_state_resumes_exactly_after_each_group(accumulate: int, terms: dict[str, int]) -> None:
    resumed_everywhere(Counter, accumulate, **terms)


def test_epochs_that_are_not_passes_resume_exactly() -> None:
    resumed_everywhere(Counter, max_epochs=4, epoch_length=5)


def test_an_iterable_dataset_with_a_state_resumes_through_a_dataloader() -> None:
    resumed_everywhere(lambda: DataLoader(Stream(8), batch_size=2), max_epochs=3)


def test_an_iterable_dataset_with_a_state_resumes_through_the_loader() -> None:
    resumed_everywhere(lambda: make_loader(Stream(8), rank=0, world_size=1, seed=0, batch_size=2), max_epochs=3)


def on_one_rank(coordinator: SimulatedRank) -> None:
    rank = coordinator.rank
    engine = Engine(nothing, coordinator=coordinator, uneven="longest")
    taken = taken_with(engine)
    states: list[tuple[int, Any]] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: states.append((len(taken), copy.deepcopy(e.state_dict())))
    )
    engine.run(Counter(5 + rank, rank), max_epochs=2)
    for done, state in states:
        again = Engine(nothing, coordinator=coordinator, uneven="longest")
        rest = taken_with(again)
        again.load_state_dict(state)
        again.run(Counter(5 + rank, rank), max_epochs=2)
        assert rest == taken[done:], (rank, done)


def test_batches_that_were_read_ahead_are_not_lost_on_several_ranks() -> None:
    simulate(on_one_rank, 2)


def test_other_data_is_read_forward_with_a_warning_that_says_how_much() -> None:
    class Plain(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(9))

    engine, again = Engine(nothing), Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda e: again.load_state_dict(e.state_dict()))
    engine.run(DataLoader(Plain(), batch_size=2))
    rest = taken_with(again)
    with pytest.warns(UserWarning, match="3 batches of DataLoader are read and dropped"):
        again.run(DataLoader(Plain(), batch_size=2))
    assert rest == [[6, 7], [8]]


def test_going_on_in_an_order_that_cannot_be_drawn_again_says_what_is_lost() -> None:
    loader = DataLoader(range(8), batch_size=2, shuffle=True)
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate)
    engine.run(loader)
    with pytest.warns(UserWarning, match=r"2 batches .* RandomSampler draws another order now: samples .* come twice"):
        engine.run(loader)
    ordered = DataLoader(range(8), batch_size=2)
    again = Engine(nothing)
    again.add_event_handler(Events.ITERATION_COMPLETED(once=2), again.terminate)
    again.run(ordered)
    with pytest.warns(UserWarning, match="are read and dropped") as said:
        again.run(ordered)
    assert not any("another order" in str(each.message) for each in said)


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 5), st.data())
def test_a_translated_place_has_done_as_many_optimizer_steps(group: int, steps: int, epochs: int, data: Any) -> None:
    old_group = data.draw(st.integers(1, 6))
    done = data.draw(st.integers(0, steps - 1))
    limit = data.draw(st.one_of(st.none(), st.integers(1, steps * 5)))
    old = steps * old_group
    max_iters = None if limit is None else limit * old_group
    place = RunPosition(epochs * old + done * old_group, epochs, epochs * old, old, None, max_iters)
    new = translated(place, old_group, steps * group, group, (steps - done) * group)
    assert new.iteration == (epochs * steps + done) * group
    assert new.epoch_began_at == epochs * steps * group
    assert new.epoch_length == steps * group
    assert new.max_iters == (None if limit is None else limit * group)
