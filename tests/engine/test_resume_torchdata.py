"""torchdata's StatefulDataLoader: a run goes on from its state at the very batch, workers and read-ahead included.

torchdata is no dependency of allstep; where it is not installed these are skipped.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from allstep.checkpoint import Checkpoint
from allstep.engine import Engine, Events
from allstep.testing import run_ranks
from allstep.world import World
from tests.engine.recording import nothing

stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="pip install torchdata to run this")

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

SAMPLES = 22


class Rows(Dataset[int]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """Knows where it is, in each worker."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        share, of = (worker.id, worker.num_workers) if worker else (0, 1)
        while share + self.at * of < SAMPLES:
            self.at += 1
            yield share + (self.at - 1) * of
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def loader(kind: str, workers: int, rank: int = 0, ranks: int = 1) -> Any:
    if kind == "stream":
        return stateful.StatefulDataLoader(Stream(), batch_size=3, num_workers=workers)
    if ranks == 1:
        return stateful.StatefulDataLoader(Rows(), batch_size=3, shuffle=True, num_workers=workers)
    sampler = torch.utils.data.DistributedSampler(Rows(), ranks, rank, shuffle=True, seed=3)
    return stateful.StatefulDataLoader(Rows(), batch_size=2, sampler=sampler, num_workers=workers)


def taken_with(engine: Engine) -> list[Any]:
    taken: list[Any] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: taken.append(engine.state.batch.tolist()) if engine.state.active else None
    )
    return taken


def put_back_into(engine: Engine, generator: torch.Tensor, *, inside: bool) -> Callable[[], None]:
    """As a Checkpoint does: when the run begins, and inside an epoch once more when its first batch is taken."""
    events = [Events.STARTED, Events.GET_BATCH_STARTED] if inside else [Events.STARTED]

    def put_back() -> None:
        if engine.last_event_name in events:
            events.remove(engine.last_event_name)
            torch.set_rng_state(generator)

    return put_back


def check(make: Any, *, every: int = 1, accumulate: int = 1, **terms: Any) -> None:
    """Save a run after each group, and go on from each of these saves: the same batches come, nothing is dropped."""
    engine = Engine(nothing, accumulate=accumulate)
    taken, saves = taken_with(engine), []
    events = Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED

    def save(engine: Engine) -> None:
        if engine.state.group_end:
            saves.append((len(taken), copy.deepcopy(engine.state_dict()), torch.get_rng_state()))

    engine.add_event_handler(events, save)
    torch.manual_seed(1)
    engine.run(make(), **terms)
    assert len({tuple(batch) for batch in taken}) > 1
    for done, state, generator in saves[::every]:
        again = Engine(nothing, accumulate=accumulate)
        rest = taken_with(again)
        again.load_state_dict(state)
        put_back = put_back_into(again, generator, inside=state["iteration"] > state["epoch_began_at"])
        again.add_event_handler(Events.STARTED | Events.GET_BATCH_STARTED, put_back)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*dropped")
            again.run(make(), **terms)
        assert rest == taken[done:], (done, state)


@pytest.mark.parametrize("kind", ["rows", "stream"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_goes_on_at_the_very_batch(kind: str, accumulate: int) -> None:
    check(lambda: loader(kind, 0), accumulate=accumulate, max_epochs=2)


@pytest.mark.slow
@pytest.mark.nightly  # torchdata takes 10 s to end the workers of each loader that is let go of
@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_with_workers_that_read_ahead(kind: str) -> None:
    check(lambda: loader(kind, 2), every=5, max_epochs=2)


def _on_one_rank(world: World, kind: str) -> None:
    check(lambda: loader(kind, 0, world.rank, world.world_size), every=3, max_epochs=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_on_two_ranks_that_read_ahead_to_agree(kind: str) -> None:
    run_ranks(_on_one_rank, 2, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "workers"), [("rows", 0), ("stream", 2), pytest.param("rows", 2, marks=pytest.mark.nightly)]
)
def test_a_checkpoint_keeps_its_state(kind: str, workers: int, tmp_path: Path) -> None:
    def run(every: int | None, until: int | None = None, **resume: str) -> list[Any]:
        engine = Engine(nothing)
        taken = taken_with(engine)
        checkpoint = Checkpoint(tmp_path, {"engine": engine}, every=every).attach(engine)
        checkpoint.resume(**resume)

        def die() -> None:
            checkpoint.close()
            raise ZeroDivisionError

        if until is not None:
            engine.add_event_handler(Events.ITERATION_STARTED(once=until), die)
        with nullcontext() if until is None else pytest.raises(ZeroDivisionError):
            engine.run(loader(kind, workers), max_epochs=2)
        return taken

    torch.manual_seed(1)
    begun = run(5, until=13)  # saved in the middle of the second epoch
    torch.manual_seed(1)
    unbroken = run(None, at="none")
    for path in tmp_path.glob("save-*-step-16"):
        shutil.rmtree(path)
    torch.manual_seed(2)
    assert begun == unbroken[:12]
    assert run(None) == unbroken[10:]
