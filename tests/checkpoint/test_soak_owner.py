"""Issue 13's proof: whatever dies, fills up or comes in between, a checkpoint of the run is there and it ends the same.

Blows fall at random moments on a small job that saves each iteration and keeps two: kills of a rank, of the one that
saves in the middle of a save, of the launcher, of the sidecar, and of all at once; a disk that is full for a while; a
second job in the same folder. A thread looks all the time whether some checkpoint is whole.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from allstep.checkpoint import Store, entries, verify
from allstep.checkpoint.retention import Lineage
from allstep.testing import run_ranks
from allstep.world import World
from tests.checkpoint.training import Job, Run
from tests.jobs.launchers import ALLSTEP, ROOT, Launcher, command, script
from tests.jobs.processes import command_of
from tests.jobs.running import Running, run, start
from tests.regression import same

pytestmark = [pytest.mark.slow]

ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
LIMIT_S = 240.0
FINISH_S = 1800.0  # thousands of iterations, on a machine that may be busy

RUNS_THE_JOB = """
import sys
from tests.checkpoint.job import main
main(*sys.argv[1:])
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes where one can be mounted, else a folder, which is never full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(options, capture_output=True, check=False).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Soak:
    """A job that is hurt again and again."""

    def __init__(self, folder: Path, disk: Path, *, iterations: int, ranks: int, kinds: Sequence[str]) -> None:
        self.kinds = kinds
        self.folder, self.disk, self.ranks = folder, disk, ranks
        self.checkpoints, self.out = disk / "c", folder / "out.pt"
        self.random = random.Random(13)
        self.arguments = ["1 iterations", "0.05", "0", str(iterations // 5), "2"]
        self.path = script(folder, RUNS_THE_JOB)
        self.struck: list[str] = []
        self.said: list[str] = []
        self.highest = 0

    def argv(self, launcher: Launcher) -> list[str]:
        arguments = [str(self.checkpoints), str(self.out), *self.arguments]
        if launcher == "torchrun":
            return command("torchrun", self.path, arguments, nproc=self.ranks)
        return [*ALLSTEP, "run", "--nproc", str(self.ranks), "--grace", "5", str(self.path), *arguments]

    def newest(self) -> int:
        """The step of the newest checkpoint that verifies."""
        for entry in reversed(entries(str(self.checkpoints))):
            if entry.manifest is not None and entry.state == "whole" and not verify(entry):
                return entry.manifest.step
        return 0

    def look(self) -> None:
        """Check that what had been saved is there, whole; a listing that a removal came between is made again."""
        for _ in range(100):
            step = self.newest()
            if step >= self.highest:
                self.highest = step
                return
            time.sleep(0.01)  # what was listed is being removed, behind a newer one
        raise AssertionError(f"step {self.highest} was saved, and {step} is the newest that is whole now")

    def keep_looking(self, over: threading.Event) -> None:
        while not over.is_set():
            try:
                self.look()
            except AssertionError as error:
                self.said.append(str(error))
                return
            over.wait(0.2)

    # Blows. Each returns whether the job goes on by itself.

    def kill_a_rank(self, running: Running) -> bool:
        self._kill(self.random.choice(self._ranks(running) or [running.process.pid]))
        return False

    def kill_the_saver(self, running: Running) -> bool:
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline and not list(self.checkpoints.glob("tmp-save-*")):
            time.sleep(0.0005)  # a save tells nobody outside
        for pid in self._ranks(running)[:1]:
            self._kill(pid)
        return False

    def kill_the_launcher(self, running: Running) -> bool:
        self._kill(running.process.pid)
        return False

    def kill_all(self, running: Running) -> bool:
        for pid in running.pids():
            self._kill(pid)
        return False

    def kill_the_sidecar(self, running: Running) -> bool:
        found = [pid for pid in running.pids() if "sidecar_process" in command_of(pid)]
        for pid in found:
            self._kill(pid)
        return True

    def fill_the_disk(self, running: Running) -> bool:
        filler = self.disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while os.path.ismount(self.disk):
                file.write(bytes(64 << 10))
        time.sleep(self.random.random())  # for so long it is full
        filler.unlink(missing_ok=True)
        return True

    def start_a_second(self, running: Running) -> bool:
        second = run(self.folder, *self.argv("allstep")[len(ALLSTEP) + 1 :], env=ENV)
        # Refused, unless the first came to its end meanwhile, by which the second has nothing left to do or goes on.
        assert second.code == 0 or "FolderInUseError" in second.text or running.process.poll() is not None, second.text
        return True

    def _ranks(self, running: Running) -> list[int]:
        return [pid for pid in running.pids() if str(self.out) in command_of(pid) and pid != running.process.pid]

    def _kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    # The job

    def strike(self, blows: int) -> None:
        """Start the job again and again, each time to be hurt once or more, until it has been hurt so often."""
        while len(self.struck) < blows:
            launcher: Launcher = "torchrun" if self.ranks > 1 and self.random.random() < 0.25 else "allstep"
            with start(self.folder, self.argv(launcher), env=ENV) as running:
                goes_on = True
                while goes_on and len(self.struck) < blows:
                    if not self._comes_further(running, self.random.randint(1, 4)):
                        break
                    self.struck.append(self.random.choice(self.kinds))
                    goes_on = getattr(self, self.struck[-1])(running)
                if goes_on and len(self.struck) >= blows:
                    self.kill_all(running)
                job = running.end(leaves=True, limit=LIMIT_S)
                assert job.code != 0, f"it came to its end after {len(self.struck)} blows:\n{job.text}"
            self.look()
            assert not self.said, self.said

    def _comes_further(self, running: Running, by: int) -> bool:
        goal, deadline = self.highest + by, time.monotonic() + LIMIT_S
        while self.highest < goal and running.process.poll() is None:
            assert time.monotonic() < deadline, f"no progress beyond {self.highest}"
            time.sleep(0.01)
            with contextlib.suppress(AssertionError):
                self.look()
        return self.highest >= goal

    def finish(self, folder: Path) -> list[torch.Tensor]:
        """What the job ends with when nothing more happens to it, at full speed."""
        return run_ranks(come_to_the_end, self.ranks, str(folder), int(self.arguments[3]), timeout=FINISH_S)[0]


def come_to_the_end(world: World, folder: str, epochs: int) -> list[torch.Tensor]:
    return Run(world, Job(folder, every="500 iterations", window=1)).go(epochs=epochs).weights()


def soak(folder: Path, disk: Path, *, blows: int, iterations: int, ranks: int, kinds: Sequence[str]) -> Soak:
    soaked = Soak(folder, disk, iterations=iterations, ranks=ranks, kinds=kinds)
    over = threading.Event()
    looks = threading.Thread(target=soaked.keep_looking, args=(over,))
    looks.start()
    try:
        soaked.strike(blows)
    finally:
        over.set()
        looks.join()
    assert not soaked.said, soaked.said
    weights = soaked.finish(soaked.checkpoints)
    left = [entry for entry in entries(str(soaked.checkpoints)) if entry.state == "whole" and entry.manifest]
    assert 1 <= len(left) <= 3
    store = Store(str(soaked.checkpoints))
    found = store.choose()
    assert found is not None
    lineage = Lineage.of(store.folder, found.name, found.manifest, store.folder, found.manifest.order + 1)
    assert all(lineage.has(entry.manifest) for entry in left if entry.manifest is not None)
    assert same(weights, soaked.finish(folder / "unbroken"))
    return soaked


BLOWS = (
    *("kill_a_rank", "kill_the_saver", "kill_the_launcher", "kill_all", "kill_the_sidecar"),
    *("fill_the_disk", "start_a_second"),
)


@pytest.mark.timeout(300)
@pytest.mark.nightly
def test_two_blows_cost_no_checkpoint_and_change_nothing(tmp_path: Path, small_disk: Path) -> None:
    soak(tmp_path, small_disk, blows=2, iterations=400, ranks=1, kinds=["kill_the_saver"])


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_two_hundred_blows_cost_no_checkpoint_and_change_nothing(tmp_path: Path, small_disk: Path) -> None:
    soaked = soak(tmp_path, small_disk, blows=200, iterations=20_000, ranks=2, kinds=BLOWS)
    assert set(soaked.struck) == set(BLOWS)
