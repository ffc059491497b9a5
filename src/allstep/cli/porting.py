"""A script for PyTorch-Ignite in allstep's names: which imports and arguments change, and what is left for a person.

Contract: `port` is given a script's text and returns the new text and notes. It reads the syntax tree and changes the
text at the places of its nodes, so that all else, comments and layout included, stays. What it writes runs: where
anything of Ignite's ecosystem remains that has no counterpart here, the engine comes from `allstep.ignite`, on which
that works as it is; otherwise from `allstep`. What cannot be parsed raises `ConfigurationError`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from allstep.errors import ConfigurationError

ENGINE = {
    **dict.fromkeys(("Engine", "Events", "State"), "allstep"),
    **dict.fromkeys(("create_supervised_trainer", "create_supervised_evaluator"), "allstep"),
    **dict.fromkeys(("EventEnum", "EventsList", "RemovableEventHandle"), "allstep.engine"),
}
"""What `ignite.engine` has and allstep has under the same name, and where."""

HANDLERS = ("EarlyStopping", "TerminateOnNan", "TimeLimit")
"""Handlers of Ignite that allstep has under the same name, called in the same way."""

RENAMED = {
    "EarlyStopping": {"cumulative_delta": "cumulative"},
    "create_supervised_trainer": {"amp_mode": "precision"},
    "create_supervised_evaluator": {"amp_mode": "precision"},
}
"""Keyword arguments that have another name here, by function."""

DROPPED = {"create_supervised_trainer": ("deterministic",)}
"""Keyword arguments that are not needed here: data is read in the same order again anyway."""

NOT_HERE = {
    "EarlyStopping": ("mode",),
    "create_supervised_trainer": ("scaler",),
    "create_supervised_evaluator": ("metrics",),
}
"""Keyword arguments without a counterpart: who uses them keeps Ignite's function, on this engine."""

BY_HAND = {
    "auto_model": "world.wrap(model)",
    "auto_dataloader": "world.loader(dataset, ...)",
    "auto_optim": "the optimizer itself: the wrapped model's gradients are averaged",
    "Parallel": "with allstep.init() as world:",
    "initialize": "world = allstep.init()",
    "finalize": "world.close()",
    "get_rank": "world.rank",
    "get_world_size": "world.world_size",
    "get_local_rank": "world.local_rank",
    "device": "world.device",
    "barrier": "world.barrier()",
    "all_reduce": "world.all_reduce(value)",
    "all_gather": "world.gather(value)",
    "broadcast": "world.broadcast(value)",
}
"""What `ignite.distributed` does and how a World does it, which needs the script's own `world`."""


@dataclass(frozen=True, slots=True)
class Ported:
    """A script in allstep's names.

    Attributes:
        text: the whole new script.
        notes: (line, what a person should do there), in order.
    """

    text: str
    notes: list[tuple[int, str]]


def port(source: str, name: str = "the script") -> Ported:
    """Write a script for PyTorch-Ignite in allstep's names.

    Args:
        source: its text.
        name: what errors call it.

    Raises:
        ConfigurationError: it is no Python.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ConfigurationError(f"{name} is not Python: {error.msg} in line {error.lineno}") from None
    imports = [each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) and _is_of_ignite(each.module)]
    kept = _kept(tree, imports)
    edits, full_names = list(_module_edits(tree)), list(_full_names(tree))
    is_bridged = bool(kept or edits or full_names)
    edits += [edit for each in imports for edit in _import_edits(each, bridged=is_bridged)]
    if not is_bridged:
        edits += [edit for call, function in _calls(tree, imports) for edit in _keyword_edits(call, function)]
    notes = [*_ranks_by_hand(tree, imports), *full_names]
    if kept:
        which = ", ".join(sorted(kept))
        notes.append(
            (1, f"what is Ignite's stays so ({which}), and the engine comes from allstep.ignite, which it fits")
        )
    text = source.encode()
    starts = _line_starts(text)
    for node, new in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        if not new:  # an argument that goes takes its comma along
            begin, end = _with_comma(text, begin, end)
        text = text[:begin] + new.encode() + text[end:]
    return Ported(text.decode(), sorted(notes))


_Edit = tuple[ast.stmt | ast.keyword | ast.alias, str]


def _is_of_ignite(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == "ignite"


def _part(module: str | None) -> str:
    """The part of Ignite that a module is in: "engine", "handlers", "distributed" and so on."""
    return (module or "").split(".")[1] if "." in (module or "") else ""


def _home(part: str, name: str) -> str | None:
    """Where allstep has what Ignite has under this name; None without."""
    if part == "engine":
        return ENGINE.get(name)
    return "allstep" if part == "handlers" and name in HANDLERS else None


def _kept(tree: ast.Module, imports: list[ast.ImportFrom]) -> set[str]:
    """What the script uses of Ignite that fits an engine of Ignite's only."""
    kept = set()
    for each in imports:
        part = _part(each.module)
        if part not in ("distributed", "utils", ""):
            kept |= {alias.name for alias in each.names if _home(part, alias.name) is None}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if _is_of_ignite(alias.name)]
            kept |= {name for name in ours if _part(name) not in ("distributed", "utils", "engine", "")}
    for call, function in _calls(tree, imports):
        for keyword in call.keywords:
            other = RENAMED.get(function, {}).get(keyword.arg or "")
            has_value = other != "precision" or (
                isinstance(keyword.value, ast.Constant) and keyword.value.value == "amp"
            )
            if keyword.arg in NOT_HERE.get(function, ()) or not has_value:
                kept.add(f"{keyword.arg}= of {function}")
    return kept


