"""Digests of what a training step depends on, for finding out where two runs part.

Contract: called in a rank. Nothing is changed: no tensor, no random generator. `find_objects` looks once, through
everything that Python's garbage collector knows, for optimizers, schedulers and generators; `digests_of` says what they
hold now. The same values have the same digest in any process.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from allstep.parallel import is_dtensor
from allstep.rehearsal.iteration_trace import GENERATORS
from allstep.world import World, internals

PARAMETERS = "parameters"
OPTIMIZERS = "optimizers"
OPTIONS = "options"
SCHEDULERS = "schedulers"
OWN_GENERATORS = "own generators"

_GENERATORS = (torch.Generator, np.random.Generator)
_DEEPEST = 20
_MOST_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class HeldObjects:
    """What a process holds, apart from the modules that its World has wrapped."""

    optimizers: tuple[Optimizer, ...]
    schedulers: tuple[Any, ...]
    generators: tuple[Any, ...]


def find_objects() -> HeldObjects:
    """Look through everything; takes about a second."""
    gc.collect()  # what is garbage would be found as well
    known = gc.get_objects()
    of_libraries = {id(torch.default_generator)}
    optimizers = [each for each in known if issubclass(type(each), Optimizer)]
    schedulers = [each for each in known if issubclass(type(each), LRScheduler | ReduceLROnPlateau)]
    # Generators are not known themselves, and neither is a dict of nothing else, but to what refers to them.
    generators: dict[int, Any] = {}
    for each in known:
        for inner in gc.get_referents(each):
            if type(inner) in _GENERATORS:
                generators[id(inner)] = inner
            elif type(inner) is dict and not gc.is_tracked(inner):
                generators |= {id(value): value for value in inner.values() if type(value) in _GENERATORS}
    for identity in of_libraries:
        generators.pop(identity, None)
    return HeldObjects(tuple(optimizers), tuple(schedulers), tuple(generators.values()))


def digests_of(held: HeldObjects) -> dict[str, str]:
    """Digests by part, of what all this holds now."""
    parameters = [group["params"] for optimizer in held.optimizers for group in optimizer.param_groups]
    options = [
        {name: value for name, value in group.items() if name != "params"}
        for optimizer in held.optimizers
        for group in optimizer.param_groups
    ]
    states = [_states_in_order(optimizer) for optimizer in held.optimizers]
    return {
        PARAMETERS: digest([parameters, [_tensors_of(each) for each in _wrapped()]]),
        OPTIMIZERS: _unordered(states),
        OPTIONS: _unordered(options),
        SCHEDULERS: _unordered(each.state_dict() for each in held.schedulers),
        GENERATORS: digest([random.getstate(), np.random.get_state(), torch.get_rng_state()]),
        OWN_GENERATORS: _unordered(_generator_state(each) for each in held.generators),
    }


def samples_digest(batch: Any) -> str:
    """A digest of the samples of a batch that does not depend on their order, so that those of ranks can be added."""
    tensors: list[torch.Tensor] = []
    _collect(batch, tensors)
    lengths = {len(each) if each.dim() else -1 for each in tensors}
    if len(lengths) != 1 or not 0 < next(iter(lengths)) <= _MOST_ROWS:
        return digest(batch)
    rows = zip(*(each.detach().cpu() for each in tensors), strict=True)
    return f"{sum(int(digest(list(row)), 16) for row in rows) % (1 << 64):x}"


def digest(value: Any) -> str:
    """A digest of a nested value; of what has no plain value only the type counts."""
    hasher = xxhash.xxh3_64()
    _feed(hasher, value, 0)
    return str(hasher.hexdigest())


def _feed(hasher: Any, value: Any, depth: int) -> None:
    if isinstance(value, torch.Tensor):
        local = value.detach()
        if is_dtensor(local):
            local = local.to_local()
        if local.layout is not torch.strided:
            local = local.to_dense()
        flat = local.cpu().contiguous().reshape(-1)
        hasher.update(f"{flat.dtype}{tuple(local.shape)}".encode())
        hasher.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, np.ndarray | np.generic):
        hasher.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping) and depth < _DEEPEST:
        hasher.update(f"{{{len(value)}".encode())
        for key, item in value.items():
            hasher.update(repr(key).encode())
            _feed(hasher, item, depth + 1)
    elif isinstance(value, list | tuple) and depth < _DEEPEST:
        hasher.update(f"[{len(value)}".encode())
        for item in value:
            _feed(hasher, item, depth + 1)
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
        hasher.update(repr(value).encode())
    else:
        hasher.update(type(value).__qualname__.encode())


def _unordered(values: Iterable[Any]) -> str:
    # The collector's order is not that of the script.
    return digest(sorted(digest(each) for each in values))


def _states_in_order(optimizer: Optimizer) -> list[Any]:
    """The state of each parameter, in the order of groups; that of the optimizer's own table is the step's."""
    return [optimizer.state.get(each, {}) for group in optimizer.param_groups for each in group["params"]]


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _wrapped() -> list[nn.Module]:
    world = World.current()
    return [] if world is None else internals(world).wrapped_modules()


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return repr(generator.bit_generator.state)


def _collect(value: Any, tensors: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
    elif isinstance(value, Mapping):
        for each in value.values():
            _collect(each, tensors)
    elif isinstance(value, list | tuple):
        for each in value:
            _collect(each, tensors)
