"""The house rules that a machine can hold: names, sizes, and where private names of other libraries may stand.

Each check reads the source as a tree, imports nothing of it, and lists every place that breaks the rule.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "allstep"
TESTS = ROOT / "tests"

LONGEST_FILE = 450
LONGER = {
    "src/allstep/engine/engine.py": 484,  # what a user of `Engine` may call, in one class; a third of it is docstrings
}
LONGEST_TEST_NAME = 74

SAME_IDEA = {
    "EarlySignals": "notes SIGUSR1 before a script handles it: in allstep's worker, and in any other process by `init`",
    "torch_private": "the private names of torch that its package uses, in each package that uses any",
}
"""Names that several modules or classes bear, and the one idea that they share."""

OLD_WORDS = {
    *("account", "ballot", "gate", "inquiry", "outlet", "pulse", "standing", "stock", "supply", "trail"),
    *("post", "case"),
}
"""Names of the former design that the field does not use; see issue 11 for what each is called now."""

PRIVATE_ROOMS = ("torch_private.py", "torchmetrics_private.py", "ignite_private.py", "xla_private.py", "interpreter.py")
DOCUMENTED = {"_exit", "_current_frames", "_replace", "_asdict", "_fields", "_make"}
"""Names with an underscore that Python's documentation describes."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_files() -> list[Path]:
    return sorted(path for path in TESTS.rglob("*.py") if "scripts" not in path.parts)


test_files.__test__ = False  # type: ignore[attr-defined]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def check(found: list[str]) -> None:
    """Fail with every place found."""
    assert not found, "\n".join([f"{len(found)} places:", *found])


def shared(places: dict[str, list[str]]) -> list[str]:
    return [f"{name}: {' '.join(at)}" for name, at in places.items() if len(at) > 1 and name not in SAME_IDEA]


def test_no_file_is_longer_than_a_reader_follows() -> None:
    lengths = {shown(path): len(path.read_text().splitlines()) for path in (*source_files(), *test_files())}
    check([f"{path}: {lines}" for path, lines in lengths.items() if lines > LONGER.get(path, LONGEST_FILE)])
    assert [path for path in LONGER if lengths[path] <= LONGEST_FILE] == []


def test_every_test_name_is_short_enough_to_say_one_behaviour() -> None:
    long = [
        f"{shown(path)}: {name} ({len(name)})"
        for path in test_files()
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if len(name) > LONGEST_TEST_NAME
    ]
    check(long)


def test_no_two_modules_share_a_name_unless_they_share_the_idea() -> None:
    places = defaultdict(list)
    for path in source_files():
        if path.name != "__init__.py":
            places[path.stem].append(shown(path))
    check(shared(places))


def test_no_two_classes_share_a_name_unless_they_share_the_idea() -> None:
    places = defaultdict(list)
    for path in source_files():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(shown(path))
    check(shared(places))


def test_every_name_that_may_be_shared_is_shared() -> None:
    modules = [path.stem for path in source_files()]
    classes = [node.name for path in source_files() for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    assert [name for name in SAME_IDEA if (modules + classes).count(name) < 2] == []


@pytest.mark.parametrize("package", sorted(path.parent.name for path in SOURCE.glob("*/__init__.py")))
def test_a_package_says_what_lives_there(package: str) -> None:
    docstring = ast.get_docstring(tree(SOURCE / package / "__init__.py"))
    assert docstring is not None
    assert len(docstring.split()) >= 12


def names_given(node: ast.AST) -> Iterator[str]:
    """The names that a node introduces: variables, arguments, attributes, functions, classes."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name


def test_no_name_is_a_word_of_the_former_design() -> None:
    found = sorted(
        {
            f"{shown(path)}: {name}"
            for path in source_files()
            for node in ast.walk(tree(path))
            for name in names_given(node)
            if name.lstrip("_").lower() in OLD_WORDS
        }
    )
    check(found)


def is_private(name: str) -> bool:
    mangled = name.startswith("_Z")  # a public name of C++ as its libraries list it
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in DOCUMENTED and not mangled


def private_uses(path: Path, own: set[str]) -> Iterator[str]:
    """Private names in a file that nothing in its package introduces, so that they belong to somebody else."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("allstep"):
            yield from (name for name in (*node.module.split("."), *(a.name for a in node.names)) if is_private(name))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                yield str(name.value)


@cache
def own_names(folder: Path) -> set[str]:
    """Every private name that a package of allstep itself introduces."""
    return {
        name
        for path in folder.glob("*.py")
        if path.name not in PRIVATE_ROOMS
        for node in ast.walk(tree(path))
        for name in names_given(node)
        if is_private(name)
    }


def test_private_names_of_others_stand_in_their_rooms_only() -> None:
    found = [
        f"{shown(path)}: {name}"
        for path in source_files()
        if path.name not in PRIVATE_ROOMS
        for name in sorted(set(private_uses(path, own_names(path.parent))))
    ]
    check(found)


def test_cuda_alone_is_asked_in_one_file() -> None:
    """What other accelerators have too goes by `torch.accelerator` or the device's own module."""
    found = [
        f"{shown(path)}: line {node.lineno}"
        for path in source_files()
        if path != SOURCE / "cuda.py"
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda")
        or (isinstance(node, ast.Import) and any(each.name.startswith("torch.cuda") for each in node.names))
        or (isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch.cuda"))
        or (isinstance(node, ast.ImportFrom) and node.module == "torch" and any(e.name == "cuda" for e in node.names))
    ]
    check(found)


def test_tests_import_no_private_name_of_allstep() -> None:
    found = [
        f"{shown(path)}: {alias.name}"
        for path in test_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("allstep")
        for alias in node.names
        if is_private(alias.name)
    ]
    check(found)
