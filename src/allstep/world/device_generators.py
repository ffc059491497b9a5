"""The random generator of one device, whatever kind of device it is.

Contract: checkpoints keep and restore that of a rank's own accelerator, and metrics have all ranks draw the same from
it. `device_draws` is false where a device has no generator of its own, as the CPU, whose generator is torch's; nothing
else here is called for such a device. A device that was not used yet is started.
"""

from __future__ import annotations

import torch

from allstep.world import xla_private

_WITHOUT = ("cpu", "meta")

GeneratorState = torch.Tensor | int


def device_draws(device: torch.device) -> bool:
    """Whether a device has a generator of its own."""
    return device.type not in _WITHOUT


def device_state(device: torch.device) -> GeneratorState:
    """Where a device's generator stands: bytes, on the host, or XLA's one number."""
    if device.type == "xla":
        found = xla_private.generator_state()
        assert found is not None  # a tensor was on the device, so torch_xla is here
        return found
    module = torch.get_device_module(device)
    # MPS has one device, and functions that take none.
    state: torch.Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def restore_device_state(device: torch.device, state: GeneratorState) -> None:
    """Have a device's generator go on where `device_state` found it."""
    if device.type == "xla":
        xla_private.restore_generator(int(state))
        return
    module = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


def seed_device(device: torch.device, seed: int) -> None:
    """Seed a device's generator, and no other device's.

    Args:
        device: one that has been used, as after `device_state`.
        seed: from 0 to 2^63 - 1.
    """
    if device.type == "xla":
        xla_private.seed_generator(seed)
        return
    module = torch.get_device_module(device)
    generators = getattr(module, "default_generators", None)  # of the devices by index, once they are started
    if generators:
        generators[module.current_device() if device.index is None else device.index].manual_seed(seed)
    else:
        module.manual_seed(seed)
