"""What a step and the handlers of an engine use, as far as Python shows it: their closures, globals and attributes.

Contract: pure functions of functions; nothing is called. `objects_used_by` gives what can be saved of it, by the name
that the script has for it, in an order that depends on the script alone and is the same on every rank. Followed are
closures, those globals that a function's code reads, bound objects, `functools.partial`, short containers, functions
of the same file and attributes of objects whose class stands there. Loaders, datasets and samplers are left out: the
place in them is the engine's. What is reached in another way, such as through a library, is not found.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from allstep.engine import Engine

Reference: TypeAlias = tuple[str, Any]

_LONGEST_CONTAINER = 64
_DEEPEST = 6
_READS_A_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME"}
_PLAIN = (str, bytes, int, float, complex, type, ModuleType, torch.Tensor, type(None))


def objects_used_by(functions: Iterable[Callable[..., Any]]) -> Iterator[Reference]:
    """What can be saved of what these use, each object once, with the name that the script has for it."""
    walk = _Walk()
    for function in functions:
        yield from walk.function(function)


def can_be_saved(value: Any) -> bool:
    """Whether an object has a state of its own that a checkpoint can ask for."""
    if isinstance(value, nn.Module | torch.optim.Optimizer | torch.Generator):
        return True
    if isinstance(value, Engine | type) or hasattr(type(value), "__iter__"):
        return False
    methods = (getattr(type(value), name, None) for name in ("state_dict", "load_state_dict"))
    return all(callable(each) for each in methods)


def belongs_to_library(function: Callable[..., Any]) -> bool:
    """Whether a handler is one of this package's own, which say themselves what they have to save."""
    while isinstance(function, partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    home = getattr(function, "__module__", None) if owner is None else type(owner).__module__
    return home is not None and home.partition(".")[0] == "allstep"


class _Walk:
    """One way through what functions refer to; nothing is visited twice."""

    def __init__(self) -> None:
        # The objects themselves, since an id alone may be given to another one meanwhile.
        self._seen: dict[int, Any] = {}
        self._home: Mapping[str, Any] | None = None

    def function(self, function: Callable[..., Any]) -> Iterator[Reference]:
        """What one step or handler uses."""
        self._home = getattr(_innermost(function), "__globals__", None)
        yield from self._visit(type(function).__name__, function, 0, is_root=True)

    def _visit(self, name: str, value: Any, depth: int, *, is_root: bool = False) -> Iterator[Reference]:
        if isinstance(value, _PLAIN) or id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen[id(value)] = value
        if can_be_saved(value):
            yield name, value
            if isinstance(value, LRScheduler):
                yield from self._visit(f"{name}.optimizer", value.optimizer, depth + 1)
        elif isinstance(value, partial):
            inner = [value.func, *value.args, *value.keywords.values()]
            for each in inner:
                yield from self._visit(type(each).__name__, each, depth + 1, is_root=is_root)
        elif isinstance(value, MethodType):
            yield from self._visit(type(value.__self__).__name__, value.__self__, depth + 1, is_root=True)
            yield from self._visit(name, value.__func__, depth + 1)
        elif isinstance(value, FunctionType):
            yield from self._of_function(value, depth)
        elif isinstance(value, Mapping | list | tuple) and len(value) <= _LONGEST_CONTAINER:
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, each in items:
                yield from self._visit(f"{name}.{key}", each, depth + 1)
        elif is_root or self._is_at_home(type(value)):
            for key, each in getattr(value, "__dict__", {}).items():
                yield from self._visit(key if is_root else f"{name}.{key}", each, depth + 1)
            yield from self._visit(name, _call_of(value), depth + 1)

    def _of_function(self, function: FunctionType, depth: int) -> Iterator[Reference]:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a variable that has no value yet
                continue
            yield from self._visit(name, content, depth + 1)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            yield from self._visit(type(value).__name__, value, depth + 1)
        if function.__globals__ is self._home:
            for name in _globals_read(function.__code__):
                if name in function.__globals__:
                    yield from self._visit(name, function.__globals__[name], depth + 1)

    def _is_at_home(self, kind: type) -> bool:
        return self._home is not None and kind.__module__ == self._home.get("__name__")


def _innermost(function: Any) -> Any:
    """The plain function that is called in the end."""
    if isinstance(function, partial):
        return _innermost(function.func)
    if isinstance(function, MethodType):
        return _innermost(function.__func__)
    return function if isinstance(function, FunctionType) else _call_of(function)


def _call_of(value: Any) -> Any:
    """The method of a class by which its objects are called, as a plain function; None without."""
    return next((vars(each)["__call__"] for each in type(value).__mro__ if "__call__" in vars(each)), None)


def _globals_read(code: CodeType) -> Iterator[str]:
    """Names of globals that a function's code reads, that of functions inside it included."""
    yield from (str(each.argval) for each in dis.get_instructions(code) if each.opname in _READS_A_GLOBAL)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_read(constant)
