"""A script run up to its first training steps, without devices and values: the work of `allstep plan`.

Contract: `plan_script` runs the script in this process as rank 0 of ranks that are not there. Until it ends, three
names mean something else to the script. `allstep.init` gives a `PlannedWorld`, whose `wrap` has a module lose its
values and be put over those ranks, and whose collectives are those of a world of one. `Engine.run` takes the first
batch, runs two optimizer steps under a `StepTrace`, and ends the script with the plan. `Checkpoint.resume` finds
nothing. Parameters are built without values, so that no model needs its memory. Handlers of events are not called.

An engine whose step gives no gradients evaluates: its run is left out, and the script goes on. What can go wrong is a
ParallelError: a step that reads values, a script that wraps no model or runs no engine.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import allstep
from allstep.checkpoint import Checkpoint
from allstep.engine import Engine, State
from allstep.engine.autocast_step import step_in_precision
from allstep.errors import ParallelError
from allstep.parallel import LoadedWeights, is_fully_sharded, materialised_later, unreduced
from allstep.placement import MeshShape, Placement, Rendezvous, resolve_mesh
from allstep.planning import Plan, Training, plan_that_fits
from allstep.planning.absent_ranks import (
    GradientBuckets,
    broadcasts_of,
    groups_of,
    lose_values,
    meshes_of,
    put_over_ranks,
    said_where_values_are_read,
    watched_gradients,
    without_value,
)
from allstep.planning.step_trace import StepTrace
from allstep.planning.torch_private import fake_ranks, fake_tensors
from allstep.planning.what_fits import CHANGED_OPTIONS
from allstep.world import World, initialization, internals
from allstep.world.collectives import Collectives
from allstep.world.device_mesh import choose_mesh
from allstep.world.lifetime import make_current
from allstep.world.move import rebuilt
from allstep.world.plan_training import wrap_for_absent_ranks

_CPU = torch.device("cpu")
_REMEDY = "call world.plan(model, batch, step=...) in it instead"


def plan_script(
    target: str,
    arguments: Sequence[str] = (),
    *,
    is_module: bool = False,
    ranks: int | None = None,
    mesh: Mapping[str, int] | None = None,
    memory: int | None = None,
) -> Plan:
    """What training takes on each rank, as a script does it.

    Args:
        target: the script's path, or the module's name.
        arguments: its own.
        is_module: run a module, as `python -m`.
        ranks: how many there are; by default what the mesh's sizes make up, or else 1.
        mesh: which comes before the script's own.
        memory: bytes of a device. Where the plan does not fit it, changes are tried; see `allstep.planning.what_fits`.

    Raises:
        ParallelError: the script cannot be planned.
        Exception: whatever the script raises.
    """
    found: list[Rehearsal] = []

    def rehearsed(training: Training | None) -> Plan:
        rehearsal = Rehearsal(ranks, mesh) if training is None else Rehearsal(training.ranks, training.mesh, training)
        found.append(rehearsal)
        return rehearsal.run_script(target, arguments, is_module)

    plan = rehearsed(None)
    first = found[0].first
    if memory is None or first is None:
        return replace(plan, memory=memory)
    return plan_that_fits(first, memory, lambda training: plan if training is first else rehearsed(training))


class _Planned(BaseException):
    """Ends the script: all there is to know is known."""


@dataclass(slots=True)
class _Wrapped:
    model: nn.Module
    buckets: GradientBuckets | None
    on_host: bool


@dataclass(slots=True)
class Rehearsal:
    """One run of a script on ranks that are not there.

    Attributes:
        asked_ranks, asked_mesh: from outside; None for what the script says.
        changed: another training to try: its mesh, options and batch come before the script's.
        first: the first model that the script wraps, as a training.
        plan: what came of it.
    """

    asked_ranks: int | None
    asked_mesh: Mapping[str, int] | None
    changed: Training | None = None
    first: Training | None = None
    plan: Plan | None = None
    mode: Any = None
    _trains: bool = False
    _wrapped: list[_Wrapped] = field(default_factory=list)
    _groups: dict[str, tuple[str, int]] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _building: ExitStack = field(default_factory=ExitStack)

    def run_script(self, target: str, arguments: Sequence[str], is_module: bool) -> Plan:
        """Run it until its first training steps are done."""
        self.mode = fake_tensors()
        with self._stack, _instead(self), self._building, _command_line(target, arguments, is_module):
            self._building.enter_context(materialised_later())
            try:
                if is_module:
                    runpy.run_module(target, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(target, run_name="__main__")
            except _Planned:
                pass
            except SystemExit as exit_:
                if self.plan is None and exit_.code not in (None, 0):
                    raise ParallelError(f"{target} ended with {exit_.code!r} before an engine of it trained") from exit_
        if self.plan is None:
            raise ParallelError(f"{target} ended and no engine of it has trained a wrapped model; {_REMEDY}")
        return self.plan

    # What the script's names mean

    def open_world(self, mesh: Mapping[str, int] | None, seed: int | None) -> World:
        """The World of rank 0."""
        if self._groups:
            raise ParallelError(f"the script opens a second World, which allstep plan does not follow; {_REMEDY}")
        sizes = self.asked_mesh if self.asked_mesh is not None else choose_mesh(mesh, os.environ)
        known = sizes is not None and -1 not in sizes.values()
        ranks = self.asked_ranks or (prod(sizes.values()) if sizes and known else 1)
        placement = Placement("alone", world_size=ranks, local_world_size=ranks, rendezvous=Rendezvous("", ()))
        shape = resolve_mesh(sizes, placement) if sizes else None
        self._stack.enter_context(fake_ranks(ranks))
        world = PlannedWorld(placement, shape, self)
        if seed is not None:
            world.seed_everything(seed)
        make_current(world)
        self._stack.callback(world.close)  # where the script leaves it open
        return world

    def wrap(self, world: PlannedWorld, module: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        """Have a module lose its values, and put it over the ranks."""
        if self.changed is not None:
            # Classes among the others are those of an earlier run of the script, which are no longer its own.
            added = {name: self.changed.options.get(name) for name in CHANGED_OPTIONS}
            options = {**options, **{name: each for name, each in added.items() if each and not options.get(name)}}
        mesh = {} if world.shape is None else dict(zip(world.shape.names, world.shape.sizes, strict=True))
        training = Training(
            module, None, world.world_size, mesh, _CPU, wrap_for_absent_ranks, rebuilt, options, optimizer=None
        )
        self._building.close()  # it would take away that these are not on "meta"
        lose_values(module, self.mode, _CPU)
        model, group = put_over_ranks(training, module, world.mesh, world.model_mesh)
        self._building.enter_context(materialised_later())
        with self.mode:
            buckets = None if group is None else GradientBuckets(model, group, broadcasts=broadcasts_of(training))
        self._groups = groups_of(world.mesh, world.model_mesh, world.world_size)
        self._wrapped.append(_Wrapped(model, buckets, bool(options.get("cpu_offload"))))
        if self.first is None:
            self.first = training
        internals(world).add_wrapped(model)
        return model

    def run_engine(self, engine: Engine, data: Any) -> State:
        """Run an engine's step for two optimizer steps; only the state of one that evaluates comes back."""
        if not self._wrapped:
            raise ParallelError(f"the script runs an engine and has wrapped no model by world.wrap; {_REMEDY}")
        source = engine.state.dataloader if data is None else data
        batch = None if source is None else next(iter(source))
        assert self.first is not None
        if self.changed is not None:
            batch = _cut(batch, self.changed.batch)
        trace = StepTrace(self._groups, self.mode)
        for each in self._wrapped:
            trace.hold("parameters", each.model.parameters(), on_host=each.on_host)
            trace.hold("inputs", each.model.buffers())
            trace.hold("gradients", [] if each.buckets is None else each.buckets.tensors)
        step: Callable[[Any], Any] = MethodType(engine.process_function, engine)
        if (precision := engine.extension.settings.precision) != "no":
            step = step_in_precision(step, precision, [each.model for each in self._wrapped])
        with self.mode, said_where_values_are_read(), ExitStack() as watching:
            watching.enter_context(trace)
            for each in self._wrapped:
                watching.enter_context(watched_gradients(each.model, trace))
            watching.enter_context(self._followed_optimizers(trace))
            for _ in range(2):
                trace.forget_traffic()
                self._optimizer_step(engine, step, source, batch, trace)
        if not self._trains:
            engine.state.iteration = engine.state.epoch = 0
            return engine.state
        held, peak, moment, host = trace.memory()
        self.first = replace(self.first, batch=batch)
        self.plan = Plan(self.first.ranks, self.first.mesh, held, peak, moment, host, trace.traffic())
        raise _Planned

    def _optimizer_step(
        self, engine: Engine, step: Callable[[Any], Any], source: Any, batch: Any, trace: StepTrace
    ) -> None:
        state, settings = engine.state, engine.extension.settings
        state.dataloader, state.epoch = source, 1
        for part in range(settings.accumulate):
            is_last = part == settings.accumulate - 1
            state.iteration += 1
            state.weight, state.group_end, state.active = 1 / settings.accumulate, is_last, True
            state.batch = None  # as in the loop, not kept alive while the next is made
            state.batch = rebuilt(batch, lambda leaf: without_value(leaf, _CPU, trace))
            state.samples = 1
            trace.phase = "forward"
            with ExitStack() as stack:
                for each in self._wrapped:
                    if each.buckets is not None:
                        each.buckets.reduces = is_last
                    elif not is_last and is_fully_sharded(each.model):
                        stack.enter_context(unreduced(each.model))
                state.output = step(state.batch)
        state.batch = state.output = None

    @contextmanager
    def _followed_optimizers(self, trace: StepTrace) -> Iterator[None]:
        """Have the trace know what gradients and optimizers hold, and where the step is."""
        host = {id(one) for each in self._wrapped if each.on_host for one in each.model.parameters()}

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for each in group["params"]:
                    trace.hold("gradients", [] if each.grad is None else [each.grad], on_host=id(each) in host)
            self._trains, trace.phase = True, "optimizer"

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for parameter, state in optimizer.state.items():
                tensors = [each for each in state.values() if isinstance(each, torch.Tensor)]
                trace.hold("optimizer", tensors, on_host=id(parameter) in host)
            trace.phase = "forward"

        backward: Any = torch.Tensor.backward

        def noted(tensor: torch.Tensor, *given: Any, **options: Any) -> Any:
            self._trains, trace.phase = True, "backward"
            return backward(tensor, *given, **options)

        handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        torch.Tensor.backward = noted  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.Tensor.backward = backward  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()


