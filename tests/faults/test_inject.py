"""Where faults strike: in which iteration, on which rank, in which of several engines, and what they leave behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import allstep
from allstep import Alone, Engine, Events, faults
from allstep.errors import ConfigurationError
from allstep.faults import FaultPlan, RankPosition
from allstep.faults.inject import FILLER
from allstep.testing import SimulatedRank, simulate


@pytest.fixture(autouse=True)
def may_strike_again():
    faults.forget()
    yield
    faults.forget()


def rehearse(monkeypatch: pytest.MonkeyPatch, plan: FaultPlan) -> None:
    monkeypatch.setenv("ALLSTEP_FAULT", plan.to_text())


def counting() -> tuple[Engine, list[tuple[str, int]]]:
    seen: list[tuple[str, int]] = []
    engine = Engine(lambda engine, batch: seen.append(("step", engine.state.iteration)), coordinator=Alone())
    for event in (Events.GET_BATCH_STARTED, Events.ITERATION_COMPLETED):
        engine.add_event_handler(event, lambda e, name=event.value: seen.append((name, e.state.iteration)))
    return engine, seen


@pytest.mark.parametrize(
    ("when", "last"),
    [("data", ("get_batch_started", 2)), ("step", ("get_batch_started", 2)), ("handler", ("iteration_completed", 3))],
)
def test_a_fault_strikes_in_its_iteration_and_place(monkeypatch, when, last) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, 3, when=when).raise_(KeyError("rehearsed")))
    engine, seen = counting()
    with pytest.raises(KeyError, match="rehearsed"):
        engine.run(range(5))
    assert seen[-1] == last


def test_a_fault_of_another_rank_or_attempt_does_not_strike(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(1, 3).raise_(KeyError()) + FaultPlan.at(0, 3, attempt=1).raise_(KeyError()))
    engine, _ = counting()
    assert engine.run(range(5)).iteration == 5


def test_a_fault_strikes_once_in_a_process(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, 3).raise_(KeyError()))
    engine, seen = counting()
    with pytest.raises(KeyError):
        engine.run(range(5))
    seen.clear()
    engine.run(range(5))
    assert ("step", 3) in seen


def test_an_epoch_alone_means_its_first_iteration(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, epoch=2).raise_(KeyError()))
    engine, _ = counting()
    with pytest.raises(KeyError):
        engine.run(range(5), max_epochs=3)
    assert (engine.state.epoch, engine.state.iteration) == (2, 6)


def test_an_engine_within_anothers_handler_is_not_meant(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, 2).raise_(KeyError()))
    trainer, _ = counting()
    inner, inner_seen = counting()
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: inner.run(range(4)))
    with pytest.raises(KeyError):
        trainer.run(range(5))
    assert ("step", 4) in inner_seen
    assert trainer.state.iteration == 2


def test_a_rank_told_to_leave_returns_and_its_engine_can_run_again(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, 3).leave())
    engine, seen = counting()
    raised: list[BaseException] = []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, exception: raised.append(exception))
    state = engine.run(range(5))
    assert (state.iteration, raised) == (3, [])
    seen.clear()
    assert engine.run(range(5)).iteration == 5


def test_a_suspended_run_meets_its_fault_after_it_was_resumed(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, 4).raise_(KeyError()))
    engine, _ = counting()
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    assert engine.run(range(5)).iteration == 2
    with pytest.raises(KeyError):
        engine.run()
    assert engine.state.iteration == 4


def test_simulated_ranks_are_told_apart(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(1, 3).raise_(KeyError("rank 1")))

    def train(rank: SimulatedRank) -> None:
        Engine(lambda engine, batch: None, coordinator=rank).run(range(5))

    with pytest.raises(KeyError, match="rank 1"):
        simulate(train, 2)


def events_before_steps(engine: Engine | None = None) -> list[object]:
    """The last event that somebody listened to, seen from each of three steps: STARTED where nothing was added."""
    engine = engine or Engine(lambda engine, batch: None, coordinator=Alone())
    seen: list[object] = []
    engine.process_function = lambda engine, batch: seen.append(engine.last_event_name)
    with engine.add_event_handler(Events.STARTED, lambda: None):
        engine.run(range(3))
    return seen


def test_nothing_is_added_to_an_engine_without_a_plan(monkeypatch) -> None:
    monkeypatch.delenv("ALLSTEP_FAULT", raising=False)
    assert events_before_steps() == [Events.STARTED] * 3


def test_the_handlers_of_a_plan_are_taken_off_after_the_run(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, 30).kill(9))
    engine = Engine(lambda engine, batch: None, coordinator=Alone())
    assert events_before_steps(engine) == [Events.GET_BATCH_STARTED] * 3
    monkeypatch.delenv("ALLSTEP_FAULT")
    assert events_before_steps(engine) == [Events.STARTED] * 3


def test_the_batch_is_made_nan_in_every_floating_part(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, 2).nan())
    taken = []
    engine = Engine(lambda engine, batch: taken.append(batch), coordinator=Alone())
    engine.run([{"x": torch.ones(2), "y": (torch.ones(2, dtype=torch.int64), 1.0)} for _ in range(3)])
    assert [bool(batch["x"].isnan().all()) for batch in taken] == [False, True, False]
    assert taken[1]["y"][0].tolist() == [1, 1]
    assert taken[1]["y"][1] != taken[1]["y"][1]


def test_a_batch_without_floating_numbers_cannot_be_made_nan(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, 2).nan())
    with pytest.raises(ConfigurationError, match="no floating-point"):
        counting()[0].run(range(3))


def test_slow_sleeps_in_every_iteration_from_there_on(monkeypatch) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, 3).slow(0.125))
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    counting()[0].run(range(5))
    assert slept == [0.125] * 3


def test_a_plan_that_cannot_be_read_is_an_error_before_the_world_opens(monkeypatch) -> None:
    monkeypatch.setenv("ALLSTEP_FAULT", "rank=1,oops")
    with pytest.raises(ConfigurationError, match="ALLSTEP_FAULT"):
        allstep.init(device="cpu")
    assert allstep.World.current() is None


@pytest.mark.parametrize(("when", "opens"), [("start", False), ("exit", True)])
def test_a_fault_strikes_as_the_world_opens_or_is_left(monkeypatch, when, opens) -> None:
    rehearse(monkeypatch, FaultPlan.at(0, when=when).raise_(KeyError("rehearsed")))
    opened = False
    with pytest.raises(KeyError, match="rehearsed"), allstep.init(device="cpu"):
        opened = True
    assert opened is opens
    assert allstep.World.current() is None


def struck_alone(plan: FaultPlan, *, before: str = "") -> subprocess.CompletedProcess[str]:
    """A process of its own, which says "through" where the fault lets it live."""
    asks = "faults.strike(faults.RankPosition('step', 1, iteration=7))"
    text = f"from allstep import faults\n{before}\n{asks}\nprint('through')"
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, **plan.to_environ()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


HERE = FaultPlan.at(rank=1, iteration=7)


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        (HERE.kill(9), -signal.SIGKILL),
        (HERE.kill(signal.SIGTERM), -signal.SIGTERM),
        (HERE.segfault(), -signal.SIGSEGV),
        (HERE.abort(), -signal.SIGABRT),
        (HERE.exit(3), 3),
        (HERE.exit(0), 0),
        (HERE.raise_(RuntimeError("x")), 1),
    ],
    ids=lambda value: value.to_text() if isinstance(value, FaultPlan) else "",
)
def test_kinds_that_end_a_process_end_it_so_and_say_so_first(plan: FaultPlan, code: int) -> None:
    ended = struck_alone(plan)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith(
        f"allstep: a rehearsed fault strikes rank 1, epoch 0, iteration 7 (step): {plan.to_text()}\n"
    )


def test_a_signal_can_be_ignored() -> None:
    ended = struck_alone(HERE.ignore(signal.SIGTERM) + HERE.kill(signal.SIGTERM))
    assert (ended.returncode, ended.stdout) == (0, "through\n")


def test_memory_is_taken_until_the_limit_says_no() -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))"
    assert "MemoryError" in struck_alone(HERE.allocate(2**31), before=limit).stderr
    assert struck_alone(HERE.allocate(2**20), before=limit).stdout == "through\n"


def test_a_large_disk_is_never_filled(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**31))
    rehearse(monkeypatch, FaultPlan.at(0).fill_disk(str(tmp_path)))
    with pytest.raises(ConfigurationError, match=r"2\.0 GiB are free"):
        faults.strike(RankPosition("step", 0))
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_filled_to_the_last_byte(tmp_path: Path, monkeypatch) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(tmp_path), b"tmpfs", 0, b"size=1m"):
        pytest.skip(f"a tmpfs cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        rehearse(monkeypatch, FaultPlan.at(0).fill_disk(str(tmp_path)))
        faults.strike(RankPosition("step", 0))
        with pytest.raises(OSError, match="No space left"), open(tmp_path / "more", "wb", buffering=0) as file:
            file.write(b"x")
        assert (tmp_path / FILLER).stat().st_size == 2**20
    finally:
        libc.umount2(os.fsencode(tmp_path), 2)


def test_holding_the_interpreter_lock_stops_other_threads(monkeypatch) -> None:
    text = (
        "import threading, time\nfrom allstep import faults\nticks = []\n"
        "def tick():\n    while True:\n        ticks.append(time.monotonic()); time.sleep(0.01)\n"
        "threading.Thread(target=tick, daemon=True).start()\ntime.sleep(0.1)\nbegan = time.monotonic()\n"
        "faults.strike(faults.RankPosition('step', 1, iteration=7))\nended = time.monotonic()\n"
        "print(ended - began >= 0.5, sum(began + 0.05 < tick < ended - 0.05 for tick in ticks))"
    )
    environment = {**os.environ, **HERE.hold_gil(0.5).to_environ()}
    ended = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "True 0\n"


def test_a_frozen_process_is_stopped(tmp_path: Path) -> None:
    text = "from allstep import faults\nfaults.strike(faults.RankPosition('step', 1, iteration=7))\nprint('through')"
    with subprocess.Popen(
        [sys.executable, "-c", text], env={**os.environ, **HERE.freeze().to_environ()}, stdout=subprocess.PIPE
    ) as process:
        stopped, status = os.waitpid(process.pid, os.WUNTRACED)
        assert stopped == process.pid
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60)[0] == b"through\n"


def test_faults_load_neither_torch_nor_numpy() -> None:
    text = "import sys, allstep.faults\nprint(sorted({'torch', 'numpy'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "[]\n"
