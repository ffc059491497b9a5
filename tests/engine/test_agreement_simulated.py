"""What ranks promise each other, one promise a test, on simulated ranks."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from allstep.coordination import POLICIES, Alone, Uneven
from allstep.data import make_loader
from allstep.engine import Engine, Events, create_supervised_evaluator
from allstep.errors import DataError, DivergenceError, TermsError
from allstep.testing import SimulatedRank, simulate


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("allstep.engine"), "disabled", True)


def batches(n: int, *, rows: int = 2, start: int = 0) -> list[torch.Tensor]:
    return [torch.full((rows,), float(start + at)) for at in range(n)]


class Names:
    """A step that notes the batches that were this rank's own."""

    def __init__(self) -> None:
        self.own: list[int] = []

    def __call__(self, engine: Engine, batch: Any) -> None:
        if engine.state.active:
            self.own.append(int(batch[0]))


def raised_everywhere(world: Any, size: int, kind: type[Exception]) -> list[str]:
    """What each rank raised, which must be of this kind on all of them."""

    def one(coordinator: SimulatedRank) -> str:
        with pytest.raises(kind) as caught:
            world(coordinator)
        return str(caught.value)

    return simulate(one, size, timeout=30.0)


# Stops


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reason_of_a_stop_and_its_rank_are_known_on_every_rank(rank: int) -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, str | None, list[str]]:
        engine = Engine(lambda e, b: None, coordinator=coordinator)
        seen: list[str] = []
        engine.add_event_handler(Events.TERMINATE, lambda: seen.append(str(engine.state.stop_reason)))

        @engine.on(Events.ITERATION_COMPLETED(once=5))
        def ask() -> None:
            if coordinator.rank == rank:
                engine.terminate(reason="the loss is NaN")

        state = engine.run(batches(100), max_epochs=3)
        return state.iteration, state.stop_reason, seen

    said = simulate(world, 3)
    assert said == [said[0]] * 3
    assert 5 <= said[0][0] < 100
    assert said[0][1:] == (f"rank {rank}: the loss is NaN", [f"rank {rank}: the loss is NaN"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_a_window_of_one_a_stop_holds_after_the_present_group(accumulate: int) -> None:
    def world(coordinator: SimulatedRank) -> int:
        engine = Engine(lambda e, b: None, coordinator=coordinator, accumulate=accumulate)

        @engine.on(Events.ITERATION_COMPLETED(once=7))
        def ask() -> None:
            if coordinator.rank == 1:
                engine.terminate()

        return engine.run(batches(40), window=1).iteration

    assert simulate(world, 2) == [-(-7 // accumulate) * accumulate] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_asked_for_at_an_epochs_end_holds_at_once(rank: int) -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, int]:
        engine = Engine(lambda e, b: None, coordinator=coordinator)

        @engine.on(Events.EPOCH_COMPLETED(once=2))
        def ask() -> None:
            if coordinator.rank == rank:
                engine.terminate()

        state = engine.run(batches(9), max_epochs=5)
        return state.epoch, state.iteration

    assert simulate(world, 2) == [(2, 18)] * 2


def test_an_epochs_end_asked_for_in_its_last_iteration_leaves_the_next_epoch_whole() -> None:
    def world(coordinator: SimulatedRank) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        engine = Engine(lambda e, b: seen.append((e.state.epoch, e.state.iteration)), coordinator=coordinator)

        @engine.on(Events.ITERATION_COMPLETED(once=4))
        def ask() -> None:
            if coordinator.rank == 0:
                engine.terminate_epoch()

        engine.run(batches(4), max_epochs=3)
        return seen

    assert simulate(world, 2) == [[(1 + at // 4, at + 1) for at in range(12)]] * 2


def test_a_stop_that_all_agree_on_holds_at_once() -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, str | None]:
        engine = Engine(lambda e, b: None, coordinator=coordinator)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=6), lambda: engine.terminate(reason="done", agreed=True)
        )
        state = engine.run(batches(50))
        return state.iteration, (state.stop_reason or "").split(": ")[1]

    assert simulate(world, 3) == [(6, "done")] * 3


def test_a_plain_request_beside_an_agreed_stop_changes_nothing() -> None:
    def world(coordinator: SimulatedRank) -> int:
        engine = Engine(lambda e, b: None, coordinator=coordinator)

        @engine.on(Events.ITERATION_COMPLETED(once=6))
        def ask() -> None:
            engine.terminate(agreed=True)
            if coordinator.rank == 0:
                engine.terminate()

        iteration = engine.run(batches(50)).iteration
        assert coordinator.gather("after") == ["after", "after"]
        return iteration

    assert simulate(world, 2, timeout=30.0) == [6, 6]


@pytest.mark.parametrize("at", [(6, None, None), (None, 20, None), (6, 7, None), (6, 7, 8), (5, 6, 12)])
def test_an_agreed_stop_that_ranks_did_not_take_alike_is_an_error_on_all(at: tuple[int | None, ...]) -> None:
    def world(coordinator: SimulatedRank) -> None:
        engine = Engine(lambda e, b: None, coordinator=coordinator)

        @engine.on(Events.ITERATION_COMPLETED)
        def ask() -> None:
            if engine.state.iteration == at[coordinator.rank]:
                engine.terminate(agreed=True)

        engine.run(batches(50))

    messages = raised_everywhere(world, 3, DivergenceError)
    assert messages == [messages[0]] * 3
    first = next(rank for rank, iteration in enumerate(at) if iteration is not None)
    assert f"rank {first}: run end, epoch 1, iteration {at[first]}" in messages[0]
    assert "Alone()" in messages[0]


def test_ranks_that_end_together_for_different_reasons_are_together() -> None:
    def world(coordinator: SimulatedRank) -> int:
        engine = Engine(lambda e, b: None, coordinator=coordinator)

        @engine.on(Events.EPOCH_COMPLETED)
        def ask() -> None:
            if coordinator.rank == 0:
                engine.terminate(agreed=True)

        iteration = engine.run(batches(5)).iteration
        assert coordinator.gather(0) == [0, 0]
        return iteration

    assert simulate(world, 2, timeout=30.0) == [5, 5]


def test_with_one_rank_a_handler_of_the_exception_ends_an_accumulating_run_well() -> None:
    def step(engine: Engine, batch: Any) -> None:
        if engine.state.iteration == 3:
            raise RuntimeError("no")

    engine = Engine(step, accumulate=2)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda *_: engine.terminate())
    assert engine.run(batches(8)).iteration == 3
    asked_before = Engine(lambda e, b: e.terminate() if e.state.iteration < 3 else 1 / 0, accumulate=4)
    with pytest.raises(ZeroDivisionError):
        asked_before.run(batches(8))


# Data that is replaced


def test_one_rank_may_replace_its_data_at_an_epochs_end() -> None:
    def world(coordinator: SimulatedRank) -> tuple[list[str], list[int]]:
        step = Names()
        engine = Engine(step, coordinator=coordinator)
        seen: list[str] = []
        for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.DATALOADER_STOP_ITERATION):
            engine.add_event_handler(event, lambda *_, event=event: seen.append(event.name))

        @engine.on(Events.EPOCH_COMPLETED(once=1))
        def replace() -> None:
            if coordinator.rank == 0:
                engine.set_data(batches(4, start=100))

        engine.run(batches(4), max_epochs=3)
        return seen, step.own

    (events, replaced), (others, kept) = simulate(world, 2, timeout=30.0)
    assert events == others
    assert replaced == [0, 1, 2, 3] + [100, 101, 102, 103] * 2
    assert kept == [0, 1, 2, 3] * 3


def test_of_two_replacements_in_one_window_the_later_is_taken() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        step = Names()
        engine = Engine(step, coordinator=coordinator)

        @engine.on(Events.ITERATION_COMPLETED(before=4))
        def replace() -> None:
            if coordinator.rank == 1:
                engine.set_data(batches(30, start=100 * engine.state.iteration))

        engine.run(batches(20))
        return step.own

    untouched, replaced = simulate(world, 2, timeout=30.0)
    assert untouched == list(range(20))
    assert replaced[:3] == [0, 1, 2]
    assert replaced[-1] // 100 == 3
    assert len(replaced) == 20


def test_replacing_between_passes_keeps_the_batches_that_wait_for_their_group() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        step = Names()
        engine = Engine(step, coordinator=coordinator, accumulate=4)

        @engine.on(Events.DATALOADER_STOP_ITERATION)
        def replace() -> None:
            if coordinator.rank == 0:
                engine.set_data(batches(10, start=100))

        engine.run(batches(6), epoch_length=12)
        return step.own

    replaced, kept = simulate(world, 2, timeout=30.0)
    assert replaced == [0, 1, 2, 3, 4, 5, 100, 101, 102, 103, 104, 105]
    assert kept == [0, 1, 2, 3, 4, 5] * 2


@pytest.mark.parametrize("other", ["interrupt", "terminate_epoch"])
def test_a_replacement_and_another_rank_s_request_may_land_together(other: str) -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, list[str]]:
        engine = Engine(Names(), coordinator=coordinator)
        seen: list[str] = []
        for event in Events:
            engine.add_event_handler(event, lambda *_, event=event: seen.append(event.name))

        @engine.on(Events.ITERATION_COMPLETED(once=4))
        def ask() -> None:
            if coordinator.rank == 0:
                engine.set_data(batches(30))
            elif coordinator.rank == 1:
                getattr(engine, other)()

        engine.run(batches(30), max_epochs=2, window=1)
        while seen[-1] == "INTERRUPT":
            engine.run()
        return engine.state.iteration, seen

    said = simulate(world, 3, timeout=30.0)
    assert said == [said[0]] * 3
    assert said[0][0] == (60 if other == "interrupt" else 34)


# Data


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self, n: int) -> None:
        self.n = n
        self.read = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for at in range(self.n):
            self.read += 1
            yield torch.tensor(float(at))


