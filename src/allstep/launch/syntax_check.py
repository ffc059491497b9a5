"""A syntax error in a script, or in a file beside it that it is sure to import, found once before any rank starts.

Contract: `syntax_error` reads files and runs nothing. It follows imports at the top of a file, outside of any `if` or
`try`, of modules in the script's folder, which is the first place where Python looks. At most `MOST` files are read, so
that a large project starts at once. What cannot be read, or is no text of Python, is left to the interpreter on each
rank.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

MOST = 50


def syntax_error(script: str) -> SyntaxError | None:
    """The first syntax error of what a script runs; None where none was found."""
    folder, waiting, seen = Path(os.path.realpath(script)).parent, [Path(script)], set[Path]()
    follows = not (sys.flags.safe_path or os.environ.get("PYTHONSAFEPATH"))
    while waiting and len(seen) < MOST:
        path = waiting.pop(0)
        if path in seen or path.suffix != ".py" or not path.is_file():
            continue
        seen.add(path)
        try:
            tree = ast.parse(path.read_bytes(), str(path))
            compile(tree, str(path), "exec", dont_inherit=True)
            waiting += _imported(tree, path, folder) if follows else ()
        except SyntaxError as error:
            return error
        except (OSError, ValueError, RecursionError, MemoryError):
            continue
    return None


def _imported(tree: ast.Module, path: Path, folder: Path) -> Iterator[Path]:
    """Where the modules that a file imports at its top would be, if they are beside the script."""
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield from _places(folder, alias.name)
        elif isinstance(statement, ast.ImportFrom):
            around = [folder, *path.parents]
            if statement.level >= len(around):
                continue
            base = around[statement.level]
            yield from _places(base, statement.module or "")
            for alias in statement.names:  # each may be a module as well
                yield from _places(base, ".".join(filter(None, (statement.module, alias.name))))


def _places(base: Path, name: str) -> Iterator[Path]:
    """The files of a module and of the packages that it is in."""
    parts = name.split(".") if name else []
    for depth in range(1, len(parts) + 1):
        inner = base.joinpath(*parts[:depth])
        package = inner / "__init__.py"
        yield package if package.is_file() else inner.with_name(f"{inner.name}.py")
