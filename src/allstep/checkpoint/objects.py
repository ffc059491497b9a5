"""What goes into a checkpoint for each kind of object, and how it comes back.

Contract: `Checkpoint` makes one `Kept` for each object that it was given and calls `state` on all ranks. It is what is
the same on every rank, `of_rank` what this rank has for itself; `load` gives both back, to objects of a run of any
world size. Modules are taken out of DDP and torch.compile (`allstep.checkpoint.objects`). The sharded parameters of
FSDP2 and tensor parallelism are DTensors, which know how they are sharded; `template` says which state is to be filled
as such. Those of FSDP1 are plain tensors, so it is refused. Whatever else has `state_dict` and `load_state_dict` is
kept as it is.

A module's state, under names that do not tell how its parts are wrapped.

Contract: `KeptModule` is the `Kept` of a module. A run at another world size wraps other parts of it, or none: so names
lack what DDP, DataParallel and torch.compile add to them, wherever in the module these are, as in a container of two
DDP modules, or an averaged copy of one. Sharded parameters are DTensors, which are their own template and filled in
place. Buffers are rank 0's where DDP broadcasts them before a forward pass. Where nobody does, each rank gets its own
back, and those that are the same for all are rank 0's.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from allstep.checkpoint.encoding import OfFirst
from allstep.checkpoint.reading import ShardedLike
from allstep.engine import Engine
from allstep.engine.run import position_from
from allstep.engine.run_plan import is_done
from allstep.errors import CheckpointError
from allstep.parallel import unwrap
from allstep.world import World, internals


class Stateful(Protocol):
    """What can be kept in a checkpoint."""

    def state_dict(self) -> Any:
        """The state to keep."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take the state over."""


@dataclass(frozen=True, slots=True)
class PerRank:
    """Says of an object that its state differs by rank, such as a metric in the middle of an epoch.

    Each rank gets its own back. At another world size, an object that has `load_rank_states(states)` is given the
    states of all ranks; without it ranks beyond the saved ones keep what they have, and states without a rank are left.
    """

    kept: Stateful


class Kept(Protocol):
    """One object of a checkpoint."""

    def state(self) -> Any:
        """What is the same on every rank; None where there is nothing."""

    def of_rank(self) -> Any:
        """What this rank has for itself; None where there is nothing."""

    def template(self) -> Any:
        """State to be filled in place, or None."""

    def load(self, state: Any, of_ranks: list[Any], rank: int) -> None:
        """Take over `state`, and of what each rank that saved had for itself what is for `rank`."""


@dataclass(frozen=True, slots=True)
class Collected:
    """The states of all objects: what is the same on every rank, what this rank has, and why one could not be had."""

    common: dict[str, Any]
    of_rank: dict[str, Any]
    failure: str | None


def kept_objects(objects: Mapping[str, Any], trainers: Sequence[Engine] = ()) -> dict[str, Kept]:
    """How each object is kept.

    Args:
        objects: by name.
        trainers: the engines that the checkpoint is attached to. Others that have finished, such as evaluators, begin
            anew in a resumed run too; a trainer has nothing left to do then. Without any, every engine is a trainer.

    Raises:
        CheckpointError: an object has no state to keep.
    """
    return {name: _kept(name, each, trainers) for name, each in objects.items()}


def collect(kept: Mapping[str, Kept]) -> Collected:
    """Ask all objects for their states; one that raises is the failure, and keeps no rank from asking the others.

    Modules in DDP are asked for theirs in a collective, which a rank that gave up would leave the others in.
    """
    common: dict[str, Any] = {}
    of_rank: dict[str, Any] = {}
    failure: str | None = None
    for name, each in kept.items():
        try:
            common[name], of_rank[name] = each.state(), each.of_rank()
        except Exception as error:
            failure = failure or f"the state of {name!r} cannot be had: {type(error).__name__}: {error}"
    return Collected(_without_none(common), _without_none(of_rank), failure)


def _without_none(states: Mapping[str, Any]) -> dict[str, Any]:
    return {name: state for name, state in states.items() if state is not None}


def _is_metric(value: Any) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")  # where nobody has imported it, there is none
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric | torchmetrics.MetricCollection)


def _has_flat_shards(module: nn.Module) -> bool:
    # Importing it takes seconds, and where nothing has imported it nothing is wrapped.
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    return fsdp is not None and any(isinstance(each, fsdp.FullyShardedDataParallel) for each in module.modules())


