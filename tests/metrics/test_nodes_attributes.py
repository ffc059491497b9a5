"""What updates keep beside states."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torchmetrics.wrappers import MinMaxMetric

from allstep import Engine
from allstep.coordination import Coordinator
from allstep.metrics import Metrics
from allstep.testing import simulate
from tests.metrics.noting import Noting
from tests.metrics.worlds import all_same_bits, over_ranks, take


class Learning(Noting):
    """Keeps an attribute that only an update sets."""

    def update(self, preds: Any, target: Any = None) -> None:
        super().update(preds, target)
        self.kind = torch.float16

    def compute(self) -> torch.Tensor:
        return self.count.to(self.kind)


def test_what_updates_learnt_beside_states_reaches_a_rank_that_saw_nothing() -> None:
    found = over_ranks(lambda: {"it": Learning()}, [[], [1, 2], [1]])
    assert [rank["it"].dtype for rank in found] == [torch.float16] * 3
    assert all_same_bits(found)


class CountingAside(Noting):
    """Counts in attributes that are no states."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.total = torch.tensor(0.0)
        self.kind: torch.dtype | None = None
        self.ready = False

    def update(self, preds: Any, target: Any = None) -> None:
        super().update(preds, target)
        self.seen += 1
        self.total += 1
        self.kind, self.ready = torch.float32, True


def test_what_is_counted_outside_of_states_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def rank(coordinator: Coordinator) -> None:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"it": CountingAside(), "range": MinMaxMetric(Noting())}).attach(engine, usage="running")
        engine.run([1, 2, 3])

    simulate(rank, 2)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2  # one a rank
    assert "metric it (CountingAside): its update changes seen, total, which is no state" in said[0]
