"""torch.compile of a model or of its units, in place, and the count of what was compiled.

Contract: `compile_units` has modules compile themselves when they are first called, by torch's `Module.compile`. They
stay the same objects, so the names of parameters stay, and it does not matter whether a module is sharded or divided
before. Units are compiled one by one, from one piece of code where they are of one class. A batch of another size has
torch compile once more, for any size; a batch of one sample may do so again. `Compilations` says at the World's end how
often that was, and why.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from allstep.errors import ArgumentTypeError
from allstep.parallel.torch_private import compilations_since
from allstep.parallel.units import fitting
from allstep.suggestions import unknown_option

_SHOWN = 3
_LONGEST = 120  # characters of a reason


def units_to_compile(module: nn.Module, which: Any, options: Mapping[str, Any] | None = None) -> list[nn.Module]:
    """The submodules to compile: the module for True, none for False or None, else the outermost that fit.

    Raises:
        ArgumentError, ParallelError: it names no submodule, or is none of what it may be.
        ArgumentTypeError: torch.compile has no such option.
    """
    known = frozenset(inspect.signature(torch.compile).parameters) - {"model"}
    if unknown := unknown_option("compile_options", options or {}, (), known, "torch.compile"):
        raise ArgumentTypeError(unknown)
    if which is None or isinstance(which, bool):
        return [module] if which else []
    chosen = fitting(module, which, "compile")
    inside = {inner for each in chosen for inner in each.modules() if inner is not each}
    return [each for each in chosen if each not in inside]


def compile_units(units: Iterable[nn.Module], options: Mapping[str, Any] | None = None) -> None:
    """Have modules compile themselves when they are called.

    Args:
        units: what to compile, each by itself.
        options: of torch.compile, such as `{"backend": "aot_eager", "dynamic": True}`.
    """
    for each in units:
        each.compile(**(options or {}))


class Compilations:
    """What torch has compiled in this process since this was made."""

    def __init__(self) -> None:
        self._since = time.time()

    def in_words(self) -> str:
        """How many functions were compiled, and which of them again and why, in one line."""
        found = compilations_since(self._since)
        if found is None:
            return "not counted by this torch"
        again = [(name, reason) for name, reason in found if reason is not None]
        text = f"{len(found) - len(again)} compiled, {len(again)} again"
        if again:
            text += f" ({'; '.join(f'{name}: {_in_short(reason)}' for name, reason in again[:_SHOWN])}"
            text += f"; and {len(again) - _SHOWN} more)" if len(again) > _SHOWN else ")"
        return text


def _in_short(reason: str) -> str:
    """The first failed guard, without its number and the code behind it."""
    first = reason.splitlines()[0].split("  #")[0].partition(": ")
    text = " ".join((first[2] or first[0]).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