def _kept(name: str, value: Any, trainers: Sequence[Engine]) -> Kept:
    if isinstance(value, Engine):
        return _KeptEngine(value, trains=not trainers or value in trainers)
    if isinstance(value, PerRank):
        return _KeptByRank(value.kept)
    if isinstance(value, torch.Generator):
        return _KeptByRank(_Generator(value))
    if _is_metric(value):
        raise CheckpointError(
            f"{name!r} is a metric of torchmetrics, which leaves its states out of its state_dict; make it an entry of "
            "allstep.Metrics, attach that, and give the Metrics to the checkpoint"
        )
    if isinstance(value, nn.Module):
        if _has_flat_shards(value):
            raise CheckpointError(
                f"{name!r} is or holds a FullyShardedDataParallel module, whose shards are plain tensors that do not "
                "tell what they are part of; shard it with torch.distributed.fsdp.fully_shard instead"
            )
        return KeptModule(unwrap(value))
    if isinstance(value, torch.optim.Optimizer):
        return _KeptOptimizer(value)
    if not callable(getattr(value, "state_dict", None)) or not callable(getattr(value, "load_state_dict", None)):
        raise CheckpointError(
            f"{name!r} is a {type(value).__name__}, which has no state_dict() and load_state_dict(); leave it out"
        )
    return _KeptByRank(value) if getattr(value, "state_differs_by_rank", False) else _Plain(value)


class _Plain:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state(self) -> Any:
        return self.value.state_dict()

    def of_rank(self) -> Any:
        return None

    def template(self) -> Any:
        return None

    def load(self, state: Any, of_ranks: list[Any], rank: int) -> None:
        self.value.load_state_dict(state)


class _KeptByRank(_Plain):
    def state(self) -> Any:
        return None

    def of_rank(self) -> Any:
        return self.value.state_dict()

    def load(self, state: Any, of_ranks: list[Any], rank: int) -> None:
        take_all = getattr(self.value, "load_rank_states", None)
        if take_all is not None:
            take_all(of_ranks)
        elif rank < len(of_ranks):
            self.value.load_state_dict(of_ranks[rank])


class _KeptEngine(_Plain):
    """An engine's counters and its place in data that is dealt to ranks are everybody's; a place of its own is not.

    Such places are taken up at the world size at which they were saved, and refused at any other.
    """

    def __init__(self, value: Engine, *, trains: bool) -> None:
        super().__init__(value)
        self.trains = trains

    def state(self) -> Any:
        state = self.value.state_dict()
        return {key: each for key, each in state.items() if key != "data" or "own" not in each}

    def of_rank(self) -> Any:
        data = self.value.state_dict().get("data", {})
        return data if "own" in data else None

    def load(self, state: Any, of_ranks: list[Any], rank: int) -> None:
        place = position_from(state, self.value.state_dict_user_keys)
        if not self.trains and is_done(place.iteration, place.epochs_completed, place.max_epochs, place.max_iters):
            for key in self.value.state_dict_user_keys:
                setattr(self.value.state, key, state[key])
            return
        if not self.trains:
            state = {key: each for key, each in state.items() if key != "finished"}  # which would keep it from running
        _check_own_places(of_ranks)
        own = of_ranks[rank] if rank < len(of_ranks) else None
        self.value.load_state_dict(state if own is None else {**state, "data": own})


def _check_own_places(of_ranks: Sequence[Any]) -> None:
    """Refuse, on all ranks alike, data's own states that were saved by more or fewer ranks than there are."""
    world = World.current()
    world_size = 1 if world is None else world.world_size
    if len(of_ranks) != world_size and any(each is not None for each in of_ranks):
        raise CheckpointError(
            "the engine's place is what each rank's data told of itself, which cannot be dealt anew: it was saved at "
            f"world size {len(of_ranks)}, and this run has {world_size}. Resume at world size {len(of_ranks)}, or "
            "leave the engine out of the objects, so that it begins anew with what else was saved"
        )


class _KeptOptimizer(_Plain):
    """An optimizer; what it keeps of sharded parameters is sharded as they are."""

    def template(self) -> Any:
        parameters = {id(each): each for group in self.value.param_groups for each in group["params"]}
        return {
            "state": {
                at: ShardedLike(each.detach())
                for at, each in enumerate(parameters.values())  # as Optimizer.state_dict counts them
            }
        }


class _Generator:
    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> Any:
        return self.generator.get_state()

    def load_state_dict(self, state: Any, /) -> None:
        self.generator.set_state(state)


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
        known = [] if world is None else internals(world).wrapped_modules()
        around = [each for each in known if id(unwrap(each)) in inner]
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
