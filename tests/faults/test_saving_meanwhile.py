"""Row 43 of the fault matrix: training goes on while a slow disk is written to, with one save under way at a time.

And what becomes of a save under way when a rank raises.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from allstep import Engine, Events
from allstep.checkpoint import Checkpoint, LocalStorage, PendingSave, Store, entries
from allstep.testing import run_ranks
from tests.checkpoint.training import Job, Run
from tests.jobs.launchers import ROOT, script
from tests.jobs.running import run
from tests.regression import same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


class SlowStorage(LocalStorage):
    """Writes that take their time; `most` is how many folders were written to at once."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.open_folders: set[str] = set()
        self.most = 0
        self.lock = threading.Lock()

    def write(self, folder: str, name: str, blocks: Any) -> None:
        with self.lock:
            self.open_folders.add(folder)
            self.most = max(self.most, len(self.open_folders))
        time.sleep(0.1)  # the slow writer
        super().write(folder, name, blocks)
        with self.lock:
            self.open_folders.discard(folder)


class RecordingStore(Store):
    """Knows whether a save is under way."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.saves: list[PendingSave] = []

    def save(self, *args: Any, **options: Any) -> PendingSave:
        self.saves.append(super().save(*args, **options))
        return self.saves[-1]

    def is_under_way(self) -> bool:
        return not all(each.done() for each in self.saves)


def train_with_a_slow_disk(world, folder, busy):
    run = Run(world, Job(folder, every=None))
    storage = SlowStorage(folder)
    store = RecordingStore(folder, storage=storage, busy=busy, keep_last=None)
    objects = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler, "engine": run.engine}
    Checkpoint(store, objects, every=1).attach(run.engine)
    during: list[bool] = []

    def look(engine: Engine) -> None:
        during.append(store.is_under_way())

    run.engine.add_event_handler(Events.ITERATION_STARTED, look)
    run.engine.run(run.data, max_epochs=3)
    return storage.most, sum(during), len(store.choose().manifest.files) > 0, run.weights()


def unbroken(world, folder):
    return Run(world, Job(folder, every=None)).go().weights()


@pytest.mark.parametrize("busy", ["wait", "skip"])
def test_one_save_is_under_way_and_training_goes_on_to_the_same_end(tmp_path, busy):
    results = run_ranks(train_with_a_slow_disk, 2, str(tmp_path / "slow"), busy, timeout=150)
    expected = run_ranks(unbroken, 2, str(tmp_path / "unbroken"))
    for (most, during, whole, weights), other in zip(results, expected, strict=True):
        assert most <= 1
        assert during >= 3
        assert whole
        assert same(weights, other)


RAISES = """
import torch
import allstep
from allstep import Engine
from allstep.checkpoint import Checkpoint, Store
from tests.faults.test_saving_meanwhile import SlowStorage

def step(engine, batch):
    world.all_reduce(1.0)
    if rank == 1 and engine.state.iteration == 3:
        raise ZeroDivisionError("in the step")

with allstep.init() as world:
    model = torch.nn.Linear(2, 2)
    engine = Engine(step)
    store = Store("", storage=SlowStorage("checkpoints"))
    Checkpoint(store, {"model": model, "engine": engine}, every=2).attach(engine)
    engine.run([1] * 6)
"""


def test_a_save_under_way_is_committed_when_one_rank_raises(tmp_path):
    done = run(tmp_path, "--nproc", "2", script(tmp_path, RAISES), env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"})
    assert done.code == 1, done.text
    assert "ZeroDivisionError: in the step" in done.text
    assert [(each.state, each.manifest.step) for each in entries(str(tmp_path / "checkpoints"))] == [("whole", 2)]
