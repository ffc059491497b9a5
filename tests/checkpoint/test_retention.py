"""Which checkpoints stay when others were saved."""

from __future__ import annotations

import math
from typing import Any

import pytest

from allstep.checkpoint.manifest import CheckpointName, Manifest
from allstep.checkpoint.retention import Retention
from allstep.errors import ArgumentError


def saved(*accuracies: float | None) -> list[tuple[CheckpointName, Manifest]]:
    return [
        (CheckpointName(order, order * 10), manifest({} if accuracy is None else {"accuracy": accuracy}))
        for order, accuracy in enumerate(accuracies, 1)
    ]


def manifest(metrics: dict[str, float]) -> Manifest:
    fields: dict[str, Any] = {"versions": {}, "facts": {}, "files": {}}
    return Manifest(format=1, order=0, step=0, world_size=1, created=0.0, metrics=metrics, **fields)


def left(retention: Retention, accuracies: tuple[float | None, ...]) -> list[int]:
    entries = saved(*accuracies)
    removed = set(retention.expendable(entries[::-1]))
    return [name.order for name, _ in entries if name not in removed]


def test_the_newest_stay() -> None:
    assert left(Retention(keep_last=2), (0.1, 0.2, 0.3, 0.4)) == [3, 4]


def test_the_best_stay_beside_the_newest() -> None:
    accuracies = (0.5, 0.9, 0.8, 0.1, 0.2)
    assert left(Retention(1, (2, "accuracy", "max")), accuracies) == [2, 3, 5]
    assert left(Retention(1, (2, "accuracy", "min")), accuracies) == [4, 5]


def test_a_missing_or_nan_metric_is_never_the_best_and_a_tie_is_the_olders() -> None:
    for direction in ("max", "min"):
        accuracies = (0.5, 0.5, math.nan, None, None)
        assert left(Retention(1, (1, "accuracy", direction)), accuracies) == [1, 5]  # type: ignore[arg-type]


def test_none_keeps_all() -> None:
    assert left(Retention(None), (0.1,) * 9) == list(range(1, 10))


def test_the_only_one_stays() -> None:
    assert left(Retention(1), (None,)) == [1]


@pytest.mark.parametrize(
    "arguments",
    [
        (0,),
        (2.5,),
        ("3",),
        (1, (0, "a", "max")),
        (1, (1, "a", "highest")),
        (1, (1, "a")),
        (1, 2),
        (1, ("1", "a", "max")),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ArgumentError, match="keep_"):
        Retention(*arguments)
