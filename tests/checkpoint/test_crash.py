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
from tests.checkpoint.folders import Deadly, same, some_state

pytestmark = pytest.mark.slow

SAVES = 3


def save_until_dead(folder: str, moment: int) -> None:
    """Save with seeds 1, 2, 3; the one that dies does so in the third, which also removes the first."""
    calm = Store(folder, keep_last=2)
    for step in range(1, SAVES):
        assert calm.save(step, some_state(step)).wait()
    storage = Deadly(folder, moment)
    Store("", storage=storage, keep_last=2).save(SAVES, some_state(SAVES)).wait()
    assert storage.survived


def check(folder: Path) -> int:
    """The step of the checkpoint that a new run resumes from, which is whole; nothing else than whole ones is left."""
    store = Store(str(folder))
    found = store.choose()
    assert found is not None
    assert found.passed_over == ()
    assert same(store.load(found).state["model"], some_state(found.manifest.step)["model"])
    left = entries(str(folder))
    assert [entry.state for entry in left] == ["whole"] * len(left)
    assert [verify(entry) for entry in left] == [[]] * len(left)
    assert store.save(9, some_state(9)).wait()  # and the folder can be used
    return found.manifest.step


def moments() -> range:
    """Those of one save with a removal: 2 in make, 3 in each of 4 files, 2 to settle, 2 in rename, then the removal."""
    return range(2 + 4 * 3 + 2 + 2 + 2 + 4)


def killed_at(folder: Path, moment: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["allstep.testing.preload"])
    process = context.Process(target=save_until_dead, args=(str(folder), moment))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, f"moment {moment} is not in a save: {process.exitcode}"


@pytest.mark.parametrize("moment", [*range(0, 18, 3), 16, 17, 20])
def test_killed_alone_at_a_moment_the_newest_committed_checkpoint_is_whole(moment: int, tmp_path: Path) -> None:
    killed_at(tmp_path, moment)
    assert check(tmp_path) == (SAVES if moment > 16 else SAVES - 1)


def save_with_a_deadly_rank(world: World, folder: Path, moment: int, who: int) -> None:
    calm = Store(str(folder), keep_last=2)
    for step in range(1, SAVES):
        assert calm.save(step, some_state(step)).wait()
    storage = Deadly(str(folder), moment) if world.rank == who else None
    Store(str(folder), storage=storage, keep_last=2).save(SAVES, some_state(SAVES)).wait()
    world.barrier()


def killed_among_two(folder: Path, moment: int, who: int) -> int:
    with pytest.raises(RanksError, match=f"rank {who} of 2 died with exit code -9"):
        run_ranks(save_with_a_deadly_rank, 2, folder, moment, who)
    return check(folder)


@pytest.mark.parametrize(("who", "moment"), [(0, 4), (0, 12), (0, 17), (1, 2)])
def test_killed_among_two_ranks_the_newest_committed_checkpoint_is_whole(who: int, moment: int, tmp_path: Path) -> None:
    assert killed_among_two(tmp_path, moment, who) == (SAVES if moment > 16 else SAVES - 1)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("round_", range(3))
def test_killed_at_every_moment(round_: int, tmp_path: Path) -> None:
    for moment in moments():
        folder = tmp_path / f"alone-{moment}"
        killed_at(folder, moment)
        assert check(folder) == (SAVES if moment > 16 else SAVES - 1), moment


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("who", [0, 1])
def test_killed_among_two_ranks_at_every_moment(who: int, tmp_path: Path) -> None:
    for moment in range(len(moments()) if who == 0 else 6):
        step = killed_among_two(tmp_path / str(moment), moment, who)
        assert step == (SAVES if who == 0 and moment > 16 else SAVES - 1), moment
