"""SIGUSR1 around a World, in a process that no launcher prepared: kept for the handler that comes, and given back."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

import allstep
from allstep.exit_codes import PREEMPTED
from allstep.world.early_signals import EarlySignals
from tests.jobs.forked import Script, run_forked
from tests.jobs.launchers import script

SCRIPT = """
import signal
send = lambda: os.kill(os.getpid(), signal.SIGUSR1)
import allstep
if "before" in sys.argv: send()
with allstep.init():
    if "between" in sys.argv: send()
    engine = allstep.Engine(lambda engine, batch: None)
    if "handled" in sys.argv: allstep.Preemption().attach(engine)
    engine.run(range(3))
    print(engine.state.iteration, engine.state.stop_reason, flush=True)
if "after" in sys.argv: send()
"""


@pytest.mark.slow
def test_sigusr1_ends_a_process_only_before_init_and_after_the_world(tmp_path: Path) -> None:
    expected = {
        "before": (-signal.SIGUSR1, ""),
        "between handled": (PREEMPTED, ""),
        "between": (0, "3 None\n"),
        "after": (-signal.SIGUSR1, "3 None\n"),
    }
    path = script(tmp_path, SCRIPT)
    jobs = run_forked(tmp_path, *(Script(path, when.split()) for when in expected))
    assert {when: (job.code, job.out) for when, job in zip(expected, jobs, strict=True)} == expected


def test_the_handler_stays_only_while_a_world_is_open() -> None:
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    with allstep.init():
        assert isinstance(signal.getsignal(signal.SIGUSR1), EarlySignals)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    with pytest.raises(allstep.AllstepError):
        allstep.init(device="nowhere")
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_handler_that_is_there_stays_and_so_does_one_that_comes() -> None:
    def mine(number: int, frame: object) -> None:
        pass

    signal.signal(signal.SIGUSR1, mine)
    try:
        with allstep.init():
            assert signal.getsignal(signal.SIGUSR1) is mine
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        with allstep.init():
            signal.signal(signal.SIGUSR1, mine)
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_another_thread_opens_a_world_without_touching_signals() -> None:
    seen: list[object] = []

    def open_one() -> None:
        with allstep.init():
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=open_one)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
