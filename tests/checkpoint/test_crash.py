"""Killed at any moment of a save, a run finds its newest committed checkpoint whole.

`Deadly` counts the moments: before and after each operation that changes the folder, and in the middle of each file.
The sweep goes over all of them, in saves that also remove an old checkpoint.
"""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest

from allstep.checkpoint import Store, entries, verify
from allstep.testing import RanksError, run_ranks
from allstep.world import World
from tests.checkpoint.storages import Deadly, some_state
from tests.regression import same

pytestmark = pytest.mark.slow

SAVES = 3


def save_until_dead(folder: str, moment: int) -> None:
    """Save with seeds 1, 2, 3; the one that dies does so in the third, which also removes the first."""
    calm = Store(folder, keep_last=2)
    for step in range(1, SAVES):
        assert calm.save(step, some_state(step)).wait()
    storage = Deadly(folder, moment)
    going_on(Store("", storage=storage, keep_last=2)).save(SAVES, some_state(SAVES)).wait()
    assert storage.survived


def going_on(store: Store) -> Store:
    """From the newest checkpoint, so that the ones before it are of the store's own lineage."""
    found = store.choose()
    assert found is not None
    store.load(found)
    return store


def check(folder: Path) -> int:
    """The step of the checkpoint that a new run resumes from, which is whole; nothing else than whole ones is left."""
    store = Store(str(folder))
    store.claim()
    found = store.choose()
    assert found is not None
    assert found.passed_over == ()
    assert same(store.load(found).state["model"], some_state(found.manifest.step)["model"])
    left = entries(str(folder))
    assert [entry.state for entry in left] == ["whole"] * len(left)
    assert [verify(entry) for entry in left] == [[]] * len(left)
    assert store.save(9, some_state(9)).wait()  # and the folder can be used
    return found.manifest.step


# make: 2; the tensors' file, of two blocks: 4; three more files: 3 each; settling twice: 1 each; rename: 2;
# then the removal: 2 for another rename, and one for each of four files
RENAMED = 2 + 4 + 3 * 3 + 2
MOMENTS = range(RENAMED + 1 + 1 + 2 + 4)


def killed_at(folder: Path, moment: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "allstep.checkpoint"])
    process = context.Process(target=save_until_dead, args=(str(folder), moment))
    process.start()
    try:
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"moment {moment} is not in a save: {process.exitcode}"
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("moment", [8, 17, 18])
def test_killed_alone_at_a_moment_the_newest_committed_checkpoint_is_whole(moment: int, tmp_path: Path) -> None:
    killed_at(tmp_path, moment)
    assert check(tmp_path) == (SAVES if moment > RENAMED else SAVES - 1)


def save_with_a_deadly_rank(world: World, folder: Path, moment: int, who: int) -> None:
    calm = Store(str(folder), keep_last=2)
    for step in range(1, SAVES):
        assert calm.save(step, some_state(step)).wait()
    storage = Deadly(str(folder), moment) if world.rank == who else None
    going_on(Store(str(folder), storage=storage, keep_last=2)).save(SAVES, some_state(SAVES)).wait()
    signal.pause()  # the one that dies is to be the first to end


def killed_among_two(folder: Path, moment: int, who: int) -> int:
    with pytest.raises(RanksError, match=f"rank {who} of 2 died with exit code -9"):
        run_ranks(save_with_a_deadly_rank, 2, folder, moment, who)
    return check(folder)


@pytest.mark.parametrize(("who", "moment"), [(0, 8), (0, 15), (0, 18), (1, 2)])
def test_killed_among_two_ranks_the_newest_committed_checkpoint_is_whole(who: int, moment: int, tmp_path: Path) -> None:
    assert killed_among_two(tmp_path, moment, who) == (SAVES if moment > RENAMED else SAVES - 1)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("round_", range(3))
def test_killed_at_every_moment(round_: int, tmp_path: Path) -> None:
    for moment in MOMENTS:
        folder = tmp_path / f"alone-{moment}"
        killed_at(folder, moment)
        assert check(folder) == (SAVES if moment > RENAMED else SAVES - 1), moment


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("who", [0, 1])
def test_killed_among_two_ranks_at_every_moment(who: int, tmp_path: Path) -> None:
    for moment in MOMENTS if who == 0 else range(7):
        step = killed_among_two(tmp_path / str(moment), moment, who)
        assert step == (SAVES if who == 0 and moment > RENAMED else SAVES - 1), moment
