"""StopOnSignal: a signal to one rank stops all; a second one hurries, a third one ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from allstep import Alone, Engine, Events, StopOnSignal
from allstep.errors import EngineError
from allstep.launch.worker import EarlySignals
from allstep.testing import run_ranks
from allstep.world import World
from tests.jobs.forked import Script, run_forked
from tests.jobs.launchers import script

BOTH = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _handlers_stay_as_they_were() -> Iterator[None]:
    before = [signal.getsignal(number) for number in BOTH]
    yield
    after = [signal.getsignal(number) for number in BOTH]
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)
    assert after == before


def signalled(number: int, at: int) -> Engine:
    def step(engine: Engine, batch: object) -> None:
        if engine.state.iteration == at:
            os.kill(os.getpid(), number)

    return Engine(step, coordinator=Alone())


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_ends_the_run_after_the_iteration_in_which_it_came(number: signal.Signals) -> None:
    engine = signalled(number, at=3)
    with StopOnSignal().attach(engine) as stopping:
        state = engine.run(range(10))
    assert (state.iteration, state.stop_reason) == (3, f"rank 0: signal {number.name}")
    assert stopping.received is number


def test_a_signal_at_an_epochs_end_ends_the_run_there() -> None:
    engine = Engine(lambda engine, batch: None, coordinator=Alone())
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with StopOnSignal().attach(engine):
        state = engine.run(range(3), max_epochs=5)
    assert (state.epoch, state.iteration) == (2, 6)


def test_a_signal_before_the_run_ends_it_before_its_first_iteration() -> None:
    engine = Engine(lambda engine, batch: None, coordinator=Alone())
    with StopOnSignal([signal.SIGUSR1]).attach(engine):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert engine.run(range(3)).iteration == 0


def test_only_the_signals_given_are_taken_over() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopOnSignal([signal.SIGUSR1]).attach(Engine(lambda engine, batch: None)):
        assert signal.getsignal(signal.SIGTERM) is before


def test_detach_gives_back_the_handlers_and_leaves_the_engine() -> None:
    def mine(number: int, frame: object) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        engine = Engine(lambda engine, batch: None)
        stopping = StopOnSignal().attach(engine)
        assert signal.getsignal(signal.SIGUSR1) is not mine
        stopping.detach()
        stopping.detach()
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert not any(engine.has_event_handler(stopping._tell, event) for event in Events)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_handlers_are_given_back_after_an_exception() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopOnSignal().attach(Engine(lambda engine, batch: 1 / 0)) as stopping:
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopping.received is None


def test_attaching_outside_the_main_thread_is_refused() -> None:
    errors: list[BaseException] = []

    def attach() -> None:
        try:
            StopOnSignal().attach(Engine(lambda engine, batch: None))
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=attach)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_attaching_twice_is_refused() -> None:
    engine = Engine(lambda engine, batch: None)
    with StopOnSignal().attach(engine) as stopping, pytest.raises(EngineError, match="attached already"):
        stopping.attach(engine)


SIGNAL_ITSELF = """
import signal
from allstep import Alone, Engine, StopOnSignal

