"""Numbers of handlers that ride in the votes: the totals, when they land, and that no vote is held for them."""

from __future__ import annotations

import pytest

from allstep import Alone, Engine, Events
from allstep.errors import TermsError
from allstep.testing import SimulatedRank, run_ranks, simulate
from allstep.world import World
from tests.engine.recording import CountingRank

Landed = list[tuple[str, int, int]]


def batches(rank: int) -> list[int]:
    return [0] * (6 + rank)


def summing(trainer: Engine, rank: int) -> Landed:
    """What lands of a number that grows by rank + 1 in each iteration, and where."""
    seen: Landed = []
    counted = [0]

    def count() -> None:
        if trainer.state.active:
            counted[0] += rank + 1

    trainer.add_event_handler(Events.ITERATION_COMPLETED, count)
    trainer.extension.sum_over_ranks(
        "counted", lambda: counted[0], lambda total: seen.append(("landed", trainer.state.iteration, total))
    )
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: seen.append(("epoch", trainer.state.iteration, counted[0]))
    )
    return seen


def landed_before_epochs_end(seen: Landed) -> list[int]:
    return [seen[at - 1][2] for at, each in enumerate(seen) if each[0] == "epoch"]


def _sum_in_a_run(coordinator: SimulatedRank, uneven: str) -> Landed:
    trainer = Engine(lambda engine, batch: None, coordinator=coordinator, name="trainer", idle="skip")
    seen = summing(trainer, coordinator.rank)
    trainer.run(batches(coordinator.rank), max_epochs=2, uneven=uneven, window=2)  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("uneven", ["shortest", "longest"])
def test_at_an_epochs_end_handlers_have_the_total_of_all_ranks(ranks: int, uneven: str) -> None:
    results = simulate(_sum_in_a_run, ranks, uneven)
    own = [(rank + 1) * (6 + rank if uneven == "longest" else 6) for rank in range(ranks)]
    for seen in results:
        assert landed_before_epochs_end(seen) == [sum(own), 2 * sum(own)]


def test_in_between_a_total_lands_a_window_later_at_one_iteration_for_all() -> None:
    left, right = simulate(_sum_in_a_run, 2, "shortest")
    assert [each for each in left if each[0] == "landed"] == [each for each in right if each[0] == "landed"]
    # Windows have 1, 2 and 2 iterations; each vote is cast when the window before the one that it is about begins.
    assert [each[1:] for each in left[:4]] == [(0, 0), (1, 0), (3, 3), (5, 9)]


def _collectives(coordinator: SimulatedRank, sums: int) -> list[str]:
    counting = CountingRank(coordinator)
    trainer = Engine(lambda engine, batch: None, coordinator=counting, name="trainer")  # type: ignore[arg-type]
    for at in range(sums):
        trainer.extension.sum_over_ranks(f"number {at}", lambda: 1, lambda total: None)
    trainer.run([0] * 50, max_epochs=3)
    return counting.calls


def test_no_collective_is_added_for_numbers() -> None:
    assert simulate(_collectives, 2, 5) == simulate(_collectives, 2, 0)


def _attach_on_one_rank(coordinator: SimulatedRank) -> None:
    trainer = Engine(lambda engine, batch: None, coordinator=coordinator, name="trainer")
    if coordinator.rank:
        trainer.extension.sum_over_ranks("tokens", lambda: 1, lambda total: None)
    with pytest.raises(TermsError, match="what handlers sum over ranks is rank 0: "):
        trainer.run([0])


def test_a_number_on_some_ranks_only_is_an_error_that_names_it() -> None:
    simulate(_attach_on_one_rank, 2)


def test_large_and_negative_numbers_are_summed_exactly() -> None:
    numbers = [1 << 60, -(1 << 61), 5]

    def run(coordinator: SimulatedRank) -> int:
        landed: list[int] = []
        trainer = Engine(lambda engine, batch: None, coordinator=coordinator, name="trainer")
        trainer.extension.sum_over_ranks("number", lambda: numbers[coordinator.rank], landed.append)
        trainer.run([0])
        return landed[-1]

    assert simulate(run, 3) == [sum(numbers)] * 3


def test_alone_the_number_is_read_at_each_epochs_end() -> None:
    trainer = Engine(lambda engine, batch: None, coordinator=Alone())
    seen = summing(trainer, 0)
    trainer.run([0] * 5, max_epochs=2)
    assert seen == [("landed", 5, 5), ("epoch", 5, 5), ("landed", 10, 10), ("epoch", 10, 10)]


def test_a_number_that_was_removed_is_read_no_more() -> None:
    trainer = Engine(lambda engine, batch: None, coordinator=Alone())
    landed: list[int] = []
    trainer.extension.remove_sum(trainer.extension.sum_over_ranks("number", lambda: 1, landed.append))
    trainer.run([0])
    assert landed == []


def _over_gloo(world: World) -> list[int]:
    trainer = Engine(lambda engine, batch: None, idle="skip")
    seen = summing(trainer, world.rank)
    trainer.run(batches(world.rank), max_epochs=2, uneven="longest")
    return landed_before_epochs_end(seen)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, *(pytest.param(each, marks=pytest.mark.nightly) for each in (1, 3))])
def test_real_ranks_have_one_total(ranks: int) -> None:
    total = sum((rank + 1) * (6 + rank) for rank in range(ranks))
    assert run_ranks(_over_gloo, ranks) == [[total, 2 * total]] * ranks


def test_surrounding_calls_are_around_all_handlers_of_then() -> None:
    trainer = Engine(lambda engine, batch: None, coordinator=Alone())
    seen: list[str] = []
    before, after = (lambda: seen.append("before")), (lambda: seen.append("after"))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append("one"))
    trainer.extension.surround(Events.EPOCH_COMPLETED, before, after)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append("two"))
    trainer.extension.surround(Events.EPOCH_COMPLETED, before, after)
    trainer.run([0])
    assert seen == ["before", "one", "two", "after"]
