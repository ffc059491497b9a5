"""What the workers of a machine can import once, together, before they part: decided from the script's text alone.

Contract: `machine` calls `shared_imports` with what each worker is to run. It gives the modules in the order in which
the script would import them, `module:name` for a name that a module imports when it is first used; none where that
cannot be known. `imports_of` is the decision (pure).

The imports that a script begins with are read up to its first other statement, or the first import of something that
is neither the standard library's nor in `SHARED`. So what a script does before it imports torch, such as setting
OMP_NUM_THREADS, is done before here too: then nothing is shared.
Two imports are made earlier than the script would, neither in a script that sets environment variables, which may be
meant for them:
- what it uses of allstep, and torch with that, at `import allstep`; only where it imports torch at the same place, or
  nothing else there that could set variables.
- `torch._dynamo`, which torch itself imports with the first optimizer and the first DDP model, and which takes as long
  as all the rest, where the script names one of these.
What can go wrong: nothing; a script that cannot be read or compiled shares nothing, and each worker says what is wrong.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder

from allstep.launch.worker_plan import Command

SHARED = ("allstep", "numpy", "torch", "torchmetrics")
"""Packages that leave nothing, when they are imported, that forked processes could not share; `template` makes sure."""

# Names with which a script makes an optimizer or a DDP model, which import torch._dynamo.
_WITH_DYNAMO = frozenset({"DistributedDataParallel", "optim", "wrap"})
# Methods of os.environ that only look, functions that change the environment, and variables that decide what is found.
_READS = frozenset({"get", "items", "keys", "values", "copy"})
_SETS = frozenset({"putenv", "unsetenv", "load_dotenv"})
_WHERE_TO_LOOK = frozenset({"PYTHONPATH", "PYTHONSAFEPATH"})


def shared_imports(command: Command, variables: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the modules that the workers which run `command` can import before they part.

    Args:
        command: what each runs.
        variables: what they have in their environment that this process has not.
    """
    # The variables would change where the workers look for the module, and this process looks without them.
    if command.module and _WHERE_TO_LOOK & set(variables or ()):
        return ()
    try:
        *before, script = [_read(path) for path in _files(command)]
    except (OSError, ImportError):
        return ()
    # A package that does something runs before the script, and may mean to come before the imports.
    return () if any(map(_does_something, before)) else imports_of(script)


def _files(command: Command) -> Iterator[str]:
    """The files that are run for a command, in order; ImportError where that takes more than looking for files."""
    if not command.module:
        yield command.target
        return
    folders: Sequence[str] | None = sys.path if sys.flags.safe_path else [os.getcwd(), *sys.path[1:]]
    name = ""
    for part in command.target.split("."):
        name = f"{name}.{part}" if name else part
        folders = yield from _found(name, folders)
    if folders is not None:  # a package, of which python -m runs the __main__
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
    return len(tree.body) > _has_docstring(tree)


def _has_docstring(tree: ast.Module) -> bool:
    return ast.get_docstring(tree, clean=False) is not None


def imports_of(source: bytes) -> tuple[str, ...]:
    """Return the modules that a script of this text begins by importing, as far as they can be shared."""
    tree = _parsed(source)
    imports = list(_first_imports(tree))
    modules = [name for name in itertools.takewhile(_is_shared, imports) if _package(name) in SHARED]
    has_torch = any(_package(module).startswith("torch") or module.startswith("allstep.") for module in modules)
    if _sets_variables(tree):  # they may be meant for what would be imported earlier than in the script
        return tuple(dict.fromkeys(modules))
    if "allstep" in modules and (has_torch or all(map(_is_shared, imports))):
        used = sorted(_used_of_allstep(tree))
        modules += [f"allstep:{name}" for name in used]
        has_torch = has_torch or bool(used)
    if has_torch and _WITH_DYNAMO & set(_words(tree)):
        modules.append("torch._dynamo")
    return tuple(dict.fromkeys(modules))


def _first_imports(tree: ast.Module) -> Iterator[str]:
    """The modules that a script begins by importing; "." for one of its own package."""
    for statement in tree.body[_has_docstring(tree) :]:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            # A module of the script's own package may do anything, so what follows it is not shared.
            yield statement.module if statement.module and not statement.level else "."
        else:
            return


def _is_shared(module: str) -> bool:
    return _package(module) in SHARED or _package(module) in sys.stdlib_module_names


def _sets_variables(tree: ast.Module) -> bool:
    """Whether a script may do anything with the environment but look at it."""
    looked_at = set()  # nodes that name the environment in a place where it is only read
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=environ, attr=attribute) if attribute in _READS:
                looked_at.add(environ)
            case ast.Subscript(value=environ, ctx=ast.Load()):
                looked_at.add(environ)
            case ast.Compare(comparators=compared):
                looked_at.update(compared)
    return any(_names_environment(node) and node not in looked_at for node in ast.walk(tree))


def _names_environment(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name == "environ" or name in _SETS
        case ast.alias(name=name):
            return name in _SETS
    return False


def _package(module: str) -> str:
    return module.partition(".")[0]


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
