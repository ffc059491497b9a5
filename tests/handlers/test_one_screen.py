"""Each public handler is one screen of code, with what only it uses in its file."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from allstep import handlers

SCREEN = 80
"""Lines of code: without docstrings, comments, blank lines and imports."""

_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def code_lines(source: str, tree: ast.Module) -> set[int]:
    """The numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def names_defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                yield each.id


def lines_of_code(source: str, name: str, public: set[str]) -> int:
    """How many lines of code a class has, with what it reaches in its file and what is not public by itself."""
    tree = ast.parse(source)
    defined = {each: node for node in tree.body for each in names_defined(node)}
    reached, waiting = {name}, [name]
    while waiting:
        for node in ast.walk(defined[waiting.pop()]):
            if isinstance(node, ast.Name) and node.id in defined and node.id not in reached | public:
                reached.add(node.id)
                waiting.append(node.id)
    found: set[int] = set()
    for node in (defined[each] for each in reached):
        decorators = getattr(node, "decorator_list", [])
        found.update(range(min([node, *decorators], key=lambda each: each.lineno).lineno, (node.end_lineno or 0) + 1))
    return len(found & code_lines(source, tree))


@pytest.mark.parametrize("name", handlers.__all__)
def test_a_handler_is_one_screen_of_code(name: str) -> None:
    path = inspect.getsourcefile(getattr(handlers, name))
    assert path is not None
    assert lines_of_code(Path(path).read_text(encoding="utf-8"), name, set(handlers.__all__)) <= SCREEN


def test_lines_are_counted_with_what_only_the_class_uses() -> None:
    source = '"""Text."""\nimport os\n\n_A = 1\n_B = 2\n\n\n@f\nclass C:\n    """Text."""\n\n    x = _A  # why\n'
    assert lines_of_code(source, "C", set()) == 4