class Counted(Dataset[torch.Tensor]):
    def __init__(self, n: int) -> None:
        self.n = n
        self.read = 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: int) -> torch.Tensor:
        self.read += 1
        return torch.tensor(float(at))


def test_a_data_loader_over_an_iterable_data_set_is_read_ahead() -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, int | None]:
        engine = Engine(lambda e, b: None, coordinator=coordinator)
        state = engine.run(DataLoader(Stream(10 + 6 * coordinator.rank), batch_size=2))
        return state.iteration, state.epoch_length

    assert simulate(world, 2) == [(5, 5)] * 2


def test_a_sampler_that_does_not_know_its_length_is_read_ahead() -> None:
    class Unsized(Sampler[int]):
        def __init__(self, n: int) -> None:
            self.n = n

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.n))

    def world(coordinator: SimulatedRank) -> int:
        data = Counted(20)
        loader = DataLoader(data, batch_size=2, sampler=Unsized(10 + 6 * coordinator.rank))
        return Engine(lambda e, b: None, coordinator=coordinator).run(loader).iteration

    assert simulate(world, 2) == [5, 5]


@pytest.mark.parametrize("own", [True, False])
def test_nothing_is_read_ahead_of_a_loader_whose_counts_are_arithmetic(own: bool) -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        data = Counted(40)
        loader: Any = DataLoader(data, batch_size=2)
        if own:
            loader = make_loader(data, rank=coordinator.rank, world_size=2, seed=0, batch_size=2)
        read: list[int] = []
        Engine(lambda e, b: read.append(data.read), coordinator=coordinator).run(loader, max_epochs=2)
        return read

    for read in simulate(world, 2):
        assert read == [2 * (at + 1) for at in range(len(read))]
        assert len(read) == (20 if own else 40)


