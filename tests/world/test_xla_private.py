"""What is asked of torch_xla, with a stand-in for it; `tests/xla` asks the real one."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from allstep.errors import WorldError
from allstep.world import xla_private


class Stub(torch.Tensor):
    """A tensor that says it is on an XLA device."""

    device = torch.device("xla:0")


@pytest.fixture
def xla(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A torch_xla of one device; what is done to it is in `calls`."""
    fake = SimpleNamespace(calls=[], devices=1, spmd=False, generator=7)

    def module(name: str, **names: object) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(names)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    def sync() -> None:
        fake.calls.append("sync")
        fake.generator = fake.generator * 3

    def fetch(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        fake.calls.append(f"fetch {len(tensors)}")
        return [torch.zeros(1) for _ in tensors]

    fake.torch_xla = module(
        "torch_xla", device=lambda: "xla:0", sync=sync, _XLAC=SimpleNamespace(_xla_get_cpu_tensors=fetch)
    )
    for package in ("torch_xla.distributed", "torch_xla.core", "torch_xla._internal"):
        module(package)
    module("torch_xla.distributed.xla_backend")
    module("torch_xla.runtime", is_spmd=lambda: fake.spmd, world_size=lambda: fake.devices)
    module(
        "torch_xla.core.xla_model",
        get_rng_state=lambda: fake.generator,
        set_rng_state=lambda state: setattr(fake, "generator", state),
    )
    module(
        "torch_xla._internal.pjrt",
        initialize_multiprocess=lambda *place: fake.calls.append(f"place {place}"),
    )
    monkeypatch.delenv("PJRT_LOCAL_PROCESS_RANK", raising=False)
    return fake


def test_a_missing_torch_xla_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(WorldError, match=r"torch_xla does not load.*allstep\[xla\]"):
        xla_private.open_device()


def test_each_process_of_a_host_takes_its_own_device(xla):
    xla.devices = 4
    assert xla_private.open_device(2, 4, 4) == torch.device("xla:0")
    assert xla.calls == ["place (2, 4)"]


def test_a_process_that_torch_xla_started_has_its_device(xla, monkeypatch):
    monkeypatch.setenv("PJRT_LOCAL_PROCESS_RANK", "2")
    xla.devices = 4
    xla_private.open_device(2, 4, 4)
    assert xla.calls == []


def test_ranks_that_the_runtime_does_not_connect_are_refused(xla):
    with pytest.raises(WorldError, match="has 2 ranks, but torch_xla's runtime connects 1"):
        xla_private.open_device(0, 2, 2)


def test_spmd_is_for_a_world_of_one(xla):
    xla.spmd = True
    with pytest.raises(WorldError, match="one process has all devices"):
        xla_private.open_device(0, 2, 2)


def test_a_runtime_that_does_not_start_is_told(xla):
    def fails() -> None:
        raise RuntimeError("no chips")

    xla.torch_xla.device = fails
    with pytest.raises(WorldError, match=r"cannot open a device: no chips\. PJRT_DEVICE is"):
        xla_private.open_device()


def test_the_generator_does_not_depend_on_how_often_a_step_ends(xla):
    xla_private.end_step()
    xla_private.end_step()
    assert xla.calls == ["sync", "sync"]
    assert xla_private.generator_state() == 7


def test_tensors_come_to_the_host_in_one_transfer(xla):
    here, there = torch.ones(1), torch.ones(1).as_subclass(Stub)
    found = xla_private.to_host([there, here, there])
    assert xla.calls == ["sync", "fetch 2"]
    assert found[1] is here
    assert found[0].item() == 0


def test_without_one_transfer_they_come_one_by_one(xla):
    del xla.torch_xla._XLAC._xla_get_cpu_tensors
    found = xla_private.to_host([torch.ones(1).as_subclass(Stub)])
    assert found[0].item() == 1


def test_without_an_xla_device_nothing_is_asked():
    tensors = [torch.ones(2)]
    assert xla_private.to_host(tensors)[0] is tensors[0]
    assert xla_private.generator_state() is None
    xla_private.restore_generator(5)
    assert "torch_xla" not in sys.modules


def test_a_tensor_is_divided_under_spmd_alone(xla):
    tensor = torch.ones(4, 2).as_subclass(Stub)
    assert xla_private.on_each_device(tensor) is tensor
    here = torch.ones(4, 2)
    assert xla_private.on_each_device(here) is here
