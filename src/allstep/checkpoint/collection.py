"""`Collection`: what one `Checkpoint` saves: what it was given, and what it finds by itself.

Contract: found are, in this order, the engines that it is attached to ("trainer"), what is attached to these and said
so (`Extension.add_state`), what their steps and handlers use (`references`), and modules that the World has wrapped.
What was given keeps the name under which it was given and is not found once more. It looks before a state is loaded
(`note_resume`) and when a run starts (`note_start`). What comes up only then was not loaded, which is an error, on the
first start as on a later one. An object that was found and has no state that can be saved is named in one warning.

Ranks run the same script, so that they find the same under the same names. Nothing here crosses ranks.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from allstep.checkpoint.encoding import encode
from allstep.checkpoint.objects import ObjectAdapter, PerRank, adapters_for
from allstep.checkpoint.references import belongs_to_library, objects_used_by
from allstep.engine import Engine
from allstep.errors import CheckpointError
from allstep.parallel import unwrap
from allstep.world import World, internals

log = logging.getLogger("allstep.checkpoint")


class Collection:
    """What a checkpoint saves, by name.

    Args:
        given: objects by name.
        leave_out: objects that are not to be saved though they would be found.

    Attributes:
        objects: all that is saved, what was given first.
        found: names of those that were not given.
        adapters: how each is saved and loaded.
        has_looked: whether `refresh` was called.
        was_resumed: whether `note_resume` was.

    Raises:
        UnsupportedStateError: an object that was given has no state that can be saved.
    """

    def __init__(self, given: Mapping[str, Any], leave_out: Iterable[Any] = ()) -> None:
        self.given = dict(given)
        self.objects: dict[str, Any] = dict(given)
        self.found: frozenset[str] = frozenset()
        self.adapters: dict[str, ObjectAdapter] = adapters_for(self.given)
        self.has_looked = self.was_resumed = False
        self._names_at_resume: frozenset[str] | None = None  # None without one, or when a run has begun since
        self._leave_out = list(leave_out)
        self._warned: set[str] = set()
        self._watch: RemovableHandle | None = None

    def refresh(self, engines: Sequence[Engine]) -> None:
        """Look again for what is to be saved with these engines."""
        known = _Known([*self.given.values(), *self._leave_out])
        objects = dict(self.given)

        def take(name: str, value: Any) -> None:
            if known.has(value):
                return
            chosen, number = name, 1
            while chosen in objects:
                number += 1
                chosen = f"{name} {number}"
            try:
                adapters_for({chosen: value})
                if not isinstance(value, nn.Module | Engine):
                    encode(value.state_dict() if hasattr(value, "state_dict") else None, chosen)
            except Exception as error:  # whatever a state_dict of a user's raises; what is given is not lost for it
                self._warn(chosen, f"{type(error).__name__}: {error}")
                return
            known.add(value)
            objects[chosen] = value

        for engine in engines:
            take("trainer", engine)
        for engine in engines:
            for name, value in engine.extension.states.items():
                take(name, value)
        for name, value in _used_by(engines, known):
            take(name, value)
        # What was given to a checkpoint without an engine is all of it, such as a model to be fine-tuned.
        if engines or not self.given:
            for value in _wrapped(known):
                take("model", value)
        self.objects, self.has_looked = objects, True
        self.found = frozenset(objects.keys() - self.given.keys())
        self.adapters = adapters_for(objects, engines)

    def note_resume(self, engines: Sequence[Engine]) -> None:
        """Look for what is about to be loaded."""
        self.refresh(engines)
        self.was_resumed, self._names_at_resume = True, frozenset(self.objects)

    def note_start(self, engines: Sequence[Engine]) -> None:
        """Look again where a run starts.

        Raises:
            CheckpointError: something has come up since `note_resume`, so that nothing could be loaded into it.
        """
        self.refresh(engines)
        before, self._names_at_resume = self._names_at_resume, None
        late = [] if before is None else [name for name in self.objects if name not in before]
        if late:
            raise CheckpointError(
                f"{', '.join(late)} came after resume(), so that nothing would be loaded into it when this run is "
                "started again, and the resumed run would not be the unbroken one. Attach, wrap and make everything "
                "before checkpoint.resume(); what is not to be saved is named in Checkpoint(leave_out=[...])"
            )
        self._watch_optimizers()

    def check_holds(self, known: Iterable[str], was_collected: bool, *, partial: bool) -> None:
        """Say what of the objects a checkpoint lacks.

        Args:
            known: names that the checkpoint has.
            was_collected: it was saved by a version that finds objects by itself.
            partial: leave what it lacks as it is.

        Raises:
            CheckpointError: it lacks something that was given, or an engine, module or optimizer that it would have
                if it were of this script.
        """
        saved = set(known)
        missing = [name for name in self.objects if name not in saved]
        if partial or not missing:
            return
        core = (Engine, nn.Module, torch.optim.Optimizer)
        needed = [
            name for name in missing if name in self.given or (was_collected and isinstance(self.objects[name], core))
        ]
        if needed:
            by_itself = [name for name in needed if name in self.found]
            how = f" ({', '.join(by_itself)}: found by itself)" if by_itself else ""
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(sorted(needed))}{how}; it has {', '.join(sorted(saved))}. Give what "
                "it was saved with, under its names, as in Checkpoint(folder, {'NAME': object}), or "
                "resume(partial=True) to leave them as they are"
            )
        if _is_main():
            unused = sorted(saved - self.objects.keys())
            log.warning(
                "the checkpoint lacks %s, which begins as it is now%s",
                ", ".join(missing),
                f"; nothing here takes its {', '.join(unused)}. Where these are the same, give them under these names"
                if unused
                else "",
            )

    def _watch_optimizers(self) -> None:
        """Until `end_watch`, look which optimizers take a step, and name one that is not saved in a warning.

        An optimizer may be out of sight, such as inside another library's object.
        """
        self.end_watch()
        ours = weakref.ref(self)  # which torch's table of hooks is not to keep alive

        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            collection = ours()
            if collection is not None:
                collection._look_at(optimizer)

        self._watch = register_optimizer_step_post_hook(look)

    def end_watch(self) -> None:
        """Look no more."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None

    def _look_at(self, optimizer: torch.optim.Optimizer) -> None:
        saved = {id(each) for each in self.objects.values()}
        inside = {id(part) for each in self.given.values() for part in getattr(each, "__dict__", {}).values()}
        if id(optimizer) in saved | inside | {id(each) for each in self._leave_out}:
            return
        modules = [each for each in self.objects.values() if isinstance(each, nn.Module)]
        trained = {id(parameter) for module in modules for parameter in module.parameters()}
        kind = type(optimizer).__name__
        if any(id(each) in trained for group in optimizer.param_groups for each in group["params"]):
            if kind not in self._warned and _is_main():
                log.warning(
                    "an optimizer (%s) that trains what is saved is not saved itself, so that a resumed run will not "
                    "be the unbroken one; give it: Checkpoint(folder, {'optimizer': optimizer})",
                    kind,
                )
            self._warned.add(kind)

    def _warn(self, name: str, why: str) -> None:
        if name not in self._warned and _is_main():
            log.warning("%s is used by the run and is not saved, since its state cannot be had: %s", name, why)
        self._warned.add(name)


