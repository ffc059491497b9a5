"""Row 34 of the fault matrix: metric states that differ are a Python error on all ranks, never an abort."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics import Metric

from allstep import Engine, Events
from allstep.errors import MetricMismatchError
from allstep.metrics import Mean, Metrics
from allstep.testing import run_ranks
from allstep.world import World
from tests.faults.rehearsal import BOUND, check_first_lines, rehearse

pytestmark = pytest.mark.slow


class Held(Metric):
    """Holds a state of the given shape and type; `late` changes it when a batch is seen."""

    full_state_update = False
    held: torch.Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, late: torch.Tensor | None = None) -> None:
        super().__init__()
        self.late = late
        self.add_state("held", torch.zeros(shape, dtype=dtype), "sum")

    def update(self, value: float) -> None:
        self.held = self.held + 1 if self.late is None else self.late

    def compute(self) -> torch.Tensor:
        return self.held.sum()


def attached(rank: int, fault: str) -> dict[str, Metric]:
    plain = {"it": Held((2,), torch.float32)}
    if rank != 1:
        return plain
    late = {"late shape": torch.zeros(200_000), "late type": torch.zeros(2, dtype=torch.int64)}.get(fault)
    return {
        "shape": {"it": Held((200_000,), torch.float32)},
        "type": {"it": Held((2,), torch.float64)},
        "name": {"other": Held((2,), torch.float32)},
        "order": {"loss": Mean(), **plain},
        "none": {},
    }.get(fault, {"it": Held((2,), torch.float32, late)})


def run(world: World, fault: str) -> tuple[str, float]:
    engine = Engine(lambda engine, batch: batch)
    made = attached(world.rank, fault)
    if made:
        Metrics(made).attach(engine)
    reached: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: reached.append(e.state.iteration))
    try:
        engine.run([1.0, 2.0])
    except MetricMismatchError as error:
        return str(error), world.all_reduce(1.0)
    return "", 0.0


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("shape", "'it (Held)', state 'held', at EPOCH_COMPLETED, is a tensor, sum, float32, shape (2,) on ranks 0, 2"),
        ("type", "a tensor, sum, float64, shape (2,) on rank 1"),
        ("name", "metric 'other (Held)', state 'held', at EPOCH_COMPLETED on rank 1"),
        ("order", "metric 'loss (Mean)', state 'total', at EPOCH_COMPLETED on rank 1"),
        ("none", "no further state on rank 1"),
        ("late shape", "shape (200000,) on rank 1"),
        ("late type", "int64, shape (2,) on rank 1"),
    ],
)
def test_row_34_metric_states_that_differ_are_the_same_error_on_all_ranks(fault: str, told: str) -> None:
    results: list[Any] = run_ranks(run, 3, fault)
    errors = [error for error, _ in results]
    assert errors == [errors[0]] * 3
    assert told in errors[0]
    assert [together for _, together in results] == [3.0] * 3  # the group still works


def test_row_34_metric_states_that_differ_are_an_error_and_no_abort(tmp_path: Path) -> None:
    job = rehearse(tmp_path, "measures.py", within=BOUND, since="measuring")
    assert job.code == 1
    check_first_lines(job, "MetricMismatchError", "shape (200000,) on rank 1")
    accounts = [job.cause, *job.report["others"]]
    assert [each["kind"] for each in accounts] == ["error", "error"]
    assert accounts[0]["what"] == accounts[1]["what"]
    assert "SIGABRT" not in job.text
