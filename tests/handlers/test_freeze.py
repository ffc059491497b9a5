"""Freeze: which parameters are trained in which epoch, alone, over ranks and after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from allstep import Alone, Events, Freeze, create_supervised_trainer
from allstep.testing import run_ranks
from tests.handlers.resuming import Job, check_resumes_exactly, trained


def trained_in_epochs(until: Mapping[str, int | None]) -> list[list[str]]:
    """The parameters that changed, in each of three epochs."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy, coordinator=Alone())
    Freeze(model, until).attach(trainer)
    before: dict[str, torch.Tensor] = {}
    changed: list[list[str]] = []

    @trainer.on(Events.EPOCH_STARTED)
    def begin() -> None:
        before.update({name: each.detach().clone() for name, each in model.named_parameters()})

    @trainer.on(Events.EPOCH_COMPLETED)
    def end() -> None:
        changed.append([name for name, each in model.named_parameters() if not torch.equal(each, before[name])])

    trainer.run([(torch.randn(6, 4), torch.arange(6) % 3)] * 2, max_epochs=3)
    return changed


def test_layers_are_trained_from_their_epochs_on() -> None:
    last, all_of_them = ["2.weight", "2.bias"], ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert trained_in_epochs({"0.*": 3}) == [last, last, all_of_them]


def test_none_is_for_good_and_the_last_pattern_that_fits_holds() -> None:
    assert trained_in_epochs({"0.*": None, "0.bias": 2}) == [
        ["2.weight", "2.bias"],
        ["0.bias", "2.weight", "2.bias"],
        ["0.bias", "2.weight", "2.bias"],
    ]


def test_parameters_without_a_rule_are_left_alone() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    freeze = Freeze(model, {"weight": 2})
    assert [freeze.is_trained("weight", epoch) for epoch in (1, 2)] == [False, True]
    assert freeze.is_trained("bias", 1) is None


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((nn.Linear(1, 1), {"wieght": 1}), ValueError, "'wieght' fits no parameter of the model, which has weight"),
        ((nn.Linear(1, 1), {"weight": 0}), ValueError, "the epoch of 'weight' is 0"),
        ((nn.Linear(1, 1), 3), TypeError, "until is 3"),
        ((3, {}), TypeError, "model is 3"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Freeze(*arguments)


def first_layer_later(job: Job) -> Mapping[str, Any]:
    Freeze(job.model, {"0.*": 3}).attach(job.trainer)
    return {}


@pytest.mark.slow
def test_over_ranks_layers_unfreeze_and_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    first, second = check_resumes_exactly(tmp_path, first_layer_later, kill_at=15)  # in the third epoch of six
    assert all(
        torch.equal(each, second["model"][name]) for name, each in first["model"].items() if "running" not in name
    )


@pytest.mark.slow
def test_a_run_with_fewer_ranks_unfreezes_in_the_same_epoch(tmp_path: Path) -> None:
    first, _ = run_ranks(partial(trained, batch_norm=False), 2, str(tmp_path / "two"), first_layer_later)
    run_ranks(partial(trained, batch_norm=False, epochs=2), 2, str(tmp_path / "fewer"), first_layer_later)
    (alone,) = run_ranks(partial(trained, batch_norm=False), 1, str(tmp_path / "fewer"), first_layer_later)
    assert min(alone["rates"]) == 13
    torch.testing.assert_close(alone["model"], first["model"], rtol=1e-3, atol=1e-4)
