"""How many votes a run takes, and what counts as time of a window."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.data import DataLoader

from allstep.engine import Engine, Events
from allstep.testing import SimulatedRank, simulate
from tests.engine.simulated_data import Counted

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("window", [None, 1])
def test_the_number_of_meetings_is_one_a_window_and_a_few_a_run(window: int | None) -> None:
    def world(coordinator: SimulatedRank) -> int:
        loader = DataLoader(Counted(1000), batch_size=1)
        Engine(lambda e, b: None, coordinator=coordinator).run(loader, window=window)
        return coordinator.calls

    (calls, _) = simulate(world, 2)
    if window == 1:
        assert 1000 <= calls <= 1004
    else:
        assert calls <= 1000 // 32 + 12


def test_handlers_of_an_epochs_end_are_no_part_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        sizes: list[int] = []

        def step(engine: Engine, batch: torch.Tensor) -> None:
            if not sizes or sizes[-1] != engine.extension.window_ends_at:
                sizes.append(engine.extension.window_ends_at)

        def wait(engine: Engine) -> None:
            now[coordinator.rank] += 3_000_000_000

        engine = Engine(step, coordinator=coordinator)
        engine.add_event_handler(Events.EPOCH_COMPLETED, wait)
        engine.run(DataLoader(Counted(63)), max_epochs=2)
        return [after - before for before, after in zip([0, *sizes], sizes, strict=False)]

    now = {0: 0, 1: 0}
    ranks = {}
    monkeypatch.setattr("allstep.engine.agreed_batches.monotonic_ns", lambda: now[ranks[threading.get_ident()]])

    def ranked(coordinator: SimulatedRank) -> list[int]:
        ranks[threading.get_ident()] = coordinator.rank
        return world(coordinator)

    for windows in simulate(ranked, 2):
        assert windows[:6] == [1, 2, 4, 8, 16, 32]
        assert windows[6:] == [32, 31]