@pytest.mark.parametrize(("lookahead", "most"), [(None, 32), (1, 1), (2, 2), (7, 7), (40, 40)])
def test_other_data_is_read_ahead_by_at_most_lookahead_and_one_batch_an_iteration(
    lookahead: int | None, most: int
) -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        data = Stream(200)
        ahead: list[int] = []
        engine = Engine(lambda e, b: ahead.append(data.read - e.state.iteration), coordinator=coordinator)
        engine.run(DataLoader(data, batch_size=None), lookahead=lookahead)
        return ahead

    for ahead in simulate(world, 2):
        assert len(ahead) == 200
        assert max(ahead) <= most
        assert max(ahead) > most // 2 - 1 or most == 1


def test_a_lookahead_smaller_than_a_group_is_refused() -> None:
    engine = Engine(lambda e, b: None, accumulate=4)
    with pytest.raises(ValueError, match=r"lookahead is 3; .* at least 4"):
        engine.run(batches(8), lookahead=3)
    assert engine.run(batches(8), lookahead=4).iteration == 8


class Lies(Sampler[int]):
    def __init__(self, declared: int, given: int) -> None:
        self.declared = declared
        self.given = given

    def __len__(self) -> int:
        return self.declared

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.given))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("given", [0, 2, 8, 9])
@pytest.mark.parametrize("terms", [{}, {"epoch_length": 25}, {"max_iters": 10}])
def test_data_that_gives_less_than_it_declared_is_one_error_on_all_ranks(
    policy: Uneven, given: int, terms: dict[str, int]
) -> None:
    def world(coordinator: SimulatedRank) -> None:
        lies = Lies(10, given if coordinator.rank == 1 else 10)
        loader = DataLoader(Counted(10), batch_size=1, sampler=lies)
        steps = Engine(lambda e, b: b.sum(), coordinator=coordinator)
        steps.run(loader, uneven=policy, **terms)

    messages = raised_everywhere(world, 3, DataError)
    assert messages == [messages[0]] * 3
    assert f"rank 1 declared 10 batches and gave {given}." in messages[0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("length", [2, 3, 9, 13, 14])
def test_every_sample_of_the_own_loader_is_trained_once_whatever_its_tail(
    policy: Uneven, tokens: bool, length: int
) -> None:
    def world(coordinator: SimulatedRank) -> tuple[list[list[int]], int, list[float]]:
        loader = make_loader(Counted(length), rank=coordinator.rank, world_size=4, seed=0, batch_size=1, shuffle=True)
        seen: list[list[int]] = [[], []]
        weights: list[float] = []

        def step(engine: Engine, batch: torch.Tensor) -> None:
            weights.append(engine.state.weight)
            if engine.state.active:
                seen[engine.state.epoch - 1] += [int(x) for x in batch]

        engine = Engine(step, coordinator=coordinator, samples_in=len if tokens else None)
        state = engine.run(loader, max_epochs=2, uneven=policy)
        return seen, state.iteration, weights

    results = simulate(world, 4, timeout=30.0)
    iterations = -(-length // 4)
    for epoch in range(2):
        assert sorted(x for seen, _, _ in results for x in seen[epoch]) == list(range(length))
    assert {done for _, done, _ in results} == {2 * iterations}
    for at in range(2 * iterations):
        assert sum(weights[at] for _, _, weights in results) == pytest.approx(4.0)


@pytest.mark.parametrize("end", ["terminate_epoch", "interrupt", "terminate", "max_iters"])
def test_what_was_read_ahead_of_a_one_shot_iterator_is_given_later(end: str) -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        step = Names()
        engine = Engine(step, coordinator=coordinator)
        stream = iter(batches(60))
        seen: list[str] = []
        engine.add_event_handler(Events.INTERRUPT, lambda: seen.append("INTERRUPT"))
        if end != "max_iters":

            @engine.on(Events.ITERATION_COMPLETED(once=13))
            def ask() -> None:
                if coordinator.rank == 1:
                    getattr(engine, end)()

        first = {"max_iters": 13} if end == "max_iters" else {"max_epochs": 1}
        engine.run(stream, epoch_length=20, **first)
        assert len(step.own) < 60
        assert bool(seen) == (end == "interrupt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if end == "max_iters":
                engine.run(max_iters=60)
            elif end == "interrupt":
                engine.run(max_epochs=3)
            else:
                engine.run(stream, max_epochs=5)
        return step.own

    assert simulate(world, 2, timeout=30.0) == [list(range(60))] * 2


def test_a_group_that_fails_gives_a_rank_without_a_batch_in_it_none_of_an_earlier_group_again() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        data = iter(batches(6 if coordinator.rank == 0 else 2))
        names, fails = Names(), True

        def step(engine: Engine, batch: Any) -> None:
            if fails and engine.state.iteration == 3:
                raise ValueError("in the second group")
            names(engine, batch)

        engine = Engine(step, coordinator=coordinator, accumulate=2, uneven="longest")
        with pytest.raises(ValueError, match="second group"):
            engine.run(data, epoch_length=6)
        fails = False
        engine.run(data, epoch_length=6)
        return names.own

    assert simulate(world, 2, timeout=30.0) == [list(range(6)), [0, 1]]


def test_a_one_shot_iterator_loses_nothing_where_another_rank_s_data_begins_anew() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        step = Names()
        data: Any = iter(batches(20)) if coordinator.rank == 0 else batches(5)
        Engine(step, coordinator=coordinator).run(data, epoch_length=4, max_epochs=5)
        return step.own

    assert simulate(world, 2, timeout=30.0) == [list(range(20)), [0, 1, 2, 3, 4] * 4]


def test_batches_that_wait_for_their_group_are_trained_when_iterators_run_dry() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        step = Names()
        engine = Engine(step, coordinator=coordinator, accumulate=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.run(iter(batches(8)), epoch_length=3, max_epochs=9)
        return step.own

    assert simulate(world, 2, timeout=30.0) == [list(range(8))] * 2


def test_an_unknown_length_is_learnt_with_a_group_cut_short_when_the_run_counts_iterations() -> None:
    class Unknown:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(batches(6))

    def world(coordinator: SimulatedRank) -> tuple[int | None, list[bool]]:
        ends: list[bool] = []
        engine = Engine(lambda e, b: ends.append(e.state.group_end), coordinator=coordinator, accumulate=4)
        state = engine.run(Unknown(), max_iters=12)
        return state.epoch_length, ends

    assert simulate(world, 2) == [(6, [False, False, False, True, False, True] * 2)] * 2


# What is reported


@pytest.mark.parametrize("known", [True, False])
def test_what_was_left_unread_is_reported_over_all_passes_of_the_epoch(known: bool) -> None:
    def world(coordinator: SimulatedRank) -> list[tuple[int, int, int]]:
        n = [10, 7, 9][coordinator.rank]
        data: Any = DataLoader(Counted(2 * n), batch_size=2) if known else DataLoader(Stream(2 * n), batch_size=2)
        engine = Engine(lambda e, b: None, coordinator=coordinator)
        state = engine.run(data, epoch_length=14)
        return [(each.rank, each.batches, each.samples) for each in state.unread]

    assert simulate(world, 3) == [[(0, 6, 12), (2, 4, 8)]] * 3


def test_batches_of_a_list_are_reported_exactly_however_many_were_left() -> None:
    def world(coordinator: SimulatedRank) -> list[tuple[int, int]]:
        state = Engine(lambda e, b: None, coordinator=coordinator).run(batches([40, 7][coordinator.rank]))
        return [(each.rank, each.batches) for each in state.unread]

    assert simulate(world, 2) == [[(0, 33)]] * 2


def test_nothing_is_reported_unread_that_the_next_epoch_reads() -> None:
    def world(coordinator: SimulatedRank) -> list[Any]:
        reports: list[Any] = []
        engine = Engine(lambda e, b: None, coordinator=coordinator)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: reports.append(engine.state.unread))
        data = DataLoader(Counted([20, 10][coordinator.rank]), batch_size=1)
        engine.run(data, epoch_length=10, max_epochs=3, uneven="longest")
        return [*reports, engine.state.unread]

    assert simulate(world, 2) == [[(), (), (), ()]] * 2


# Terms


@pytest.mark.parametrize(
    ("key", "mine", "theirs"),
    [
        ("max_epochs", {"max_epochs": 2}, {"max_epochs": 3}),
        ("max_iters", {"max_iters": 5}, {"max_iters": 6}),
        ("uneven", {"uneven": "longest"}, {"uneven": "error"}),
        ("window", {"window": 1}, {}),
        ("window", {"window": 0}, {}),
        ("uneven", {"uneven": "sometimes"}, {}),
        ("lookahead", {"lookahead": -1}, {}),
        ("lookahead", {"lookahead": 8}, {}),
        ("epoch_length", {"epoch_length": 3}, {}),
        ("accumulate", {"engine": {"accumulate": 2}}, {}),
        ("idle", {"engine": {"idle": "skip"}}, {}),
        ("the engine's name", {"engine": {"name": "a"}}, {"engine": {"name": "b"}}),
    ],
)
def test_ranks_about_to_run_different_things_raise_the_same_error(
    key: str, mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    def world(coordinator: SimulatedRank) -> None:
        terms = dict(mine if coordinator.rank == 1 else theirs)
        options = terms.pop("engine", {})
        Engine(lambda e, b: None, coordinator=coordinator, **options).run(batches(10), **terms)

    messages = raised_everywhere(world, 3, TermsError)
    assert messages == [messages[0]] * 3
    value = next(iter({**mine, **mine.get("engine", {})}.values()))
    value = next(iter(value.values())) if isinstance(value, dict) else value
    assert f"{key} is rank 0: " in messages[0]
    assert f"rank 1: {value!r}" in messages[0]


def test_what_cannot_be_meant_and_all_ranks_say_is_an_error_about_the_argument() -> None:
    def world(coordinator: SimulatedRank) -> None:
        Engine(lambda e, b: None, coordinator=coordinator).run(batches(3), window=0)

    assert raised_everywhere(world, 2, ValueError) == ["window is 0; it must be an int of at least 1"] * 2


def test_the_engine_s_name_is_by_default_its_step_s() -> None:
    def one(engine: Engine, batch: Any) -> None: ...
    def other(engine: Engine, batch: Any) -> None: ...

    def world(coordinator: SimulatedRank) -> None:
        Engine(other if coordinator.rank else one, coordinator=coordinator).run(batches(3))

    message = raised_everywhere(world, 2, TermsError)[0]
    assert "one'" in message
    assert "other'" in message


# Evaluation, fillers, cost


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 1), (4, 4, 4)])
def test_an_evaluator_fires_the_same_events_everywhere_and_skips_where_there_is_no_batch(
    counts: tuple[int, ...],
) -> None:
    def world(coordinator: SimulatedRank) -> tuple[list[tuple[str, int]], int, int]:
        calls: list[int] = []

        def model(x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return x

        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return model(x)

        evaluator = create_supervised_evaluator(Model(), device="cpu")
        evaluator._given_coordinator = coordinator
        seen: list[tuple[str, int]] = []
        outputs: list[Any] = []
        for event in Events:
            evaluator.add_event_handler(
                event, lambda *_, event=event: seen.append((event.name, evaluator.state.iteration))
            )
        evaluator.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: outputs.append(evaluator.state.output) if evaluator.state.active else 0
        )
        data = [(x, x) for x in batches(counts[coordinator.rank])]
        evaluator.run(data)
        assert None not in outputs
        return seen, len(calls), len(outputs)

    results = simulate(world, 3, timeout=30.0)
    assert [seen for seen, _, _ in results] == [results[0][0]] * 3
    assert [(calls, outputs) for _, calls, outputs in results] == [(n, n) for n in counts]
    assert ("ITERATION_COMPLETED", max(counts)) in results[0][0]


def test_engines_in_handlers_share_the_coordinator_and_one_alone_needs_nobody() -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, int]:
        trainer = Engine(lambda e, b: None, coordinator=coordinator, name="trainer")
        evaluator = Engine(lambda e, b: None, coordinator=coordinator, name="evaluator", uneven="longest", idle="skip")
        alone = Engine(lambda e, b: None, coordinator=Alone(), name="alone")

        @trainer.on(Events.ITERATION_COMPLETED(every=3))
        def evaluate() -> None:
            evaluator.run(batches(2 + coordinator.rank))
            if coordinator.rank == 0:
                alone.run(batches(5))

        trainer.run(batches(20), max_epochs=2)
        return trainer.state.iteration, evaluator.state.iteration

    assert simulate(world, 3) == [(40, 4)] * 3


