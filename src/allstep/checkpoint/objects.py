"""What is saved of each kind of object, and how it comes back.

Contract: `Checkpoint` makes one `ObjectAdapter` for each object that it was given. `collect_states` asks them all, on
every rank, for two states: what is the same on every rank, and what this rank has for itself. `load` gives both back,
to the objects of a run of any world size. An object whose state cannot be had fails the save, and keeps no rank
from asking the others.

Modules are taken out of DDP, DataParallel and torch.compile, wherever in the module these are. The names of its tensors
do not tell how parts are wrapped, since a run at another world size wraps other parts, or none. Buffers are rank 0's
where DDP broadcasts them before a forward pass. Where nobody does, each rank gets its own back, and ranks beyond those
that saved get rank 0's.

The sharded parameters of FSDP2 and of tensor parallelism are DTensors, which know how they are sharded; `template` says
which state is to be filled in place. Those of FSDP1 are plain tensors, so it is refused. Whatever else has `state_dict`
and `load_state_dict` is saved as it is.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.checkpoint.encoding import FromRankZero
from allstep.checkpoint.optimizer_state import OptimizerAdapter
from allstep.checkpoint.torch_private import module_versions, set_module_versions
from allstep.engine import Engine
from allstep.engine.extension import Stateful
from allstep.engine.resume import position_from
from allstep.engine.run_plan import is_done
from allstep.errors import CheckpointError, UnsupportedStateError
from allstep.parallel import PlainNames, broadcasts_buffers, is_dtensor, unify_buffers, unwrap
from allstep.world import World, current_data_ranks, internals


@dataclass(frozen=True, slots=True)
class PerRank:
    """Says of an object that its state differs by rank, such as a metric in the middle of an epoch.

    Each rank gets its own back. At another world size, an object that has `load_rank_states(states)` is given the
    states of all ranks; without it ranks beyond the saved ones keep what they have, and states without a rank are left.
    """

    stateful: Stateful


class ObjectAdapter(Protocol):
    """How one object is saved and loaded."""

    def states(self) -> tuple[Any, Any]:
        """What is the same on every rank, and what this rank has for itself; None where there is nothing."""

    def template(self) -> Any:
        """State to be filled in place, or None."""

    def load(self, state: Any, rank_states: list[Any], rank: int) -> None:
        """Take over `state`, and what is for `rank` of what each rank that saved had for itself."""


@dataclass(frozen=True, slots=True)
class CollectedStates:
    """The states of all objects: what is the same on every rank, what this rank has, and why one could not be had."""

    common: dict[str, Any]
    per_rank: dict[str, Any]
    failure: str | None


def adapters_for(objects: Mapping[str, Any], trainers: Sequence[Engine] = ()) -> dict[str, ObjectAdapter]:
    """How each object is saved and loaded.

    Args:
        objects: by name.
        trainers: the engines that the checkpoint is attached to. Others that have finished, such as evaluators, begin
            anew in a resumed run too; a trainer has nothing left to do then. Without any, every engine is a trainer.

    Raises:
        UnsupportedStateError: an object has no state that can be saved.
    """
    modules = {name: unwrap(each) for name, each in objects.items() if isinstance(each, nn.Module)}
    return {name: _adapter(name, each, trainers, modules) for name, each in objects.items()}


def collect_states(adapters: Mapping[str, ObjectAdapter]) -> CollectedStates:
    """Ask all objects for their states; the first that raises is the failure.

    The others are asked nevertheless: a module in DDP broadcasts its buffers, and a rank that gave up before would
    leave the others waiting in that collective.
    """
    common: dict[str, Any] = {}
    per_rank: dict[str, Any] = {}
    failure: str | None = None
    for name, adapter in adapters.items():
        try:
            state, rank_state = adapter.states()
        except Exception as error:
            failure = failure or f"the state of {name!r} cannot be had: {type(error).__name__}: {error}"
            continue
        if state is not None:
            common[name] = state
        if rank_state is not None:
            per_rank[name] = rank_state
    return CollectedStates(common, per_rank, failure)


def _is_metric(value: Any) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")  # importing it takes seconds; where nobody did, there is no metric
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric | torchmetrics.MetricCollection)


def _has_flat_shards(module: nn.Module) -> bool:
    # Importing it takes seconds, and where nothing has imported it nothing is wrapped.
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return fsdp is not None and any(isinstance(each, fsdp) for each in module.modules())


def _adapter(name: str, value: Any, trainers: Sequence[Engine], modules: Mapping[str, nn.Module]) -> ObjectAdapter:
    if isinstance(value, Engine):
        return _EngineAdapter(value, trains=not trainers or value in trainers)
    if isinstance(value, PerRank):
        return _PerRankAdapter(value.stateful)
    if isinstance(value, torch.Generator):
        return _PerRankAdapter(_GeneratorState(value))
    if _is_metric(value):
        raise UnsupportedStateError(
            f"{name!r} is a metric of torchmetrics, which leaves its states out of its state_dict; make it an entry of "
            "allstep.Metrics, attach that, and give the Metrics to the checkpoint"
        )
    if isinstance(value, nn.Module):
        if _has_flat_shards(value):
            raise UnsupportedStateError(
                f"{name!r} is or holds a FullyShardedDataParallel module, whose shards are plain tensors that do not "
                "tell what they are part of; shard it with torch.distributed.fsdp.fully_shard instead"
            )
        return ModuleAdapter(unwrap(value))
    if isinstance(value, torch.optim.Optimizer):
        return OptimizerAdapter(value, modules)
    if not callable(getattr(value, "state_dict", None)) or not callable(getattr(value, "load_state_dict", None)):
        raise UnsupportedStateError(
            f"{name!r} is a {type(value).__name__}, which has no state_dict() and load_state_dict(); leave it out"
        )
    return _PerRankAdapter(value) if getattr(value, "state_differs_by_rank", False) else _StatefulAdapter(value)


class _StatefulAdapter:
    """An object whose state is the same on every rank."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def states(self) -> tuple[Any, Any]:
        return self.value.state_dict(), None

    def template(self) -> Any:
        return None

    def load(self, state: Any, rank_states: list[Any], rank: int) -> None:
        self.value.load_state_dict(state)


