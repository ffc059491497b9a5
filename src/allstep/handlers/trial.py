"""A trial: steps of a trainer that leave no trace, for finding settings before a run.

Contract: `trial_engine` makes another engine that runs a trainer's step, without the trainer's handlers. In the body of
`without_effect` it may train; behind it everything is as it was, to the last bit, also after an exception: parameters,
buffers and gradients of the modules that the trainer trains, its optimizers and what else its checkpoint would save,
random generators, the modes of modules, and the place in data that tells its place. What the step changes besides stays
changed. Each rank puts back its own, and asks no other. `SizeSearch` says which batch sizes to try, one after another:
sizes are doubled until one is too large, and the gap between that and the largest that fits is halved then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from allstep.checkpoint import rng
from allstep.coordination import Coordinator
from allstep.data.compositions import is_one_shot, loaders_inside
from allstep.engine import Engine
from allstep.engine.position import stateful_of
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.handlers.model_parts import kept_modes
from allstep.parallel import is_dtensor
from allstep.world import World, internals

Step: TypeAlias = Callable[[Engine, Any], Any]


def trial_engine(
    trainer: Engine,
    name: str,
    coordinator: Coordinator | None = None,
    around: Callable[[Step], Step] = lambda step: step,
) -> Engine:
    """An engine with the step and settings of a trainer, and none of its handlers; it counts samples.

    Args:
        trainer: whose step is tried.
        name: what for.
        coordinator: how ranks agree; by default as the trainer's.
        around: what is to run in place of the trainer's step, given that.

    Raises:
        ArgumentTypeError: trainer is no engine.
    """
    if not isinstance(trainer, Engine):
        raise ArgumentTypeError(f"trainer is {trainer!r}; give the Engine whose step is to be tried")
    settings = trainer.extension.settings
    engine = Engine(
        around(trainer.process_function),
        coordinator=trainer.coordinator if coordinator is None else coordinator,
        accumulate=settings.accumulate,
        samples_in=settings.samples_in,
        uneven=settings.uneven,
        idle=settings.idle,
        resumes=False,
        precision=settings.precision,
        name=f"{name} of {settings.name}",
    )
    engine.modules.extend(trainer.modules)
    engine.extension.count_samples()
    return engine


def trained_modules(trainer: Engine) -> list[nn.Module]:
    """The modules that a trainer's step may change.

    Raises:
        ArgumentError: none is known.
    """
    world = World.current()
    states = [each for each in trainer.extension.states.values() if isinstance(each, nn.Module)]
    wrapped = [] if world is None else internals(world).wrapped_modules()
    modules = list(dict.fromkeys([*wrapped, *trainer.modules, *states]))
    if not modules:
        raise ArgumentError(
            "trainer knows no module that its step trains, so that nothing could be put back; wrap the model with "
            "world.wrap, or append it to trainer.modules"
        )
    return modules


@contextmanager
def without_effect(trainer: Engine, optimizer: Optimizer, data: Any = None) -> Iterator[None]:
    """Put back behind the body what trial steps in it have changed.

    Args:
        trainer: whose step is tried.
        optimizer: that the step uses; others are known where the trainer's checkpoint saves them.
        data: what is run over.

    Raises:
        ArgumentError: data can be read only once, or no module is known.
        ArgumentTypeError: optimizer is none.
    """
    if not isinstance(optimizer, Optimizer):
        raise ArgumentTypeError(f"optimizer is {optimizer!r}; give the torch optimizer that the step uses")
    if data is not None and is_one_shot(data):
        raise ArgumentError(
            f"data is a {type(data).__name__}, which can be read only once, so that the run would miss what a trial "
            "read; give a loader, or a list of some batches"
        )
    modules = trained_modules(trainer)
    others = [each for each in trainer.extension.states.values() if not isinstance(each, nn.Module | Optimizer)]
    optimizers = [each for each in trainer.extension.states.values() if isinstance(each, Optimizer)]
    if (place := stateful_of(data)) is not None:
        others.append(place)
    with ExitStack() as stack:
        generators = rng.capture()
        stack.callback(rng.restore, generators)
        for generator in _generators_of(data):
            stack.callback(generator.set_state, generator.get_state())
        for each in others:
            stack.callback(each.load_state_dict, copy.deepcopy(each.state_dict()))
        for module in modules:
            stack.enter_context(kept_modes(module))
            stack.callback(_noted_module(module))
        for each in dict.fromkeys([optimizer, *optimizers]):
            stack.callback(_noted_optimizer(each))
        yield


@contextmanager
def steps_alone(trainer: Engine) -> Iterator[None]:
    """Have forward and backward passes of a trainer's modules wait for no other rank in the body.

    Raises:
        ArgumentError: one is in parts over ranks, whose passes are collectives.
    """
    modules = trained_modules(trainer)
    if any(is_dtensor(parameter) for each in modules for parameter in each.parameters()):
        raise ArgumentError(
            "the trainer's model is sharded over ranks, so no rank can make a step alone: one that ran out of memory "
            "would leave the others waiting. Choose the batch size by world.plan, which "
            "says what training takes on each rank"
        )
    wrapped = [each for each in modules if isinstance(each, DistributedDataParallel)]
    before = [(each.require_backward_grad_sync, each.require_forward_param_sync) for each in wrapped]
    for each in wrapped:
        each.require_backward_grad_sync = each.require_forward_param_sync = False
    try:
        yield
    finally:
        for each, (backward, forward) in zip(wrapped, before, strict=True):
            each.require_backward_grad_sync, each.require_forward_param_sync = backward, forward


def _noted_module(module: nn.Module) -> Callable[[], None]:
    """What puts a module's tensors and gradients back."""
    kept = [(each, _copied(each)) for each in (*module.parameters(), *module.buffers())]
    gradients = [(each, each.grad, _copied(each.grad)) for each in module.parameters()]

    @torch.no_grad()
    def put_back() -> None:
        for tensor, value in kept:
            tensor.copy_(value)
        for parameter, gradient, value in gradients:
            parameter.grad = gradient
            if gradient is not None:
                gradient.copy_(value)

    return put_back


