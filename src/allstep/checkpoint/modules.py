"""A module's state, under names that do not tell how its parts are wrapped.

Contract: `KeptModule` is the `Kept` of a module. A run at another world size wraps other parts of it, or none: so names
lack what DDP, DataParallel and torch.compile add to them, wherever in the module these are, as in a container of two
DDP modules, or an averaged copy of one. Sharded parameters are DTensors, which are their own template and filled in
place. Buffers are rank 0's where DDP broadcasts them before a forward pass. Where nobody does, each rank gets its own
back, and those that are the same for all are rank 0's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from allstep.checkpoint.encoding import OfFirst
from allstep.parallel import unwrap
from allstep.world import World


class KeptModule:
    """A module that is no wrapper itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state(self) -> Any:
        """The whole state; before it is taken, buffers become what the next forward pass would make of them."""
        for replica in self._replicas():
            if replica.broadcast_buffers and any(True for _ in replica.buffers()):
                replica._sync_buffers()  # type: ignore[no-untyped-call]
        names = _Names(self.module)
        state = self.module.state_dict()
        own = self._own_buffers(state)
        plain: OrderedDict[str, Any] = OrderedDict(
            (names.plain(name), OfFirst(value) if name in own else value) for name, value in state.items()
        )
        versions = getattr(state, "_metadata", None)
        if versions is not None:
            plain._metadata = {names.plain_module(name): each for name, each in versions.items()}  # type: ignore[attr-defined]
        return plain

    def of_rank(self) -> Any:
        """This rank's buffers that nobody broadcasts."""
        if _world_size() == 1:
            return None
        names = _Names(self.module)
        own = self._own_buffers(self.module.state_dict())
        return {names.plain(name): buffer for name, buffer in own.items()} or None

    def template(self) -> Any:
        """The sharded tensors, which are filled in place."""
        names = _Names(self.module)
        state = self.module.state_dict()
        sharded = {names.plain(name): value for name, value in state.items() if isinstance(value, DTensor)}
        return sharded or None

    def load(self, state: Any, of_ranks: list[Any], rank: int) -> None:
        """Take over `state`, and this rank's buffers."""
        names = _Names(self.module)
        wrapped = {names.plain(name): name for name in self.module.state_dict()}
        named: OrderedDict[str, Any] = OrderedDict((wrapped.get(name, name), value) for name, value in state.items())
        versions = getattr(state, "_metadata", None)
        if versions is not None:
            named._metadata = {  # type: ignore[attr-defined]
                name: versions[names.plain_module(name)]
                for name, _ in self.module.named_modules(remove_duplicate=False)
                if names.plain_module(name) in versions
            }
        self.module.load_state_dict(named)
        buffers = of_ranks[rank] if rank < len(of_ranks) else None
        with torch.no_grad():
            for name, buffer in (buffers or {}).items():
                self.module.get_buffer(wrapped[name]).copy_(buffer)

    def _own_buffers(self, state: Container[str]) -> dict[str, torch.Tensor]:
        """Buffers with a name in the state that no DDP broadcasts."""
        broadcast = {
            id(buffer) for replica in self._replicas() if replica.broadcast_buffers for buffer in replica.buffers()
        }
        return {
            name: buffer
            for name, buffer in self.module.named_buffers(remove_duplicate=False)
            if name in state and id(buffer) not in broadcast and not isinstance(buffer, DTensor)
        }

    def _replicas(self) -> list[DistributedDataParallel]:
        """DDP modules in the module or, where it was given without its wrapper, around it."""
        world = World.current()
        inside = list(self.module.modules())
        inner = {id(each) for each in inside}
        around = [each for each in (world.wrapped if world is not None else ()) if id(unwrap(each)) in inner]
        found = [each for each in (*inside, *around) if isinstance(each, DistributedDataParallel)]
        return list(dict.fromkeys(found))


class _Names:
    """Names with and without wrappers."""

    def __init__(self, module: nn.Module) -> None:
        self._prefixes = [
            (f"{name}.{inner}.", f"{name}.")
            for name, each in module.named_modules(remove_duplicate=False)
            if name and unwrap(each) is not each
            for inner, _ in each.named_children()
        ][::-1]  # the innermost first

    def plain(self, name: str) -> str:
        """A tensor's name without wrappers."""
        for wrapped, plain in self._prefixes:
            if name.startswith(wrapped):
                name = plain + name[len(wrapped) :]
        return name

    def plain_module(self, name: str) -> str:
        """A submodule's name without wrappers."""
        return self.plain(f"{name}.")[:-1]


def _world_size() -> int:
    world = World.current()
    return 1 if world is None else world.world_size
