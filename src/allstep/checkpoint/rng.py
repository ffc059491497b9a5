"""The random generators of one rank: their state, and a seed for a rank that has none saved.

Contract: each rank saves what `capture` gives under its own number, and gives it to `restore` when it goes on. It holds
Python's `random`, numpy's global generator, torch's on the CPU, and that of the rank's own accelerator. The last goes
by the kind of device and not by its index: the same rank may find its device under another index, on nodes with more
devices or where the scheduler shows each task its own. A rank beyond those that saved calls `seed_for_rank`: its
generators are a function of (seed, epoch, rank). Restoring draws nothing and starts no device.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from allstep.data.keys import key_of
from allstep.errors import CheckpointError
from allstep.world.device_generators import device_state, restore_device_state
from allstep.world.xla_private import generator_state, restore_generator

_WORDS = 624  # in the state of a Mersenne Twister
_PURPOSE = 5  # keeps these keys apart from those that other parts make of the same seed and epoch


def capture() -> dict[str, Any]:
    """The state of this process' generators, of plain values, numpy arrays and tensors."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    device = _own_device()
    # Asking for its generator would start the device on a process that does not use it.
    if device is not None and _is_started(device):
        state["device"] = {"type": device.type, "state": device_state(device)}
    if (xla := generator_state()) is not None:
        state["xla"] = xla
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Go on with the generators where `capture` found them. A kind of device that is not here is passed over.

    Raises:
        CheckpointError: the state is not what `capture` gives.
    """
    try:
        random.setstate(state["python"])
        np.random.set_state(_checked(state["numpy"]))
        torch.set_rng_state(state["torch"])
        saved, device = state.get("device"), _own_device()
        if saved is not None and device is not None and saved["type"] == device.type:
            restore_device_state(device, saved["state"])
        if "xla" in state:
            restore_generator(int(state["xla"]))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"the random generators' state cannot be restored: {error!r}") from error


def _own_device() -> torch.device | None:
    """The accelerator that this process computes on; None where there is none."""
    if not torch.accelerator.is_available():
        return None
    kind = torch.accelerator.current_accelerator()
    return None if kind is None else torch.device(kind.type, torch.accelerator.current_device_index())


def _is_started(device: torch.device) -> bool:
    """Whether this process uses the device; True where its kind does not tell."""
    ask = getattr(torch.get_device_module(device), "is_initialized", None)
    return ask is None or bool(ask())


def _checked(state: Any) -> Any:
    """The state of numpy's global generator, once it is one: numpy takes any position, and reads memory there."""
    kind, key, position, has_gauss, _ = state
    if kind != "MT19937" or not isinstance(key, np.ndarray) or key.shape != (_WORDS,) or key.dtype != np.uint32:
        raise ValueError(f"numpy's state is of {kind!r}, or its key is not {_WORDS} numbers of 32 bits")
    if type(position) is not int or not 0 <= position <= _WORDS or has_gauss not in (0, 1):
        raise ValueError(f"numpy's generator stands at {position!r} of {_WORDS}")
    return state


def seed_for_rank(seed: int, epoch: int, rank: int) -> None:
    """Seed this process' generators for a rank that has no saved state, from (seed, epoch, rank)."""
    key = key_of(seed, epoch, _PURPOSE, rank)
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    torch.manual_seed(key >> 1)
    restore_generator(key >> 1)