class _Known:
    """Objects that have a place already, told by identity; a module in any wrapper is the module itself."""

    def __init__(self, values: Iterable[Any]) -> None:
        # Kept, since the id of an object that was freed may be another one's.
        self._by_id: dict[int, Any] = {}
        self._parts: set[int] = set()
        for value in values:
            self.add(value)

    def add(self, value: Any) -> None:
        inner = _inner(value)
        self._by_id[id(inner)] = inner
        if isinstance(inner, nn.Module):
            self._parts |= {id(each) for each in inner.modules()}

    def has(self, value: Any) -> bool:
        inner = _inner(value)
        return id(inner) in self._by_id or id(inner) in self._parts


def _inner(value: Any) -> Any:
    if isinstance(value, PerRank):
        value = value.stateful
    return unwrap(value) if isinstance(value, nn.Module) else value


def _used_by(engines: Sequence[Engine], known: _Known) -> list[tuple[str, Any]]:
    """What steps and handlers use and is neither known nor part of a module that is used as well."""
    functions = [each for engine in engines for each in (engine.process_function, *_own_handlers(engine))]
    used = [(name, value) for name, value in objects_used_by(functions) if not known.has(value)]
    modules = [_inner(value) for _, value in used if isinstance(value, nn.Module)]
    parts = {id(part) for module in modules for part in module.modules() if part is not module}
    return [
        (name, value)
        for name, value in used
        if not isinstance(value, nn.Module) or (id(_inner(value)) not in parts and _has_state(value))
    ]


def _own_handlers(engine: Engine) -> list[Any]:
    return [each for each in engine.extension.handlers if not belongs_to_library(each)]


def _has_state(module: nn.Module) -> bool:
    # A loss function is a module too.
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _wrapped(known: _Known) -> list[nn.Module]:
    """Modules that the World has wrapped and nothing else has brought."""
    world = World.current()
    if world is None:
        return []
    if any(not known.has(each) for each in internals(world).wrapped_modules()):
        # Of an earlier run in the same process a model may wait for the collector, on one rank and not on another.
        gc.collect()
    return [each for each in internals(world).wrapped_modules() if not known.has(each)]


def _is_main() -> bool:
    world = World.current()
    return world is None or world.rank == 0
