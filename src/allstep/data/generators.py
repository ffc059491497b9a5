"""The three global CPU generators, Python's, numpy's and torch's: seeded together, and left as they were found.

Contract: what seeds them to draw something that belongs to a place in an epoch does so inside `generators_kept`, unless
it is a worker process, which draws for nothing else. Generators of devices are not touched.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_MASK32 = 0xFFFFFFFF


def seed_cpu_generators(key: int) -> None:
    """Seed Python's `random`, numpy's global generator and torch's CPU generator from a 64-bit key."""
    random.seed(key)
    np.random.seed(key & _MASK32)
    # torch.manual_seed would also reach the accelerators, at eighty times the cost, and change what the model draws.
    torch.default_generator.manual_seed(key >> 1)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the three global generators as they were found."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