class _PerRankAdapter(_StatefulAdapter):
    """An object whose state differs by rank."""

    def states(self) -> tuple[Any, Any]:
        return None, self.value.state_dict()

    def load(self, state: Any, rank_states: list[Any], rank: int) -> None:
        # What can be joined and split anew, such as a metric's counts, takes what all ranks had.
        take_all = getattr(self.value, "load_rank_states", None)
        if take_all is not None:
            take_all(rank_states)
        elif rank < len(rank_states):
            self.value.load_state_dict(rank_states[rank])


class _EngineAdapter(_StatefulAdapter):
    """An engine: its counters and its position in data that is split by arithmetic are the same on all ranks.

    A position that each rank's data told of itself ("own") is that rank's. It is taken up at the world size at which it
    was saved, and refused at any other.
    """

    def __init__(self, value: Engine, *, trains: bool) -> None:
        super().__init__(value)
        self.trains = trains

    def states(self) -> tuple[Any, Any]:
        state = dict(self.value.state_dict())
        own = state.pop("data") if "own" in state.get("data", {}) else None
        return state, own

    def load(self, state: Any, rank_states: list[Any], rank: int) -> None:
        position = position_from(state, self.value.state_dict_user_keys)
        has_finished = is_done(position.iteration, position.epochs_completed, position.max_epochs, position.max_iters)
        if not self.trains and has_finished:
            # An evaluator begins anew when it is run, as it does in an unbroken run.
            for key in self.value.state_dict_user_keys:
                setattr(self.value.state, key, state[key])
            return
        if not self.trains:
            state = {key: each for key, each in state.items() if key != "finished"}  # which would keep it from running
        _check_own_positions(rank_states)
        own = rank_states[rank] if rank < len(rank_states) else None
        self.value.load_state_dict(state if own is None else {**state, "data": own})


def _check_own_positions(rank_states: Sequence[Any]) -> None:
    """Refuse, on all ranks alike, data's own states that were saved by more or fewer ranks than there are."""
    world_size = current_data_ranks().size
    if len(rank_states) != world_size and any(each is not None for each in rank_states):
        raise CheckpointError(
            "the engine's place is what each rank's data told of itself, which cannot be split anew: it was saved at "
            f"world size {len(rank_states)}, and this run has {world_size}. Resume at world size {len(rank_states)}, "
            "or name it in Checkpoint(leave_out=[trainer]), so that it begins anew with what else was saved"
        )


