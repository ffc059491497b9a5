"""The random generators of one rank: their state, and a seed for a rank that has none saved.

Contract: each rank saves what `capture` gives under its own number, and gives it to `restore` when it goes on. It holds
Python's `random`, numpy's global generator, torch's on the CPU, and those of the accelerators that are in use. A rank
beyond those that saved calls `seed_for_rank`: its generators are a function of (seed, epoch, rank). Restoring draws
nothing and starts no device.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from allstep.data.keys import key_of
from allstep.errors import CheckpointError

_WORDS = 624  # in the state of a Mersenne Twister
_PURPOSE = 5  # keeps these keys apart from those that other parts make of the same seed and epoch


def capture() -> dict[str, Any]:
    """The state of this process' generators, of plain values, numpy arrays and tensors."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    # Asking for a generator of CUDA would start the device on a process that does not use it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Go on with the generators where `capture` found them. Devices that are not here are passed over.

    Raises:
        CheckpointError: the state is not what `capture` gives.
    """
    try:
        random.setstate(state["python"])
        np.random.set_state(_checked(state["numpy"]))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for device, each in zip(range(torch.cuda.device_count()), state.get("cuda", ()), strict=False):
                torch.cuda.set_rng_state(each, device)
        if "mps" in state and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state["mps"])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"the random generators' state cannot be restored: {error!r}") from error


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
