"""Agreement over 2, 3 and 4 gloo processes: a sample of the drawn worlds, and promises one by one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from allstep import Engine, Events
from allstep.coordination import Uneven
from allstep.testing import run_ranks
from allstep.trainers import create_supervised_evaluator
from allstep.world import World, internals
from tests.engine.agreed_worlds import Drawn, Log, drawn_worlds, run_rank
from tests.engine.test_agreed_batches_worlds import ACTS, check_logs, check_replaced_logs

pytestmark = pytest.mark.slow

SOME = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=60, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck))


def _quiet() -> None:
    logging.getLogger("allstep.engine").disabled = True
    warnings.simplefilter("ignore")


def _run_drawn(world: World, drawn: Drawn) -> Log:
    _quiet()
    return run_rank(internals(world).coordinator, drawn)


@SOME
@given(drawn_worlds())
def test_processes_with_any_data_take_the_batches_that_the_policy_says(drawn: Drawn) -> None:
    check_logs(drawn, run_ranks(_run_drawn, len(drawn.shelves), drawn))


@SOME
@given(drawn_worlds(acts=ACTS, policies=("shortest", "longest")))
def test_a_request_of_any_process_at_any_moment_stops_all_at_one_place(drawn: Drawn) -> None:
    check_logs(drawn, run_ranks(_run_drawn, len(drawn.shelves), drawn))


@SOME
@given(drawn_worlds(acts=(*ACTS, "set_data"), policies=("shortest", "longest")))
def test_any_process_may_replace_its_data_at_any_moment(drawn: Drawn) -> None:
    check_replaced_logs(drawn, run_ranks(_run_drawn, len(drawn.shelves), drawn))


@pytest.mark.nightly
@MANY
@given(drawn_worlds(acts=ACTS))
def test_many_requests_of_any_process_stop_all_at_one_place(drawn: Drawn) -> None:
    check_logs(drawn, run_ranks(_run_drawn, len(drawn.shelves), drawn))


class Counted(Dataset[float]):
    """Counts what was read of it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.read = 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, at: int) -> float:
        self.read += 1
        return float(at)


class Stream(IterableDataset[torch.Tensor]):
    """Numbered batches of two rows; nobody knows how many, and a pass counts on where `start` says."""

    def __init__(self, batches: int, start: int = 0) -> None:
        self.batches = batches
        self.start = start
        self.read = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for at in range(self.start, self.start + self.batches):
            self.read += 1
            yield torch.full((2,), at)


def _reads(world: World) -> list[list[int]]:
    found: list[list[int]] = []

    def run(data: Any, counted: Counted | Stream, rows: int, **terms: Any) -> None:
        ahead: list[int] = []
        engine = Engine(lambda e, b: ahead.append(counted.read - rows * e.state.iteration))
        engine.run(data, **terms)
        found.append(ahead)

    rows = Counted(120)
    run(world.loader(rows, batch_size=2), rows, 2)
    rows = Counted(80)
    run(DataLoader(rows, batch_size=2), rows, 2)
    for lookahead in (None, 1, 7, 40):
        stream = Stream(100 + 10 * world.rank)
        run(DataLoader(stream, batch_size=None), stream, 1, lookahead=lookahead)
    return found


def test_only_data_that_must_be_counted_is_read_ahead_and_by_lookahead() -> None:
    for own, plain, *ahead in run_ranks(_reads, 2):
        assert set(own) == set(plain) == {0}
        for most, read in zip((32, 1, 7, 40), ahead, strict=True):
            assert len(read) == 100
            assert most // 2 <= max(read) <= most


def _stops_at_an_epochs_end(world: World) -> list[tuple[int, int, str | None]]:
    _quiet()
    told = []
    for asker in range(world.world_size):
        engine = Engine(lambda e, b: None, name="run")
        if world.rank == asker:
            engine.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda e: e.terminate(reason="enough"))
        state = engine.run(Stream(5 + world.rank), max_epochs=9)
        told.append((state.epoch, state.iteration, state.stop_reason))
    return told


def test_a_stop_asked_for_at_an_epochs_end_holds_at_once_whoever_asks() -> None:
    expected = [(2, 10, f"rank {asker}: enough") for asker in range(4)]
    assert run_ranks(_stops_at_an_epochs_end, 4) == [expected] * 4


def _suspended_and_cut(world: World) -> tuple[list[int], list[tuple[str, int, int]]]:
    _quiet()
    seen: list[int] = []
    events: list[tuple[str, int, int]] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        seen.append(int(batch[0]))
        world.all_reduce(1)

    engine = Engine(step)
    for event in (Events.INTERRUPT, Events.TERMINATE_SINGLE_EPOCH, Events.EPOCH_COMPLETED, Events.COMPLETED):
        engine.add_event_handler(
            event, lambda e, *_, name=event.name: events.append((name, e.state.epoch, e.state.iteration))
        )
    if world.rank == world.world_size - 1:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: engine.interrupt())
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=23), lambda: engine.terminate_epoch())
    engine.run(iter(Stream(200)), max_epochs=3, epoch_length=20, lookahead=9)
    assert engine.state.iteration < 20
    engine.run()
    return seen, events


