"""Private names of other libraries and CPython stand in the modules made for them, and docs/architecture.md lists
them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "allstep"
GUARDED = ("torch_private.py", "torchmetrics_private.py", "ignite_private.py", "xla_private.py", "interpreter.py")
LIBRARIES = ("torch", "torchmetrics", "torch_xla", "ignite", "sys", "threading", "atexit", "runpy", "multiprocessing")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _chain(node: ast.expr) -> list[str]:
    """The names of `a.b.c`; empty for what does not begin with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [*names, node.id][::-1] if isinstance(node, ast.Name) else []


def _private_uses(source: str) -> list[str]:
    """Private names of the libraries that are imported, or reached from what was imported of them."""
    tree, roots, found = ast.parse(source), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name.partition(".")[0] in LIBRARIES:
                    roots.add(each.asname or each.name.partition(".")[0])
                    found += [each.name] if any(map(_is_private, each.name.split("."))) else []
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in LIBRARIES:
            for each in node.names:
                roots.add(each.asname or each.name)
                whole = f"{node.module}.{each.name}"
                found += [whole] if any(map(_is_private, whole.split("."))) else []
    for node in ast.walk(tree):
        names = _chain(node) if isinstance(node, ast.Attribute) else []
        if names and names[0] in roots and any(map(_is_private, names[1:])):
            found.append(".".join(names))
    return found


def test_private_names_of_libraries_are_used_in_their_modules_only() -> None:
    found = {
        str(path.relative_to(PACKAGE)): uses
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in GUARDED and (uses := _private_uses(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import torch.distributed as dist\ndist.distributed_c10d._world", ["dist.distributed_c10d._world"]),
        ("from torch._compile import _disable_dynamo", ["torch._compile._disable_dynamo"]),
        ("import sys\nsys._getframe(1)", ["sys._getframe"]),
        ("import torch\ntorch.__version__\nself._own", []),
    ],
)
def test_a_private_name_is_found_where_it_is_used(source: str, uses: list[str]) -> None:
    assert _private_uses(source) == uses


def _listed() -> list[tuple[str, str]]:
    """(file, name) for each name in the table of the documentation."""
    rows, place = [], ""
    for line in (REPOSITORY / "docs" / "architecture.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 5 and "`" in cells[1]:
            place = cells[0].strip("`") or place
            rows += [(place, name.rpartition(".")[2]) for name in re.findall(r"`([^`]+)`", cells[1])]
    return rows


@pytest.mark.parametrize(("place", "name"), _listed())
def test_a_name_that_is_listed_is_in_the_module_that_is_named(place: str, name: str) -> None:
    assert name in (PACKAGE / place).read_text()


def test_every_module_of_private_names_is_listed() -> None:
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name in GUARDED}
    assert {place for place, _ in _listed()} == modules