def _calls(tree: ast.Module, imports: list[ast.ImportFrom]) -> Iterator[tuple[ast.Call, str]]:
    """Calls of what is imported from Ignite and has a counterpart, each with its name there."""
    known = {
        alias.asname or alias.name: alias.name
        for each in imports
        for alias in each.names
        if _home(_part(each.module), alias.name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            yield node, known[node.func.id]


def _import_edits(node: ast.ImportFrom, *, bridged: bool) -> Iterator[_Edit]:
    """The import from allstep that stands in for one from Ignite; nothing where that stays."""
    part = _part(node.module)
    if part not in (("engine",) if bridged else ("engine", "handlers")):
        return
    homes: dict[str, list[str]] = {}
    for alias in node.names:
        home = "allstep.ignite" if bridged else _home(part, alias.name)
        assert home is not None  # else it would have been kept
        homes.setdefault(home, []).append(ast.unparse(alias))
    indent = " " * node.col_offset
    yield node, f"\n{indent}".join(_statement(home, names, indent) for home, names in sorted(homes.items()))


def _module_edits(tree: ast.Module) -> Iterator[_Edit]:
    """The bridge in place of the module `ignite.engine`, where the script gives that a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "ignite.engine" and alias.asname:
                    yield alias, f"allstep.ignite as {alias.asname}"
        elif isinstance(node, ast.ImportFrom) and node.module == "ignite":
            engines = [alias for alias in node.names if alias.name == "engine"]
            if engines:
                indent = " " * node.col_offset
                others = [ast.unparse(alias) for alias in node.names if alias.name != "engine"]
                kept = [_statement("ignite", others, indent)] if others else []
                new = [f"ignite as {alias.asname or alias.name}" for alias in engines]
                yield node, f"\n{indent}".join([_statement("allstep", new, indent), *kept])


def _full_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What the script has of `ignite.engine` by its full name, which stays Ignite's until it is imported by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ignite.engine":
            yield node.lineno, f"{ast.unparse(node)} is still Ignite's: from allstep.ignite import {node.attr}"


def _statement(module: str, names: list[str], indent: str) -> str:
    whole = f"from {module} import {', '.join(names)}"
    if len(indent + whole) <= 100:
        return whole
    lines = "".join(f"{indent}    {name},\n" for name in names)
    return f"from {module} import (\n{lines}{indent})"


def _keyword_edits(call: ast.Call, function: str) -> Iterator[_Edit]:
    """Arguments under the names that they have here."""
    for keyword in call.keywords:
        if keyword.arg in DROPPED.get(function, ()):
            yield keyword, ""
        elif new := RENAMED.get(function, {}).get(keyword.arg or ""):
            value = '"fp16"' if new == "precision" else ast.unparse(keyword.value)
            yield keyword, f"{new}={value}"


def _ranks_by_hand(tree: ast.Module, imports: list[ast.ImportFrom]) -> Iterator[tuple[int, str]]:
    """What the script asks `ignite.distributed`, which works inside a World and is shorter with it."""
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "ignite.distributed"
    }
    modules |= {
        a.asname or a.name for each in imports if each.module == "ignite" for a in each.names if a.name == "distributed"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules and node.attr in BY_HAND:
            yield node.lineno, f"{ast.unparse(node)}: in a World, {BY_HAND[node.attr]}"


def _line_starts(text: bytes) -> list[int]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def _with_comma(text: bytes, begin: int, end: int) -> tuple[int, int]:
    before = text[:begin].rstrip()
    if before.endswith(b","):
        return len(before) - 1, end
    after = text[end:].lstrip()
    return begin, len(text) - len(after[1:].lstrip()) if after.startswith(b",") else end