@pytest.mark.parametrize("size", [2, 4])
def test_what_was_read_ahead_survives_an_interruption_and_a_cut_epoch(size: int) -> None:
    results = run_ranks(_suspended_and_cut, size)
    assert results == [results[0]] * size
    seen, events = results[0]
    assert seen == list(range(len(seen)))
    assert [name for name, *_ in events] == [
        "INTERRUPT",
        "EPOCH_COMPLETED",
        "TERMINATE_SINGLE_EPOCH",
        "EPOCH_COMPLETED",
        "EPOCH_COMPLETED",
        "COMPLETED",
    ]


def _resumed(world: World) -> list[int]:
    _quiet()
    seen: list[int] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        seen.append(int(batch[0]))

    first = Engine(step)
    if world.rank == 1:
        first.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: first.interrupt())
    first.run(Stream(30), lookahead=9)
    assert len(seen) < 30
    second = Engine(step)
    second.load_state_dict(first.state_dict())
    second.run(Stream(30 + world.rank), lookahead=9)
    return seen


def test_a_resumed_run_takes_what_was_read_ahead_and_not_trained() -> None:
    assert run_ranks(_resumed, 3) == [list(range(30))] * 3


def _replaced(world: World) -> list[int]:
    seen: list[int] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        seen.append(int(batch[0]))
        world.all_reduce(1)

    engine = Engine(step)
    if world.rank == 1:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda: engine.set_data(Stream(50, 1000)))
    engine.run(Stream(30), epoch_length=30, lookahead=6)
    return seen


def test_a_rank_that_replaces_its_data_drops_what_it_read_ahead() -> None:
    others, replaced, third = run_ranks(_replaced, 3)
    assert others == third == list(range(30))
    old = [at for at in replaced if at < 1000]
    assert 4 <= len(old) < 12
    assert replaced == [*range(len(old)), *range(1000, 1000 + 30 - len(old))]


def _small_datasets(world: World) -> list[tuple[list[int], int]]:
    told = []
    model = world.wrap(nn.Linear(1, 1))
    uneven: Uneven
    for rows in (1, 3, 9):
        for uneven in ("shortest", "longest", "error"):
            for samples_in in (None, len):
                seen: list[int] = []

                def step(engine: Engine, batch: torch.Tensor, seen: list[int] = seen) -> None:
                    (model(batch.float()[:, None]).mean() * engine.state.weight).backward()
                    if engine.state.active:
                        seen.extend(batch.tolist())

                loader = world.loader(torch.arange(rows), global_batch_size=4)  # type: ignore[arg-type]
                state = Engine(step, samples_in=samples_in).run(loader, max_epochs=2, uneven=uneven)
                told.append((seen, state.iteration))
    return told


def test_fewer_samples_than_ranks_are_all_trained_under_any_policy() -> None:
    runs = list(zip(*run_ranks(_small_datasets, 4), strict=True))
    assert len(runs) == 18
    for at, ranks in enumerate(runs):
        rows = (1, 3, 9)[at // 6]
        assert sorted(sample for seen, _ in ranks for sample in seen) == sorted([*range(rows)] * 2)
        assert {iterations for _, iterations in ranks} == {2 * -(-rows // 4)}


def _evaluated(world: World, counts: list[int]) -> list[tuple[int, bool, bool]]:
    evaluator = create_supervised_evaluator(world.wrap(nn.Linear(2, 1)))
    seen: list[tuple[int, bool, bool]] = []
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: seen.append((e.state.iteration, e.state.active, e.state.output is not None)),
    )
    trainer = Engine(lambda e, b: world.all_reduce(1), name="trainer")
    data = [(torch.zeros(3, 2), torch.zeros(3, 1))] * counts[world.rank]
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=7), lambda: evaluator.run(iter(data)))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(data))
    trainer.run(Stream(10 + world.rank))
    return seen


def test_an_evaluator_in_a_handler_skips_the_step_without_a_batch() -> None:
    counts = [3, 0, 5, 1]
    for seen, count in zip(run_ranks(_evaluated, 4, counts), counts, strict=True):
        assert seen == [(at + 1, at < count, at < count) for at in range(5)] * 2


def _buffers(world: World) -> list[tuple[int, float]]:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(1, momentum=0.5)
    model = world.wrap(nn.Sequential(norm, nn.Linear(1, 1)))  # DDP broadcasts rank 0's buffers in each forward pass
    seen: list[tuple[int, float]] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        (model(batch).mean() * engine.state.weight).backward()

    engine = Engine(step)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: seen.append((int(norm.num_batches_tracked or 0), float(norm.running_mean)))
    )
    engine.run([torch.full((2, 1), 8.0)] * (3 - 2 * world.rank), uneven="longest")
    return seen


def test_a_rank_without_a_batch_keeps_the_buffers_that_ddp_broadcast() -> None:
    active, idle = run_ranks(_buffers, 2)
    assert active == [(1, 4.0), (2, 6.0), (3, 7.0)]
    assert idle == [(1, 4.0), (1, 4.0), (2, 6.0)]


def _static_graph(world: World) -> str:
    model = world.wrap(nn.Linear(2, 1), static_graph=True)

    def step(engine: Engine, batch: Any) -> None:
        model(batch[0]).sum().backward()

    loader = world.loader(torch.utils.data.TensorDataset(torch.ones(16, 2)), batch_size=2)
    Engine(step).run(loader)
    with pytest.raises(ValueError, match="static_graph") as raised:
        Engine(step, accumulate=2).run(loader)
    return str(raised.value)


def test_a_static_graph_trains_and_is_refused_with_accumulation() -> None:
    for said in run_ranks(_static_graph, 2):
        assert "accumulated over 2 iterations" in said