def _noted_optimizer(optimizer: Optimizer) -> Callable[[], None]:
    """What puts an optimizer's groups and states back, into the tensors that it has."""
    groups = [
        _noted({name: each for name, each in group.items() if name != "params"}) for group in optimizer.param_groups
    ]
    states = {of: _noted(state) for of, state in optimizer.state.items()}

    @torch.no_grad()
    def put_back() -> None:
        for group, noted in zip(optimizer.param_groups, groups, strict=True):
            group.update({**noted(), "params": group["params"]})
        before = {of: noted() for of, noted in states.items()}
        optimizer.state.clear()
        optimizer.state.update(before)

    return put_back


def _noted(values: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What gives the values as they are now: the same tensors, filled as they were."""
    tensors = {name: (each, _copied(each)) for name, each in values.items() if isinstance(each, torch.Tensor)}
    others = {name: copy.deepcopy(each) for name, each in values.items() if name not in tensors}

    def put_back() -> dict[str, Any]:
        for each, value in tensors.values():
            each.copy_(value)
        return {**others, **{name: each for name, (each, _) in tensors.items()}}

    return put_back


def _copied(tensor: torch.Tensor | None) -> Any:
    """A copy on the host, where there is more room; of a sharded tensor beside it."""
    if tensor is None:
        return None
    return tensor.detach().clone() if is_dtensor(tensor) else tensor.detach().to("cpu", copy=True)


def _generators_of(data: Any) -> list[torch.Generator]:
    """The generators of their own that loaders and samplers in data draw their order from."""
    found: list[torch.Generator] = []
    for loader in loaders_inside(data):
        batch_sampler = loader.batch_sampler
        for owner in (loader, loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and all(generator is not each for each in found):
                found.append(generator)
    return found


@dataclass
class SizeSearch:
    """A search that has not ended while there is a size to try.

    Attributes:
        size: to try next; None at the end.
        most: no larger one is tried.
        halvings: how often the gap may still be halved.
        largest: that fits, of those that were tried; 0 while none does.
        too_large: the smallest that was tried and did not fit; None while all did.
    """

    size: int | None
    most: int
    halvings: int
    largest: int = 0
    too_large: int | None = None

    def note(self, size: int, fits: bool, *, is_last: bool) -> None:
        """Go on from what became of a size; `is_last` where a larger one would be no larger batch."""
        if fits:
            self.largest = size
        else:
            self.too_large = size
        if fits and is_last:
            self.size = None
        elif self.too_large is None:
            self.size = min(2 * size, self.most) if size < self.most else None
        else:
            middle = (self.largest + self.too_large) // 2
            self.size = middle if self.halvings and middle > self.largest else None
            self.halvings -= 1