class PlannedWorld(World):
    """The World of rank 0 of ranks that are not there."""

    def __init__(self, placement: Placement, shape: MeshShape | None, rehearsal: Rehearsal) -> None:
        super().__init__(placement, _CPU, None, 60.0, mesh=shape)
        self.shape = shape
        self._rehearsal = rehearsal
        # Nobody answers, so a collective has one rank's word.
        self._collectives = Collectives(0, 1, _CPU, _CPU)
        sizes = {} if shape is None else dict(zip(shape.names, shape.sizes, strict=True))
        self.mesh, self.model_mesh = meshes_of(sizes, _CPU)

    def wrap(self, module: nn.Module, **options: Any) -> nn.Module:
        """See `Rehearsal.wrap`."""
        return self._rehearsal.wrap(self, module, options)

    def rewrap(self, module: nn.Module) -> None:
        """Nothing is reduced by a wrapper."""

    def unify_buffers(self, module: nn.Module) -> None:
        """There are no others."""

    def load_pretrained(self, module: nn.Module, folder: Any, **options: Any) -> LoadedWeights:
        """Values count for nothing."""
        return LoadedWeights([], [])


@contextmanager
def _instead(rehearsal: Rehearsal) -> Iterator[None]:
    """Have the script's names mean the rehearsal."""

    def init(
        backend: Any = None, device: Any = None, timeout: Any = None, seed: int | None = None, **options: Any
    ) -> World:
        return rehearsal.open_world(options.get("mesh"), seed)

    def run(engine: Engine, data: Any = None, *_: Any, **__: Any) -> State:
        return rehearsal.run_engine(engine, data)

    def resume(*_: Any, **__: Any) -> None:
        return None

    names: list[tuple[Any, str, Callable[..., Any]]] = [
        (allstep, "init", init),
        (allstep.world, "init", init),
        (initialization, "init", init),
        (Engine, "run", run),
        (Checkpoint, "resume", resume),
    ]
    with ExitStack() as stack:
        for holder, name, function in names:
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, function)
        yield


@contextmanager
def _command_line(target: str, arguments: Sequence[str], is_module: bool) -> Iterator[None]:
    """Have the script find its arguments, and modules beside it, as it would under Python."""
    before, path = sys.argv, list(sys.path)
    sys.argv = [target, *arguments]
    sys.path.insert(0, os.getcwd() if is_module else os.path.dirname(os.path.abspath(target)))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before, path


def _cut(batch: Any, like: Any) -> Any:
    """The first samples of a batch, as many as another has."""
    lengths: list[int] = []
    for each in (batch, like):
        rebuilt(each, lambda leaf: lengths.append(len(leaf)) if isinstance(leaf, torch.Tensor) and leaf.dim() else None)
    whole, kept = lengths[0], lengths[len(lengths) // 2]
    return rebuilt(batch, lambda leaf: leaf[:kept] if getattr(leaf, "shape", (0,))[:1] == (whole,) else leaf)
