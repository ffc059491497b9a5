"""XLA devices, imported only when asked for.

State of it: written to torch_xla's interface; allstep's tests have no XLA device to run it on.
"""

from __future__ import annotations

import importlib

import torch

from allstep.errors import WorldError


def open_device() -> torch.device:
    """This process' XLA device; also registers torch_xla's backend for process groups.

    Raises:
        WorldError: torch_xla is not installed or does not load beside this torch.
    """
    try:
        torch_xla = importlib.import_module("torch_xla")
        importlib.import_module("torch_xla.distributed.xla_backend")
    except ImportError as error:
        raise WorldError(
            f"an XLA device was asked for, but torch_xla does not load: {error}; "
            "install a torch_xla of the same version as torch with `pip install 'allstep[xla]'`, or pass device='cpu'"
        ) from error
    return torch.device(torch_xla.device())


def seed_device(seed: int) -> None:
    """Seed the XLA device's own generator, which `torch.manual_seed` does not reach."""
    importlib.import_module("torch_xla.core.xla_model").set_rng_state(seed)