def test_a_batch_without_a_sample_to_count_weighs_nothing_and_poisons_nothing() -> None:
    def world(coordinator: SimulatedRank) -> list[float]:
        model = nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(2.0)
        grads: list[float] = []

        def step(engine: Engine, tokens: torch.Tensor) -> None:
            kept = tokens[tokens >= 0]
            loss = model(kept[:, None]).mean()
            model.zero_grad()
            (loss * engine.state.weight).backward()
            grads.append(float(model.weight.grad))  # type: ignore[arg-type]
            assert engine.state.active

        engine = Engine(step, coordinator=coordinator, samples_in=lambda tokens: (tokens >= 0).sum())
        engine.modules.append(model)
        mine = [torch.tensor([3.0, 5.0]), torch.tensor([-1.0, -1.0])]
        engine.run(mine if coordinator.rank else mine[::-1])
        return grads

    assert simulate(world, 2) == [[0.0, 8.0], [8.0, 0.0]]


@pytest.mark.parametrize("counted", [1.5, "three", -1, 1 << 40, None])
def test_samples_in_must_count(counted: Any) -> None:
    engine = Engine(lambda e, b: None, accumulate=2, samples_in=lambda batch: counted)
    with pytest.raises(DataError, match="samples_in returned"):
        engine.run(batches(4))


