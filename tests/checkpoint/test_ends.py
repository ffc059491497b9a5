"""Issue 13 A5, A6 and A8: a script's end waits for its save, and one that could not save does not end well."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from allstep import Engine, Events, Preemption
from allstep.checkpoint import Checkpoint, LocalStorage, Store
from allstep.errors import CheckpointError, Preempted
from allstep.exit_codes import PREEMPTED
from allstep.testing import RanksError, run_ranks
from allstep.world import World
from tests.checkpoint.storages import Failing, listed, some_state, states
from tests.jobs.forked import Script, run_forked
from tests.jobs.job import Job
from tests.jobs.launchers import ROOT, script
from tests.jobs.running import run

ENV = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}

SLOW = """
import sys, time, signal, os, torch
from allstep.checkpoint import LocalStorage, Store
import allstep.checkpoint.pending_save as pending_save

class Slow(LocalStorage):
    def write(self, folder, name, blocks):
        time.sleep(float(sys.argv[1]))
        super().write(folder, name, blocks)

pending_save._FIRST_WORD_S = 0.2
pending_save.AT_FAILURE_S = 0.5
if __name__ == "__main__":
    store = Store("", storage=Slow("c"))
    store.save(7, {"a": {"w": torch.zeros(3)}})
"""


def plain(folder: Path, text: str, *arguments: str) -> Job:
    path = script(folder, text)
    return run(folder, str(path), *arguments, command=[sys.executable], env=ENV)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """What came of scripts that end behind a save, which is slow or fails."""
    folder = tmp_path_factory.mktemp("ended")
    failing = SLOW.replace("super().write(folder, name, blocks)", "raise OSError(28, 'No space left on device')")
    texts = {"slow": (SLOW, "0.5"), "failing": (failing, "0")}
    scripts = [
        Script(script(folder, text.replace('Slow("c")', f'Slow("{name}")'), f"{name}.py"), [seconds])
        for name, (text, seconds) in texts.items()
    ]
    return dict(zip(texts, run_forked(folder, *scripts, env=ENV), strict=True))


@pytest.mark.slow
def test_a_script_that_ends_waits_for_its_save_and_says_so(ended: dict[str, Job]) -> None:
    check_saved(ended["slow"], "slow")


@pytest.mark.nightly
def test_a_script_that_ends_waits_longer_than_for_anything_else(tmp_path: Path) -> None:
    # Four files of 3 s each: longer than the 10 s after which it used to be given up.
    check_saved(plain(tmp_path, SLOW, "3"), "c")


def check_saved(job: Job, folder: str) -> None:
    assert job.code == 0
    assert "the script has ended; waiting for the save of step 7 to be written" in job.err
    assert list(states(job.folder / folder).values()) == ["whole"]


@pytest.mark.nightly
def test_a_script_that_raises_says_what_was_not_saved(tmp_path: Path) -> None:
    job = plain(tmp_path, SLOW + "    raise ValueError('bad batch')\n", "30")
    assert job.code == 1
    assert "step 7 was not saved: the script has ended before it was written" in job.err


@pytest.mark.nightly
def test_an_interrupted_end_says_so_and_is_not_0(tmp_path: Path) -> None:
    import tests.jobs.running as running

    path = script(tmp_path, SLOW)
    with running.start(tmp_path, [sys.executable, path, "60"], env=ENV) as job:
        job.await_line("waiting for the save of step 7")
        os.kill(job.process.pid, signal.SIGINT)
        ended = job.end()
    assert ended.code == 1
    assert "step 7 was not saved: interrupted while it was written" in ended.err


def test_an_end_whose_save_fails_is_not_0(ended: dict[str, Job]) -> None:
    job = ended["failing"]
    assert job.code == 1
    assert "step 7 was not saved" in job.err
    assert "no inodes for new files" in job.err


@pytest.mark.nightly
def test_a_fork_of_a_script_does_not_wait_for_its_save(tmp_path: Path) -> None:
    forks = (
        SLOW
        + "    if os.fork() == 0:\n        sys.exit(0)\n    status = os.wait()[1]\n    assert status == 0, status\n"
    )
    job = plain(tmp_path, forks, "0.2")
    assert job.code == 0, job.err
    assert list(states(tmp_path / "c").values()) == ["whole"]


class Slow(LocalStorage):
    """Takes its time before each file."""

    def write(self, folder: str, name: str, blocks: Any) -> None:
        import time

        time.sleep(0.3)
        super().write(folder, name, blocks)


def save_and_leave(world: World, folder: Path, how: str) -> None:
    store = Store("", storage=Slow(str(folder)))
    pending = store.save(1, some_state())
    if how == "close":
        world.close()
        assert pending.done()
        assert pending.committed, pending.error


@pytest.mark.slow
@pytest.mark.parametrize("how", ["close", "return"])
def test_ranks_that_leave_the_world_right_behind_a_save_have_saved(how: str, tmp_path: Path) -> None:
    run_ranks(save_and_leave, 2, tmp_path, how)
    assert list(states(tmp_path).values()) == ["whole"]


def lose_the_group_behind_the_rename(world: World, folder: Path) -> tuple[bool, str]:
    class Leaving(LocalStorage):
        def rename(self, old: str, final: str) -> None:
            super().rename(old, final)
            dist.destroy_process_group()

    storage = Leaving(str(folder)) if world.rank == 0 else None
    pending = Store(str(folder), storage=storage).save(1, some_state())
    saved = pending.wait()
    return saved, str(pending.error)


@pytest.mark.slow
def test_what_goes_wrong_behind_the_rename_is_no_failed_save(tmp_path: Path) -> None:
    try:
        said = run_ranks(lose_the_group_behind_the_rename, 2, tmp_path)
    except RanksError as error:  # the ranks cannot say so any more, where the group took their channel with it
        pytest.fail(str(error))
    assert said == [(True, "None")] * 2
    assert list(states(tmp_path).values()) == ["whole"]


def preempted(folder: Path, storage: LocalStorage, **options: Any) -> tuple[Engine, Checkpoint]:
    engine = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint(Store("", storage=storage), {"engine": engine}, **options).attach(engine)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    def signalled() -> None:
        signal.raise_signal(signal.SIGTERM)

    return engine, checkpoint


def test_a_preemption_that_could_not_save_is_a_failure_with_its_own_message(tmp_path: Path) -> None:
    engine, _ = preempted(tmp_path, Failing(str(tmp_path), "state.json"), every=None)
    with (
        Preemption().attach(engine),
        pytest.raises(
            CheckpointError, match=r"preempted at iteration \d and that place was not saved: .*the disk is on fire"
        ),
    ):
        engine.run([0] * 10)
    assert listed(tmp_path) == []


def test_a_preemption_that_could_not_save_is_none_though_earlier_saves_are(tmp_path: Path) -> None:
    storage = Failing(str(tmp_path), "state.json")
    storage.failing = False
    engine, checkpoint = preempted(tmp_path, storage, every=2)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    def fill_the_disk() -> None:
        checkpoint.store.wait()
        storage.failing = True

    with Preemption().attach(engine), pytest.raises(CheckpointError, match="was not saved"):
        engine.run([0] * 10)
    assert listed(tmp_path) == ["save-000001-step-2"]  # and another start would come no further


def test_a_preemption_that_saved_is_one(tmp_path: Path) -> None:
    engine, _ = preempted(tmp_path, LocalStorage(str(tmp_path)), every=None)
    with Preemption().attach(engine), pytest.raises(Preempted):
        engine.run([0] * 10)
    assert len(listed(tmp_path)) == 1


UNSAVED = """
import signal, sys, torch
import allstep
from allstep import Checkpoint, Engine, Events, Preemption
from allstep.checkpoint import Store
from tests.checkpoint.storages import Failing

with allstep.init() as world:
    engine = Engine(lambda engine, batch: None)
    Checkpoint(Store("", storage=Failing("c", "state.json")), {"engine": engine}).attach(engine)
    Preemption().attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: signal.raise_signal(signal.SIGTERM))
    engine.run([0] * 1000)
"""


@pytest.mark.slow
def test_an_unsaved_preemption_does_not_end_with_85(tmp_path: Path) -> None:
    job = run(tmp_path, "--nproc", "2", str(script(tmp_path, UNSAVED)), env=ENV)
    assert job.code == 1 != PREEMPTED
    assert "that place was not saved" in job.text
