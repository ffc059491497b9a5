"""Mean, Sum, Max and Min: weighted once, exact counts, no drift."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from allstep import Engine, Events
from allstep.coordination import Coordinator
from allstep.metrics import Max, Mean, Metrics, Min, Sum
from allstep.testing import simulate
from tests.metrics.worlds import all_same_bits, deal, on_one, over_ranks, take


def test_a_mean_of_batch_means_is_the_mean_over_samples() -> None:
    mean = Mean()
    mean.update(torch.tensor(1.0), 3)
    mean.update(2.0, 1)
    assert float(mean.compute()) == 1.25


def test_a_tensor_with_one_value_a_sample_is_not_weighed_again() -> None:
    mean, total = Mean(), Sum()
    for metric in (mean, total):
        metric.update(torch.tensor([1.0, 2.0, 6.0]), 3)
    assert float(mean.compute()) == 3.0
    assert float(total.compute()) == 9.0


def test_a_sum_of_batch_means_is_the_sum_over_samples_unless_they_are_totals() -> None:
    weighted, plain = Sum(), Sum(weighted=False)
    for metric in (weighted, plain):
        metric.update(torch.tensor(2.0), 3)
        metric.update(0.5, 2)
    assert float(weighted.compute()) == 7.0
    assert float(plain.compute()) == 2.5


@pytest.mark.parametrize("kind", [Mean, Sum])
def test_a_hundred_million_samples_of_a_tenth_drift_by_less_than_a_billionth(kind: type[Mean] | type[Sum]) -> None:
    """Between two outliers that cancel, beside which a plain sum in float64 loses a part of each batch."""
    metric, plain = kind(), 0.0
    outlier, batches = (1e17, 1), [(0.1, 99_999)] * 1000 + [(0.1, 1000)]
    for value, samples in [outlier, *batches, (-outlier[0], 1)]:
        metric.update(value, samples)
        plain += value * samples
    tenths = sum(samples for _, samples in batches)
    assert tenths == 100_000_000
    divisor = tenths + 2 if kind is Mean else 1
    exact = 0.1 * tenths / divisor
    assert abs(float(metric.compute()) - exact) < 1e-9 * exact
    assert abs(plain / divisor - exact) > 1e-6 * exact


@pytest.mark.parametrize("kind", [pytest.param(Mean, marks=pytest.mark.nightly), Sum])
def test_small_amounts_are_not_lost_beside_a_large_sum(kind: type[Mean] | type[Sum]) -> None:
    metric, plain = kind(), torch.tensor(1e8, dtype=torch.float64)
    metric.update(1e8)
    exact = 1e8 + math.fsum([0.1] * 50_000)
    for _ in range(50_000):
        metric.update(0.1)
        plain = plain + 0.1
    divisor = 50_001 if kind is Mean else 1
    assert abs(float(metric.compute()) * divisor - exact) <= 2 * math.ulp(exact)
    assert abs(float(plain) - exact) > 100 * math.ulp(exact)


def test_a_sum_of_integers_is_exact_beyond_2_to_the_53() -> None:
    total = Sum(dtype=torch.int64)
    total.update(2**60, 1)
    total.update(torch.tensor([1, 2]))
    total.update(3, 2)
    assert total.compute().dtype == torch.int64
    assert int(total.compute()) == 2**60 + 9


def test_a_sum_of_integers_refuses_a_fraction() -> None:
    with pytest.raises(TypeError, match=r"Sum\(dtype=torch.float64\)"):
        Sum(dtype=torch.int64).update(0.5)
    with pytest.raises(ValueError, match="float32"):
        Sum(dtype=torch.float32)


def test_numpys_numbers_are_numbers_and_are_not_rounded() -> None:
    outputs = [{"value": np.float32(0.1), "samples": np.int64(3)}, {"value": np.float64(5), "samples": np.array(1)}]
    found = on_one(lambda: {"mean": Mean(), "sum": Sum(), "max": Max()}, outputs)
    exact = 3 * float(np.float32(0.1)) + 5
    assert [float(found[name]) for name in ("mean", "sum", "max")] == [exact / 4, exact, 5.0]
    by_position = on_one(lambda: {"mean": Mean()}, [(np.float32(0.1), np.int32(3)), (np.int64(5), 1)])
    assert float(by_position["mean"]) == exact / 4


@pytest.mark.parametrize("kind", [np.array, list, tuple, torch.tensor])
def test_arrays_and_lists_hold_one_value_a_sample(kind: Any) -> None:
    metrics: list[Mean | Sum | Max | Min] = [Mean(), Sum(), Sum(dtype=torch.int64), Max(), Min()]
    for metric in metrics:
        metric.update(kind([1, 2, 6]), 3)
    assert [float(metric.compute()) for metric in metrics] == [3.0, 9.0, 9.0, 6.0, 1.0]


@pytest.mark.parametrize("metric", [Mean, Sum, Max])
def test_what_is_no_number_is_named(metric: type[Mean | Sum | Max]) -> None:
    for value in ({"loss": 1.0}, "0.5", ["a"]):
        with pytest.raises(TypeError, match=f"value is a {type(value).__name__}.*a number or a tensor"):
            metric().update(value)  # type: ignore[arg-type]


def test_samples_are_an_integer() -> None:
    with pytest.raises(TypeError, match=r"samples is 0\.5"):
        Mean().update(1.0, 0.5)  # type: ignore[arg-type]


def test_an_infinite_value_makes_an_infinite_sum_and_nan_stays() -> None:
    total = Sum()
    total.update(math.inf)
    total.update(1.0)
    assert float(total.compute()) == math.inf
    total.update(math.nan)
    assert math.isnan(float(total.compute()))


def test_extremes_take_numbers_and_tensors() -> None:
    high, low = Max(), Min()
    for metric in (high, low):
        metric.update(torch.tensor([3.0, -5.0]), 2)
        metric.update(7, 1)
        metric.update(torch.empty(0), 1)
    assert (float(high.compute()), float(low.compute())) == (7.0, -5.0)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_over_ranks_they_are_those_of_all_samples(world_size: int) -> None:
    batches = [torch.arange(float(n)) * 0.1 + n for n in (3, 2, 5, 1, 4, 2, 2)]

    def make() -> dict[str, Mean | Sum | Max | Min]:
        return {"mean": Mean(), "sum": Sum(), "max": Max(), "min": Min(), "of means": Mean()}

    def per_sample(batch: torch.Tensor) -> torch.Tensor:
        return batch

    single = on_one(make, batches, per_sample)
    for empty in (None, 0):
        found = over_ranks(make, deal(batches, world_size, empty=empty), per_sample)
        assert all_same_bits(found)
        for name, value in single.items():
            assert float(found[0][name]) == pytest.approx(float(value), rel=1e-15)
    every = torch.cat(batches).double()
    assert float(single["mean"]) == pytest.approx(float(every.mean()), rel=1e-12)
    assert float(single["max"]) == float(every.max())


def test_a_constant_loss_has_that_mean_over_unequal_batches() -> None:
    dealt = [[torch.zeros(3)], [torch.zeros(2)]]
    found = over_ranks(lambda: {"loss": Mean()}, dealt, lambda batch: torch.tensor(1.0))
    assert [float(rank["loss"]) for rank in found] == [1.0, 1.0]


def test_over_a_run_that_is_ended_early_it_is_that_of_what_was_seen() -> None:
    def rank(coordinator: Coordinator) -> float:
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        Metrics({"mean": Mean()}).attach(engine, usage="run")
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.terminate(agreed=True))
        batches = [torch.full((2,), float(10 * at + coordinator.rank)) for at in range(4)]
        return float(engine.run(batches).metrics["mean"])

    assert simulate(rank, 2) == [(0 + 10 + 1 + 11) / 4] * 2


def test_over_one_rank_a_scalar_output_is_weighed_by_the_batch() -> None:
    single = on_one(lambda: {"loss": Mean()}, [torch.ones(3), torch.zeros(1)], lambda batch: batch.mean())
    assert float(single["loss"]) == 0.75
