"""Names that torch does not promise to keep, for `planning`: tensors without values, and ranks that are not there.

Contract: no other module of this package uses a private name of torch. `fake_ranks` has this process be rank 0 of any
number of ranks whose collectives do nothing, and gives the process group that was there before back at its end.
`fake_tensors` has operations give tensors with shapes, dtypes and storages of the right size, and no values. Nothing
but plans needs these names: where this torch lacks one, a plan is a ParallelError that says so.
All names but the first of those for meshes were there before torch 2.9, the oldest that allstep supports.

| name | what for | without it |
| --- | --- | --- |
| torch._subclasses.fake_tensor.FakeTensorMode | tensors without values | no plans |
| torch.utils._python_dispatch.TorchDispatchMode | seeing each operation and its tensors | no plans |
| torch.testing._internal.distributed.fake_pg.FakeStore | ranks that are not there | no plans |
| torch.distributed.tensor.debug._clear_sharding_prop_cache | keeping meshes of one shape apart | no plans |
| its _get_sharding_prop_cache_info, DTensor._op_dispatcher | the same in torch 2.9 | no plans |
| distributed_c10d._update_default_pg, _world.pg_map | setting the open process group aside meanwhile | no plans |
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from allstep.errors import ParallelError

_TO_NUMPY = ".numpy() is not supported for tensor subclasses"  # torch's words

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # `_needed` says it when a plan is asked for
    TorchDispatchMode = object  # type: ignore[assignment,misc]


class Operations(TorchDispatchMode):
    """Sees each operation in its block; to be overridden."""

    def __init__(self) -> None:
        _needed("torch.utils._python_dispatch", "TorchDispatchMode")
        super().__init__()  # type: ignore[no-untyped-call]

    def seen(self, operation: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Do the operation, and return what it gave."""
        return operation(*inputs, **options)

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
        if kind is not None and any(issubclass(each, kind) for each in types):
            return NotImplemented  # it comes back as operations on this rank's parts
        return self.seen(operation, inputs, options or {})


def fake_tensors() -> AbstractContextManager[Any]:
    """Operations in this context give tensors without values, also from tensors that have some."""
    mode: AbstractContextManager[Any] = _needed("torch._subclasses.fake_tensor", "FakeTensorMode")(
        allow_non_fake_inputs=True
    )
    return mode


def is_made_by(mode: Any, tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of this context of `fake_tensors`; for None, whether it has values."""
    return getattr(tensor, "fake_mode", None) is mode


def values_were_read(error: BaseException) -> bool:
    """Whether an exception says that code asked a tensor without values for one."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    names = ("DataDependentOutputException", "DynamicOutputShapeException")
    kinds = tuple(kind for name in names if (kind := getattr(module, name, None)) is not None)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and str(error).startswith(_TO_NUMPY))


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Have this process be rank 0 of a world in which nobody else is; a group that is open stays and is set aside."""
    store = _needed("torch.testing._internal.distributed.fake_pg", "FakeStore")
    set_default = _needed("torch.distributed.distributed_c10d", "_update_default_pg")
    groups = getattr(_needed("torch.distributed.distributed_c10d", "_world"), "pg_map", None)
    if groups is None:
        raise _missing("distributed_c10d._world.pg_map")
    before, known, hook = dist.group.WORLD, set(groups), sys.excepthook
    _forget_layouts()
    set_default(None)
    try:
        dist.init_process_group("fake", rank=0, world_size=world_size, store=store())
        yield
    finally:
        # The group that was there is the default again before these are ended, so that they end alone.
        set_default(before)
        sys.excepthook = hook
        for each in [group for group in groups if group not in known]:
            dist.destroy_process_group(each)
        _forget_layouts()


def _forget_layouts() -> None:
    """Have DTensors forget what they know by the shape of a mesh: it leads to the groups of one that had that shape."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    debug = import_module("torch.distributed.tensor.debug")
    if hasattr(debug, "_get_sharding_prop_cache_info") and not hasattr(debug, "_clear_sharding_prop_cache"):
        # torch 2.9, which has one cache alone.
        dispatcher = _needed("torch.distributed.tensor", "DTensor")._op_dispatcher
        dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    else:
        _needed("torch.distributed.tensor.debug", "_clear_sharding_prop_cache")()


def group_name(group: Any) -> str | None:
    """The name of the process group that an operation was given; None for anything else."""
    if isinstance(group, torch.ScriptObject):
        try:
            group = dist.ProcessGroup.unbox(group)
        except RuntimeError:  # a reduction's operator, say
            return None
    return group.group_name if isinstance(group, dist.ProcessGroup) else group if isinstance(group, str) else None


def _needed(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise _missing(f"{module}.{name}") from None


def _missing(name: str) -> ParallelError:
    return ParallelError(
        f"this torch, {torch.__version__}, has no {name}, without which nothing can be planned; update allstep"
    )
