"""A World of one inside the test's own process, with an environment that names no launcher."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import allstep

LAUNCHER_PREFIXES = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ALLSTEP_"),
    *("SLURM_", "OMPI_", "PMI_", "PMIX_", "PJRT_", "TPU_"),
)


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)


@pytest.fixture
def generators_restored() -> Iterator[None]:
    python, legacy, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(legacy)
    torch.set_rng_state(tensor)


@pytest.fixture
def one(bare_environment: None, generators_restored: None) -> Iterator[allstep.World]:
    with allstep.init(device="cpu") as world:
        yield world
