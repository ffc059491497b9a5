"""All that allstep asks of torch_xla.

Contract: torch_xla is imported when an XLA device is opened, and never otherwise. An XLA device runs nothing at once:
operations are collected, and run as one graph when somebody ends the step (`end_step`) or the host reads a value. A
graph is compiled when it is first met, for seconds; one that was met before only runs. So what is done in a step is to
be the same from one step to the next, and a step is to have one end. `Engine` ends it; see
`allstep.engine.step_boundary`.

Under SPMD (`torch_xla.runtime.use_spmd()`) one process has all devices of its host, which look like one. Batches are
then divided over them by `placed`, and what the compiler adds makes the result that of one device.

| Name | What for | Since | Without it |
|---|---|---|---|
| torch_xla._XLAC._xla_get_cpu_tensors | copies of many tensors to the host in one transfer | 2.9 | one by one |
| torch_xla._internal.pjrt.initialize_multiprocess | this process' device among those of its host | 2.9 | WorldError |
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch

from allstep.errors import WorldError

_REMEDY = "install a torch_xla of the same version as torch with `pip install 'allstep[xla]'`, or pass device='cpu'"
_DATA = "data"


def open_device(local_rank: int = 0, local_world_size: int = 1, world_size: int = 1) -> torch.device:
    """This process' XLA device; also registers torch_xla's backend for process groups.

    Args:
        local_rank, local_world_size: this process among those of its host, one for each device.
        world_size: processes on all hosts.

    Raises:
        WorldError: torch_xla is not installed or does not load beside this torch, or its runtime has another number of
            devices than there are ranks.
    """
    try:
        xla = import_module("torch_xla")
        import_module("torch_xla.distributed.xla_backend")
    except ImportError as error:
        raise WorldError(f"an XLA device was asked for, but torch_xla does not load: {error}; {_REMEDY}") from error
    runtime = import_module("torch_xla.runtime")
    try:
        if world_size > 1 and runtime.is_spmd():
            raise WorldError(
                f"SPMD is on (torch_xla.runtime.use_spmd, XLA_USE_SPMD) in a world of {world_size}: there one process "
                "has all devices of its host; start one process, or one for each device without SPMD"
            )
        if local_world_size > 1 and "PJRT_LOCAL_PROCESS_RANK" not in os.environ:
            _choose_own_device(local_rank, local_world_size)
        device = torch.device(xla.device())
        found = runtime.world_size()
    except (RuntimeError, AttributeError, ImportError, OSError) as error:
        raise WorldError(
            f"torch_xla cannot open a device: {error}. PJRT_DEVICE is {os.environ.get('PJRT_DEVICE')!r}; set it to "
            "what this machine has, such as TPU, or to CPU for a try-out, or pass device='cpu'"
        ) from error
    if world_size > 1 and found != world_size:
        raise WorldError(
            f"this world has {world_size} ranks, but torch_xla's runtime connects {found}: gradients would not be "
            f"reduced over all of them. PJRT_DEVICE is {os.environ.get('PJRT_DEVICE')!r}; several processes need one "
            "device each on a TPU, and on the CPU there is one process alone (or SPMD, see the guide on devices)"
        )
    return device


def _choose_own_device(local_rank: int, local_world_size: int) -> None:
    """Have PJRT show this process its own device, as torch_xla's own launcher does before it calls a function."""
    import_module("torch_xla._internal.pjrt").initialize_multiprocess(local_rank, local_world_size)


def end_step() -> None:
    """Have the device begin with what was collected since the last call; nothing is waited for.

    torch_xla moves its generator on each time. It is put back to where the operations have left it, so that what is
    drawn does not depend on how often this is called, and a resumed run draws what the unbroken one does.
    """
    state = generator_state()
    sys.modules["torch_xla"].sync()
    if state is not None:
        restore_generator(state)


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; under SPMD, divided by its first dimension over the devices where that goes evenly."""
    if tensor.device.type == "xla" or not (mesh := _mesh()):
        return tensor.to(device)
    sharding = None
    if tensor.dim() and tensor.shape[0] and tensor.shape[0] % mesh.size() == 0:
        spmd = import_module("torch_xla.distributed.spmd")
        sharding = spmd.ShardingSpec(mesh, (_DATA, *(None,) * (tensor.dim() - 1)))
    sent: list[torch.Tensor] = _model().send_cpu_data_to_device([tensor], device, sharding)
    return sent[0]


def on_each_device(tensor: torch.Tensor) -> torch.Tensor:
    """Under SPMD, a copy of a batch's tensor that is whole on each device; elsewhere the tensor itself.

    The host reads such a copy as it is. To read a divided tensor torch_xla compiles a graph, each time anew.
    """
    if tensor.device.type != "xla" or not tensor.dim() or not (mesh := _mesh()):
        return tensor
    copy = torch.cat([tensor])  # a clone would be divided as the tensor is, which cannot be changed
    import_module("torch_xla.distributed.spmd").mark_sharding(copy, mesh, (None,) * copy.dim())
    return copy


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors with those on an XLA device copied to the host, in one transfer."""
    at = [index for index, tensor in enumerate(tensors) if tensor.device.type == "xla"]
    result = list(tensors)
    if not at:
        return result
    end_step()  # what they are still to be computed from is one graph with the rest of the step
    remote = [tensors[index].detach() for index in at]
    fetch = getattr(sys.modules["torch_xla"]._XLAC, "_xla_get_cpu_tensors", None)
    for index, tensor in zip(at, fetch(remote) if fetch else [each.cpu() for each in remote], strict=True):
        result[index] = tensor
    return result


def seed_generator(seed: int) -> None:
    """Seed the device's own generator, which `torch.manual_seed` does not reach."""
    _model().set_rng_state(seed)


def generator_state() -> int | None:
    """The state of the device's generator; None in a process that opened no XLA device."""
    return int(_model().get_rng_state()) if "torch_xla" in sys.modules else None


def restore_generator(state: int) -> None:
    """Go on where `generator_state` was taken; nothing in a process that opened no XLA device."""
    if "torch_xla" in sys.modules:
        _model().set_rng_state(state)


def _model() -> Any:
    return import_module("torch_xla.core.xla_model")


def _mesh() -> Any:
    """All devices in one dimension, under SPMD; None without."""
    runtime = import_module("torch_xla.runtime")
    return _mesh_of(runtime.global_runtime_device_count()) if runtime.is_spmd() else None


@cache
def _mesh_of(devices: int) -> Any:
    return import_module("torch_xla.distributed.spmd").Mesh(list(range(devices)), (devices,), (_DATA,))
