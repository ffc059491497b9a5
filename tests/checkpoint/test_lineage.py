"""Issue 13 A3: a run removes only saves that its own state came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep import Engine
from allstep.checkpoint import Checkpoint, Manifest, Store, entries
from allstep.checkpoint.manifest import Branch
from allstep.checkpoint.retention import Lineage
from tests.checkpoint.storages import some_state
from tests.checkpoint.test_hostile_files import forge


def steps(folder: Path) -> list[int]:
    return [entry.manifest.step for entry in entries(str(folder)) if entry.manifest is not None]


def save(store: Store, *several: int) -> None:
    for step in several:
        pending = store.save(step, some_state(step))
        assert pending.wait(), pending.error


def resumed(folder: Path, at: str = "auto", keep_last: int = 2) -> Store:
    store = Store(str(folder), keep_last=keep_last)
    store.resume(at=at)
    return store


def test_a_run_that_begins_anew_keeps_all_of_the_run_before(tmp_path: Path) -> None:
    save(resumed(tmp_path), 1, 2)
    save(resumed(tmp_path, "none"), 1, 2, 3, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert [entry.name for entry in entries(str(tmp_path))][:2] == ["save-000001-step-1", "save-000002-step-2"]


def test_a_script_that_asks_for_none_keeps_the_old_checkpoints(tmp_path: Path) -> None:
    for at, iterations in (("auto", 3), ("none", 9)):
        engine = Engine(lambda engine, batch: None)
        checkpoint = Checkpoint(tmp_path, {"engine": engine}, every=1, keep_last=1).attach(engine)
        checkpoint.resume(at)
        engine.run([0] * iterations)
        checkpoint.close()
    assert steps(tmp_path) == [3, 9]


def test_a_run_that_goes_on_removes_what_it_came_from(tmp_path: Path) -> None:
    save(resumed(tmp_path), 1, 2)
    for step in (3, 4, 5):
        save(resumed(tmp_path), step)
    assert steps(tmp_path) == [4, 5]


def test_what_was_left_aside_stays_and_the_way_to_it_is_cleared(tmp_path: Path) -> None:
    save(resumed(tmp_path, keep_last=9), 1, 2, 3, 4)
    save(resumed(tmp_path, str(tmp_path / "save-000002-step-2")), 5, 6, 7)
    assert steps(tmp_path) == [3, 4, 6, 7]
    save(resumed(tmp_path), 8)  # a restart
    assert steps(tmp_path) == [3, 4, 7, 8]


def test_saves_of_the_format_before_belong_to_who_goes_on_from_them(tmp_path: Path) -> None:
    save(resumed(tmp_path, keep_last=9), 1, 2, 3)
    for folder in tmp_path.glob("save-*"):
        forge(folder, format=1, lineage=[], parent=None)
    save(resumed(tmp_path, str(tmp_path / "save-000002-step-2")), 4, 5)
    assert steps(tmp_path) == [3, 4, 5]


def test_each_save_says_which_it_came_from(tmp_path: Path) -> None:
    save(resumed(tmp_path / "old"), 1)
    store = resumed(tmp_path / "new", str(tmp_path / "old"), keep_last=9)
    save(store, 2, 3)
    save(resumed(tmp_path / "new", keep_last=9), 4)
    parents = [entry.manifest.parent for entry in entries(str(tmp_path / "new")) if entry.manifest]
    old = str(tmp_path / "old" / "save-000001-step-1")
    assert parents == [old, "save-000001-step-2", "save-000002-step-3"]


def test_a_folder_that_was_gone_on_from_loses_nothing(tmp_path: Path) -> None:
    save(resumed(tmp_path / "old"), 1)
    save(resumed(tmp_path / "new", str(tmp_path / "old"), keep_last=1), 2, 3, 4)
    assert steps(tmp_path / "old") == [1]
    assert steps(tmp_path / "new") == [4]


def manifest(order: int, *lineage: tuple[str, int]) -> Manifest:
    return Manifest(
        format=2,
        order=order,
        step=order,
        world_size=1,
        created=0.0,
        versions={},
        metrics={},
        facts={},
        files={},
        lineage=tuple(Branch(id=line, through=through) for line, through in lineage),
    )


def test_restarts_that_go_on_from_the_newest_add_nothing_to_a_lineage() -> None:
    lineage = Lineage.new()
    for order in range(1, 1000):
        lineage = Lineage.of(
            "/r", f"save-{order}", manifest(order, *((b.id, b.through) for b in lineage.at(order))), "/r", order + 1
        )
    assert len(lineage.at(1000)) == 1


@pytest.mark.parametrize(
    ("saved", "is_own"),
    [
        (manifest(3, ("a", 3)), True),
        (manifest(5, ("a", 5)), True),
        (manifest(6, ("a", 6)), False),
        (manifest(9, ("a", 5), ("b", 9)), True),
        (manifest(10, ("a", 5), ("b", 10)), False),
        (manifest(99, ("a", 5), ("b", 9), ("c", 99)), True),
        (manifest(3, ("e", 3)), False),
        (manifest(3), False),
    ],
)
def test_a_save_belongs_up_to_where_its_line_was_left(saved: Manifest, is_own: bool) -> None:
    lineage = Lineage(None, (Branch(id="a", through=5), Branch(id="b", through=9)), "c")
    assert lineage.has(saved) is is_own