def step(engine, batch):
    for _ in range(int(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGTERM)

engine = Engine(step, coordinator=Alone())
StopOnSignal(together=float(sys.argv[2])).attach(engine)
print(engine.run(range(5)).iteration)
"""


@pytest.mark.slow
def test_the_third_signal_ends_the_process(tmp_path: Path) -> None:
    expected = {
        ("2", "0"): (0, "1\n"),  # the second does not end it
        ("3", "0"): (-signal.SIGTERM, ""),
        ("5", "60"): (0, "1\n"),  # those that come together are one
    }
    path = script(tmp_path, SIGNAL_ITSELF)
    jobs = run_forked(tmp_path, *(Script(path, arguments) for arguments in expected))
    assert {given: (job.code, job.out) for given, job in zip(expected, jobs, strict=True)} == expected


def _hurried(signals: list[int], **options: Any) -> tuple[int, int, str | None]:
    """Iterations of a trainer, and of an evaluator in which the signals come, and why the latter ended."""
    trainer = Engine(lambda engine, batch: None, coordinator=Alone(), name="trainer")
    evaluator = Engine(lambda engine, batch: None, coordinator=Alone(), name="evaluator")

    def send(engine: Engine) -> None:
        if signals:
            os.kill(os.getpid(), signals.pop(0))

    evaluator.add_event_handler(Events.ITERATION_STARTED(event_filter=lambda engine, at: at >= 3), send)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(range(10)))
    with StopOnSignal(hurries=[evaluator], **options).attach(trainer):
        trainer.run(range(2), max_epochs=5)
    return trainer.state.iteration, evaluator.state.iteration, evaluator.state.stop_reason


def test_one_signal_lets_an_evaluator_come_to_its_end() -> None:
    assert _hurried([signal.SIGTERM]) == (2, 10, None)


def test_a_second_signal_ends_the_engines_that_were_named_for_it() -> None:
    assert _hurried([signal.SIGTERM, signal.SIGUSR1]) == (2, 4, "rank 0: signal SIGTERM, twice")


def test_one_notice_that_comes_twice_hurries_nobody() -> None:
    assert _hurried([signal.SIGTERM, signal.SIGTERM]) == (2, 10, None)
    assert _hurried([signal.SIGTERM, signal.SIGTERM], together=0) == (2, 4, "rank 0: signal SIGTERM, twice")


def _one_rank_hurries(world: World) -> tuple[int, int, bool]:
    trainer = Engine(lambda engine, batch: None, name="trainer")
    evaluator = Engine(lambda engine, batch: None, name="evaluator")

    def send(engine: Engine) -> None:
        if world.rank == 1 and engine.state.iteration in (3, 4):
            os.kill(os.getpid(), signal.SIGUSR1 if engine.state.iteration == 3 else signal.SIGTERM)

    evaluator.add_event_handler(Events.ITERATION_STARTED, send)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(repeat(0), max_iters=10**9))
    with StopOnSignal(hurries=[evaluator]).attach(trainer):
        trainer.run(range(2), max_epochs=5)
    return trainer.state.iteration, evaluator.state.iteration, evaluator.state.iteration < 10**6


@pytest.mark.slow
def test_a_second_signal_to_one_rank_ends_the_evaluator_of_all() -> None:
    results = run_ranks(_one_rank_hurries, 2)
    assert results == [results[0]] * 2
    assert results[0][0] == 2
    assert results[0][2]


def _one_rank_is_signalled(world: World, number: int, window: int | None) -> tuple[int, str | None, list[str]]:
    pids = world.gather_objects(os.getpid())

    def step(engine: Engine, batch: object) -> None:
        if world.rank == 0 and engine.state.iteration == 3:
            os.kill(pids[1], number)

    engine = Engine(step)
    ended: list[str] = []
    for event in (Events.TERMINATE, Events.COMPLETED):
        engine.add_event_handler(event, lambda name: ended.append(name), event.name)
    with StopOnSignal().attach(engine):
        state = engine.run(repeat(0), max_iters=10**9, window=window)
    return state.iteration, state.stop_reason, ended


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "window", "size"), [(signal.SIGTERM, None, 4), (signal.SIGUSR1, 1, 3), (signal.SIGUSR1, None, 2)]
)
def test_a_signal_to_one_rank_stops_all_at_the_same_iteration(
    number: signal.Signals, window: int | None, size: int
) -> None:
    results = run_ranks(_one_rank_is_signalled, size, int(number), window)
    iteration, reason, ended = results[0]
    assert results == [results[0]] * size
    assert iteration >= 3
    assert (reason, ended) == (f"rank 1: signal {number.name}", ["TERMINATE", "COMPLETED"])


def test_a_signal_that_an_earlier_handler_noted_counts_once() -> None:
    noted = EarlySignals()
    before = signal.signal(signal.SIGUSR1, noted)
    try:
        signal.raise_signal(signal.SIGUSR1)
        for reason in ("signal SIGUSR1", None):
            engine = Engine(lambda engine, batch: None, coordinator=Alone())
            with StopOnSignal().attach(engine):
                state = engine.run(range(5))
            assert (state.stop_reason or "").endswith(reason or "")
            assert (state.iteration < 5) is (reason is not None)
        assert signal.getsignal(signal.SIGUSR1) is noted
    finally:
        signal.signal(signal.SIGUSR1, before)
