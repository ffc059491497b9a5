"""A stand-in for an accelerator of another maker: four devices of the type "fakegpu", which compute on the host.

torch's own stand-in (`_setup_privateuseone_for_python_backend`) brings the type of device and no kernels. Here each
operation on such a device is run on the host, and what it gives counts as being on the device. Each device has a random
generator of its own. torch's autograd engine knows the first of the devices only, so a backward pass needs that one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "fakegpu"
_kept: list[Any] = []


class OnDevice(torch.Tensor):
    """A tensor that is on such a device, as far as anybody can tell; `values` are on the host."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # else a copy on the host would be of this class

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
        )
        made.values = values
        return made

    def data_ptr(self) -> int:
        """Where it is: each tensor somewhere else."""
        return self.values.data_ptr()

    def __repr__(self, **options: Any) -> str:
        return f"{self.values!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_host(op, *args, **(kwargs or {}))


class Devices(backend_registration._DummyBackendModule):
    """What torch asks of such devices."""

    def __init__(self, count: int) -> None:
        self.default_generators = tuple(torch.Generator() for _ in range(count))
        self.current = 0

    def device_count(self) -> int:
        return len(self.default_generators)

    def current_device(self) -> int:
        return self.current

    def set_device(self, device: torch.device | int) -> None:
        self.current = device if isinstance(device, int) else int(device.index or 0)

    def manual_seed_all(self, seed: int) -> None:
        for each in self.default_generators:
            each.manual_seed(seed)

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return self.default_generators[device.index].get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.default_generators[device.index].set_state(state)


def four_devices() -> Devices:
    """Make this process one that sees the devices. It cannot be undone."""
    devices = Devices(4)
    backend_registration._setup_privateuseone_for_python_backend(NAME, devices)
    # torch's stand-in has one device where C++ is asked.
    torch.accelerator.current_device_index = devices.current_device
    torch.accelerator.set_device_index = devices.set_device
    library = torch.library.Library("_", "IMPL")
    library.fallback(on_host, "PrivateUse1")  # for what makes a tensor of none
    _kept.append(library)
    return devices


def on_host(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the host, and have its results where the operation was to be."""
    given: dict[int, torch.Tensor] = {}
    places: list[torch.device] = []

    def host(value: Any) -> Any:
        if isinstance(value, OnDevice):
            places.append(value.device)
            given[id(value.values)] = value
            return value.values
        if isinstance(value, torch.Tensor):
            given[id(value)] = value
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value

    asked = kwargs.get("device")
    args, kwargs = tree_map(host, args), tree_map(host, kwargs)
    place = asked or places[0]
    if place.type == NAME:
        index = torch.get_device_module(NAME).current_device() if place.index is None else place.index
        place = torch.device(NAME, index)
        if any(each.name == "generator" for each in op._schema.arguments) and kwargs.get("generator") is None:
            kwargs["generator"] = torch.get_device_module(NAME).default_generators[index]

    def there(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or id(value) in given:
            return given[id(value)] if isinstance(value, torch.Tensor) else value
        return OnDevice(value, place) if place.type == NAME else value

    return tree_map(there, op(*args, **kwargs))
