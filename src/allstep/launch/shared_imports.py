"""What the workers of a machine can import once, together, before they part: decided from the script's text alone.

Contract: `shared_imports` is called by the supervisor, with what each worker is to run, and gives the modules in the
order in which the script would import them, `module:name` for a name that a module imports when it is first used; none
where that cannot be known. `named` is the decision (pure). The
imports that a script begins with are read up to its first other statement; of these, up to the first import of
something that is neither the standard library's nor in `SHARED`. So what a script does before it imports torch, such as
setting OMP_NUM_THREADS, is done before here too: then nothing is shared. Two imports are made earlier than the script
would:
- what it uses of allstep, and torch with that, at `import allstep`; not if it names `os.environ` and does not import
  torch at the same place, since what it sets may be meant for torch.
- `torch._dynamo`, which torch itself imports with the first optimizer and the first DDP model, and which takes as long
  as all the rest, where the script names one of these.
A module of one of these names in the script's own folder is another module: then nothing is shared.
What can go wrong: nothing; a script that cannot be read or compiled shares nothing, and each worker says what is wrong.
"""

from __future__ import annotations

import ast
import contextlib
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from importlib.machinery import PathFinder

from allstep.launch.plan import Command

SHARED = ("allstep", "numpy", "torch", "torchmetrics")
"""Packages that start no thread and open nothing when they are imported, so that processes can be forked afterwards."""

_WITH_DYNAMO = frozenset({"DistributedDataParallel", "optim", "wrap"})
_SETS_VARIABLES = frozenset({"environ", "putenv"})


def shared_imports(command: Command) -> tuple[str, ...]:
    """Return the modules that the workers which run `command` can import before they part."""
    folder = os.getcwd() if command.module else os.path.dirname(os.path.realpath(command.target))
    try:
        *before, script = [_read(path) for path in _files(command)]
        modules = () if any(map(_does_something, before)) else named(script)
        own = any(PathFinder.find_spec(_package(module), [folder]) for module in modules)
    except (OSError, ImportError):
        return ()
    return () if own else modules


def _files(command: Command) -> Iterator[str]:
    """The files that are run for a command, in order; ImportError where that takes more than looking for files."""
    if not command.module:
        yield command.target
        return
    folders: Sequence[str] | None = [os.getcwd(), *sys.path]
    name = ""
    for part in command.target.split("."):
        name = f"{name}.{part}" if name else part
        folders = yield from _found(name, folders)
    if folders is not None:
        yield from _found(f"{name}.__main__", folders)


def _found(name: str, folders: Sequence[str] | None) -> Generator[str, None, Sequence[str] | None]:
    """The file of a module that is in these folders; returned are those of its submodules, None where it has none."""
    spec = None if folders is None else PathFinder.find_spec(name, folders)
    if spec is None or spec.origin is None:  # a folder without __init__.py has none
        raise ImportError(name)
    yield spec.origin
    return spec.submodule_search_locations


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _parsed(source: bytes) -> ast.Module:
    """The tree of a text, an empty one where it cannot be compiled: the worker that runs it says why."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.parse(source)
    return ast.Module(body=[], type_ignores=[])


def _does_something(source: bytes) -> bool:
    """Whether a package does anything but say what it is."""
    tree = _parsed(source)
    return len(tree.body) > (ast.get_docstring(tree, clean=False) is not None)


def named(source: bytes) -> tuple[str, ...]:
    """Return the modules that a script of this text begins by importing, as far as they can be shared."""
    tree = _parsed(source)
    modules = [module for module in _first_imports(tree) if _package(module) not in sys.stdlib_module_names]
    words = set(_words(tree))
    has_torch = any(_package(module).startswith("torch") or module.startswith("allstep.") for module in modules)
    if "allstep" in modules and (has_torch or not words & _SETS_VARIABLES):
        used = sorted(_used_of_allstep(tree))
        modules += [f"allstep:{name}" for name in used]
        has_torch = has_torch or bool(used)
    if has_torch and words & _WITH_DYNAMO:
        modules.append("torch._dynamo")
    return tuple(dict.fromkeys(modules))


def _first_imports(tree: ast.Module) -> Iterator[str]:
    """The modules that a script begins by importing, up to the first that cannot be shared or was not absolute."""
    for statement in tree.body[1:] if ast.get_docstring(tree, clean=False) is not None else tree.body:
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            names = [statement.module]
        else:
            return
        for name in names:
            if _package(name) not in SHARED and _package(name) not in sys.stdlib_module_names:
                return
            yield name


def _package(module: str) -> str:
    return module.partition(":")[0].partition(".")[0]


def _words(tree: ast.Module) -> Iterator[str]:
    """Every name that a script uses or imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from node.module.split(".")


def _used_of_allstep(tree: ast.Module) -> set[str]:
    """The names that a script takes from the package itself."""
    known = set(_aliases_of_allstep(ast.walk(tree)))
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "allstep" and not node.level:
            used |= {alias.name for alias in node.names}
    return used


def _aliases_of_allstep(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.asname or "allstep" for alias in node.names if alias.name == "allstep")