class _GeneratorState:
    """A torch.Generator with the methods of `Stateful`."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> Any:
        return self.generator.get_state()

    def load_state_dict(self, state: Any, /) -> None:
        self.generator.set_state(state)


class ModuleAdapter:
    """A module that is no wrapper itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def states(self) -> tuple[Any, Any]:
        """The whole state, and this rank's buffers that nobody broadcasts."""
        # Buffers become what the next forward pass would make of them, so that ranks save the same.
        for replica in self._replicas():
            if broadcasts_buffers(replica):
                unify_buffers(replica)
        names = PlainNames(self.module)
        state = _tied_once(self.module, self.module.state_dict())
        own = self._own_buffers(state)
        plain: OrderedDict[str, Any] = OrderedDict(
            (names.plain(name), FromRankZero(value) if name in own else value) for name, value in state.items()
        )
        versions = module_versions(state)
        if versions is not None:
            set_module_versions(plain, {names.plain_module(name): each for name, each in versions.items()})
        if _world_size() == 1:
            return plain, None  # the buffers are in the whole state
        return plain, {names.plain(name): buffer for name, buffer in own.items()} or None

    def template(self) -> Any:
        """The sharded tensors, which are filled in place."""
        names = PlainNames(self.module)
        state = self.module.state_dict()
        sharded = {names.plain(name): value for name, value in state.items() if is_dtensor(value)}
        return sharded or None

    def load(self, state: Any, rank_states: list[Any], rank: int) -> None:
        """Take over `state`, and this rank's buffers."""
        names = PlainNames(self.module)
        # From the names in the checkpoint to those that this run's wrappers give.
        wrapped = {names.plain(name): name for name in self.module.state_dict()}
        named: OrderedDict[str, Any] = OrderedDict((wrapped.get(name, name), value) for name, value in state.items())
        versions = module_versions(state)
        if versions is not None:
            modules = [
                (name, names.plain_module(name)) for name, _ in self.module.named_modules(remove_duplicate=False)
            ]
            set_module_versions(named, {name: versions[plain] for name, plain in modules if plain in versions})
        self.module.load_state_dict(named)
        buffers = rank_states[rank] if rank < len(rank_states) else None
        # After load_state_dict, which has filled in rank 0's for ranks that have none of their own.
        with torch.no_grad():
            for name, buffer in (buffers or {}).items():
                self.module.get_buffer(wrapped[name]).copy_(buffer)

    def _own_buffers(self, state: Container[str]) -> dict[str, torch.Tensor]:
        """Buffers with a name in the state that no DDP broadcasts."""
        # By identity: a buffer has one name inside its wrapper and another outside.
        broadcast = {
            id(buffer) for replica in self._replicas() if replica.broadcast_buffers for buffer in replica.buffers()
        }
        return {
            name: buffer
            for name, buffer in self.module.named_buffers(remove_duplicate=False)
            if name in state and id(buffer) not in broadcast and not is_dtensor(buffer)
        }

    def _replicas(self) -> list[DistributedDataParallel]:
        """DDP modules in the module or, where it was given without its wrapper, around it."""
        # A script may give the module that it wrapped and not the wrapper; then only the World knows of that.
        world = World.current()
        inside = list(self.module.modules())
        inner = {id(each) for each in inside}
        known = [] if world is None else internals(world).wrapped_modules()
        around = [each for each in known if id(unwrap(each)) in inner]
        found = [each for each in (*inside, *around) if isinstance(each, DistributedDataParallel)]
        return list(dict.fromkeys(found))


def _tied_once(module: nn.Module, state: Any) -> Any:
    """A module's state in which a sharded parameter of several names is one tensor, so that it is saved once.

    Tensors that are no DTensors show it by their memory.
    """
    first: dict[int, Any] = {}
    for name, each in module.named_parameters(remove_duplicate=False):
        if is_dtensor(state.get(name)):
            state[name] = first.setdefault(id(each), state[name])
    return state


def _world_size() -> int:
    world = World.current()
    return 1 if world is None else world.world_size
