"""What is around a rehearsed script, in this process: where it ends, where it saves, and what its digests tell."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from allstep import Checkpoint, Engine, Events
from allstep.checkpoint.store import Store
from allstep.rehearsal.digests import digest, digests_of, find_objects, samples_digest
from allstep.rehearsal.iteration_trace import StartOrder, read_traces
from allstep.rehearsal.script_watch import ScriptWatch
from allstep.rehearsal.tensor_comparison import compare_runs, distance
from allstep.tracking import Track


class Training:
    """A model, its optimizer and an engine, made anew."""

    def __init__(self, scale: float = 1.0) -> None:
        torch.manual_seed(4)
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1 * scale, momentum=0.5)
        self.trainer = Engine(self.step)
        self.data = [torch.full((2, 3), at / 10) for at in range(6)]
        self.epochs: list[int] = []
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.epochs.append(self.trainer.state.epoch))

    def step(self, engine: Engine, batch: torch.Tensor) -> None:
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self) -> None:
        self.trainer.run(self.data, max_epochs=3)


def watched(folder: Path, name: str, *, last: int | None, scale: float = 1.0, checkpoint: bool = True) -> Training:
    """A training under a watch; with `last` it is ended there."""
    watch = ScriptWatch(StartOrder(str(folder / name), last), start=0, rank=0)
    training = Training(scale)
    with watch.in_place():
        if checkpoint:
            Checkpoint(folder / "saved", every=3).attach(training.trainer).resume()
        if last is None:
            training.run()
        else:
            with pytest.raises(SystemExit) as ended:
                training.run()
            assert ended.value.code == 0
    return training


def test_a_run_ends_after_its_iterations_and_is_saved_there(tmp_path: Path) -> None:
    training = watched(tmp_path, "run", last=8)
    assert training.trainer.state.iteration == 8
    assert training.trainer.state.max_epochs == 3  # as a schedule over the whole run sees it
    assert training.epochs == [1]
    found = read_traces(tmp_path / "run", 0)
    assert (found.went_on_at, found.reached, found.main.ended_at) == (0, 8, 8)
    assert not found.main.is_complete
    assert found.main.places == [str(tmp_path / "saved")]
    # The script's own folder is left alone.
    assert not (tmp_path / "saved").exists()
    (place,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert place.name.startswith("saved-")


def test_a_run_that_is_shorter_ends_by_itself(tmp_path: Path) -> None:
    watched(tmp_path, "run", last=None)
    assert read_traces(tmp_path / "run", 0).main.is_complete


def test_without_a_checkpoint_the_outermost_engine_is_the_one_that_trains(tmp_path: Path) -> None:
    training = watched(tmp_path, "run", last=4, checkpoint=False)
    assert training.trainer.state.iteration == 4
    assert read_traces(tmp_path / "run", 0).main.places == []


def test_afterwards_nothing_is_left_around_the_script(tmp_path: Path) -> None:
    before = Engine.run, Checkpoint.attach, Store.__init__, Store.choose, Track.__init__
    watched(tmp_path, "run", last=2)
    assert (Engine.run, Checkpoint.attach, Store.__init__, Store.choose, Track.__init__) == before


def test_tracks_go_to_the_rehearsals_folder_and_to_no_tool(tmp_path: Path) -> None:
    with ScriptWatch(StartOrder(str(tmp_path / "run")), start=0, rank=0).in_place():
        track = Track(tmp_path / "tracks", to=["csv"], every=1)
    assert track.folder.is_relative_to(tmp_path / "run" / "tracks")
    training = Training()
    track.attach(training.trainer)
    training.run()
    assert track.journal.exists()
    assert not list(track.folder.glob("*.csv"))


def test_a_script_that_names_its_own_folder_goes_on_in_the_rehearsals(tmp_path: Path) -> None:
    watched(tmp_path, "run", last=4)
    training = Training()
    with ScriptWatch(StartOrder(str(tmp_path / "run")), start=1, rank=0).in_place():
        loaded = Checkpoint(tmp_path / "other").attach(training.trainer).resume(tmp_path / "saved")
    assert loaded is not None
    assert loaded.manifest.step == 4


# Comparison


def test_the_same_run_twice_has_the_same_bits(tmp_path: Path) -> None:
    watched(tmp_path, "one", last=7)
    watched(tmp_path, "two", last=7)
    found = compare_runs(tmp_path / "one", tmp_path / "two")
    assert found is not None
    assert found.is_exact
    assert found.tensors == 4
    assert found.numbers == 2 * (3 + 1)


def test_another_run_differs_where_it_does_and_by_how_much(tmp_path: Path) -> None:
    one = watched(tmp_path, "one", last=7)
    two = watched(tmp_path, "two", last=7, scale=1.5)
    found = compare_runs(tmp_path / "one", tmp_path / "two")
    assert found is not None
    largest = {each.name: each.largest for each in found.differences}
    weight = max((name for name in largest if "weight" in name), key=len)
    expected = (one.model.weight - two.model.weight).abs().max().item()
    assert largest[weight] == pytest.approx(expected)


def test_runs_that_stopped_elsewhere_are_not_the_same(tmp_path: Path) -> None:
    watched(tmp_path, "one", last=7)
    watched(tmp_path, "two", last=8)
    found = compare_runs(tmp_path / "one", tmp_path / "two")
    assert found is not None
    assert found.steps == (7, 8)
    assert not found.is_exact
    assert found.relative == float("inf")


def test_a_run_that_saved_nothing_cannot_be_compared(tmp_path: Path) -> None:
    watched(tmp_path, "one", last=3)
    watched(tmp_path, "two", last=3, checkpoint=False)
    assert compare_runs(tmp_path / "one", tmp_path / "two") is None


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ([1.0, -4.0], [1.5, -4.0], (0.5, 0.125)),
        ([0.0], [0.0], (0.0, 0.0)),
        ([float("nan"), 1.0], [float("nan"), 2.0], (1.0, 1.0)),
        ([float("nan")], [1.0], (float("inf"), float("inf"))),
        ([0.0], [1.0], (1.0, float("inf"))),
    ],
)
def test_the_distance_of_two_tensors(one: list[float], two: list[float], expected: tuple[float, float]) -> None:
    assert distance(torch.tensor(one), torch.tensor(two)) == expected


# Digests


def test_each_part_has_a_digest_that_follows_what_it_holds_alone() -> None:
    training = Training()
    scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 1)
    noise = torch.Generator().manual_seed(1)
    keep: dict[str, Any] = {"noise": noise}

    def change_weight() -> None:
        with torch.no_grad():
            training.model.weight.add_(1)

    def change_moments() -> None:
        training.optimizer.state[training.model.weight]["momentum_buffer"] = torch.ones(1, 3)

    def change_rate() -> None:
        training.optimizer.param_groups[0]["lr"] = 7.0

    def change_schedule() -> None:
        scheduler.last_epoch += 1

    held = find_objects()
    changes = {
        "parameters": change_weight,
        "optimizers": change_moments,
        "options": change_rate,
        "schedulers": change_schedule,
        "generators": random.random,
        "own generators": lambda: torch.rand(1, generator=keep["noise"]),
    }
    for part, change in changes.items():
        before = digests_of(held)
        assert before == digests_of(held)
        change()
        after = digests_of(held)
        assert [name for name in after if after[name] != before[name]] == [part]


def test_samples_have_one_digest_in_any_order_and_can_be_added() -> None:
    x, y = torch.rand(4, 3), torch.arange(4)
    whole = samples_digest((x, {"y": y}))
    turned = torch.tensor([2, 0, 3, 1])
    assert samples_digest((x[turned], {"y": y[turned]})) == whole
    assert samples_digest((x[turned], {"y": y})) != whole
    halves = [int(samples_digest((x[part], {"y": y[part]})), 16) for part in (slice(0, 1), slice(1, 4))]
    assert f"{sum(halves) % (1 << 64):x}" == whole


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(0), torch.zeros(0, 1)),
        (np.float32(1), np.float64(1)),
        ({"a": 1}, {"a": True}),
        ([1, [2]], [[1], 2]),
        (torch.tensor(1 + 2j), torch.tensor(1 - 2j)),
        (torch.tensor([1.0]).bfloat16(), torch.tensor([2.0]).bfloat16()),
    ],
)
def test_different_values_have_different_digests(one: Any, two: Any) -> None:
    assert digest(one) != digest(two)
    assert digest(one) == digest(one)
