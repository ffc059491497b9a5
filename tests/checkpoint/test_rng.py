"""Random generators are put back as they were, and ranks without a saved state get their own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from allstep.checkpoint import rng
from allstep.checkpoint.encoding import decode, encode
from allstep.data.seeding import generators_kept
from allstep.errors import CheckpointError


@pytest.fixture(autouse=True)
def _kept():
    with generators_kept():
        yield


def draws():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()


def test_what_is_restored_goes_on_where_it_was():
    draws()
    state = rng.capture()
    expected = draws(), draws()
    draws()
    rng.restore(state)
    assert (draws(), draws()) == expected


def test_the_state_is_one_that_a_checkpoint_keeps():
    encoded = encode(rng.capture(), "rng")
    state = decode(encoded.document, encoded.tensors.__getitem__)
    expected = draws()
    rng.restore(state)
    assert draws() == expected


def test_ranks_differ_and_epochs_differ_and_both_are_repeatable():
    drawn = []
    for epoch, rank in [(0, 0), (0, 1), (1, 0), (0, 1)]:
        rng.seed_for_rank(7, epoch, rank)
        drawn.append(draws())
    assert drawn[1] == drawn[3]
    for each in zip(*drawn[:3], strict=True):
        assert len({str(value) for value in each}) == 3


def test_what_is_no_state_is_an_error():
    with pytest.raises(CheckpointError, match="cannot be restored"):
        rng.restore({"python": 1})


class FakeGpus:
    """Stand-in for the generators of a process's accelerators of a kind; `current` is the rank's own."""

    def __init__(self, count: int, current: int, *, started: bool = True, kind: str = "cuda") -> None:
        self.states = {index: torch.tensor([index], dtype=torch.uint8) for index in range(count)}
        self.current, self.started, self.kind = current, started, kind

    def put_in_place(self, patch: pytest.MonkeyPatch) -> FakeGpus:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(self.kind))
        patch.setattr(torch.accelerator, "current_device_index", lambda: self.current)
        module = getattr(torch, self.kind)
        if self.kind == "mps":  # which has one device, and does not say whether it is used
            patch.setattr(module, "get_rng_state", lambda: self.states[0].clone())
            patch.setattr(module, "set_rng_state", lambda state: self.states.update({0: state}))
            return self
        patch.setattr(module, "is_initialized", lambda: self.started)
        patch.setattr(module, "get_rng_state", lambda device: self.states[device.index].clone())
        patch.setattr(module, "set_rng_state", lambda state, device: self.states.update({device.index: state}))
        return self


@pytest.mark.parametrize(("count", "current"), [(8, 7), (1, 0), (4, 3)])
def test_a_ranks_device_goes_on_whatever_index_it_has_then(monkeypatch, count, current):
    FakeGpus(4, 3).put_in_place(monkeypatch)
    state = rng.capture()
    later = FakeGpus(count, current).put_in_place(monkeypatch)
    untouched = {index: int(each) for index, each in later.states.items() if index != current}
    rng.restore(state)
    assert int(later.states[current]) == 3
    assert {index: int(each) for index, each in later.states.items() if index != current} == untouched


@pytest.mark.parametrize(("kind", "own"), [("xpu", 2), ("mps", 0)])
def test_the_generator_of_any_kind_of_device_goes_on(monkeypatch, kind, own):
    there = FakeGpus(own + 1, own, kind=kind).put_in_place(monkeypatch)
    state = rng.capture()
    assert state["device"]["type"] == kind
    there.states[own] = torch.tensor([99], dtype=torch.uint8)
    rng.restore(state)
    assert int(there.states[own]) == own


def test_a_device_that_is_not_used_is_neither_started_nor_saved(monkeypatch):
    FakeGpus(2, 1, started=False).put_in_place(monkeypatch)
    assert "device" not in rng.capture()


def test_another_kind_of_device_is_passed_over(monkeypatch):
    FakeGpus(2, 1).put_in_place(monkeypatch)
    state = rng.capture()
    monkeypatch.undo()
    rng.restore(state)
    later = FakeGpus(2, 0).put_in_place(monkeypatch)
    rng.restore({**state, "device": {"type": "xpu", "state": torch.zeros(1)}})
    assert int(later.states[0]) == 0