@pytest.mark.parametrize("window", [None, 1])
def test_the_number_of_meetings_is_one_a_window_and_a_few_a_run(window: int | None) -> None:
    def world(coordinator: SimulatedRank) -> int:
        loader = DataLoader(Counted(1000), batch_size=1)
        Engine(lambda e, b: None, coordinator=coordinator).run(loader, window=window)
        return coordinator.calls

    (calls, _) = simulate(world, 2)
    if window == 1:
        assert 1000 <= calls <= 1004
    else:
        assert calls <= 1000 // 32 + 12


def test_handlers_of_an_epochs_end_are_no_part_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        sizes: list[int] = []

        def step(engine: Engine, batch: torch.Tensor) -> None:
            if not sizes or sizes[-1] != engine.extension.window_ends_at:
                sizes.append(engine.extension.window_ends_at)

        def wait(engine: Engine) -> None:
            now[coordinator.rank] += 3_000_000_000

        engine = Engine(step, coordinator=coordinator)
        engine.add_event_handler(Events.EPOCH_COMPLETED, wait)
        engine.run(DataLoader(Counted(63)), max_epochs=2)
        return [after - before for before, after in zip([0, *sizes], sizes, strict=False)]

    now = {0: 0, 1: 0}
    ranks = {}
    monkeypatch.setattr("allstep.engine.agreed_batches.monotonic_ns", lambda: now[ranks[threading.get_ident()]])

    def ranked(coordinator: SimulatedRank) -> list[int]:
        ranks[threading.get_ident()] = coordinator.rank
        return world(coordinator)

    for windows in simulate(ranked, 2):
        assert windows[:6] == [1, 2, 4, 8, 16, 32]
        assert windows[6:] == [32, 31]
