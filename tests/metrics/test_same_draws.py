"""While metrics are computed, all ranks draw the same from a device of any kind, and it goes on as if nothing had been.

Stand-in: a module of two generators on the host takes the place of what torch has for a type of device.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from allstep.metrics.reduction import same_draws
from allstep.world import xla_private


def devices(monkeypatch: pytest.MonkeyPatch, kind: str) -> list[torch.Generator]:
    """The generators of two devices of a kind, of which the second is current."""
    found = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    one = found[1]
    if kind == "mps":  # which has one device
        module = SimpleNamespace(get_rng_state=one.get_state, set_rng_state=one.set_state, manual_seed=one.manual_seed)
    else:
        module = SimpleNamespace(
            default_generators=tuple(found),
            current_device=lambda: 1,
            get_rng_state=lambda device: found[1 if device.index is None else device.index].get_state(),
            set_rng_state=lambda state, device: found[1 if device.index is None else device.index].set_state(state),
        )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return found


def draw(generator: torch.Generator) -> list[float]:
    return torch.rand(3, generator=generator).tolist()


@pytest.mark.parametrize("only_torch", [True, False])
@pytest.mark.parametrize(
    ("place", "own"), [("cuda:0", 0), ("cuda", 1), ("xpu:1", 1), ("privateuseone:0", 0), ("mps", 1)]
)
def test_draws_are_those_of_the_key_and_leave_no_trace(monkeypatch, place, own, only_torch):
    device = torch.device(place)
    found = devices(monkeypatch, device.type)
    other = found[1 - own].get_state()
    with same_draws(1234, device, only_torch=only_torch):
        first = draw(found[own])
    assert torch.equal(found[1 - own].get_state(), other)
    after = draw(found[own])
    found[own].manual_seed(own + 1)
    assert draw(found[own]) == after
    with same_draws(1234, device, only_torch=only_torch):
        assert draw(found[own]) == first
    with same_draws(5678, device, only_torch=only_torch):
        assert draw(found[own]) != first


def test_xlas_generator_is_seeded_and_restored_too(monkeypatch):
    states = [7]
    monkeypatch.setattr(xla_private, "generator_state", lambda: states[-1])
    monkeypatch.setattr(xla_private, "seed_generator", states.append)
    monkeypatch.setattr(xla_private, "restore_generator", states.append)
    with same_draws(1234, torch.device("xla", 0)):
        assert states == [7, 617]
    assert states[-1] == 7


def test_a_device_without_a_generator_of_its_own_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: pytest.fail("it was asked"))
    for kind in ("cpu", "meta"):
        with same_draws(1, torch.device(kind)):
            pass
