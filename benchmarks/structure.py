"""What the source tree is like: files and lines, repeated names, private names of others, and five walks through it.

    python benchmarks/structure.py [CHECKOUT ...]      # several checkouts side by side; by default this one

A walk is what runs for one thing and does not run without it. A job over two ranks is run twice, with a batch (a vote,
a metric, a failure, a save) and without. In every process and thread of it each function of allstep is noted when it is
first entered, and what both runs enter is left out. `files` are those in which the rest lies. A `return` is an entry
into a file of the walk that had been left for another one. A batch is followed through the engine's package, everything
else wherever it goes.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
WALKS = ("batch", "vote", "metric", "failure", "save")
INSIDE = {"batch": "engine/"}  # where a walk is followed; elsewhere it is not counted
DOCUMENTED = {"_exit", "_asdict", "_replace", "_fields"}  # underscored, and yet public: os._exit, named tuples
FOREIGN = ("torch", "torchmetrics", "multiprocessing", "threading", "faulthandler", "importlib", "concurrent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[HERE.parent], metavar="CHECKOUT")
    checkouts = [path.resolve() for path in parser.parse_args().checkouts]
    columns = [measured(path) for path in checkouts]
    for key in columns[0]:
        print(f"| {key} | " + " | ".join(str(column.get(key, "")) for column in columns) + " |")
    for path in checkouts:
        print(f"\nprivate names of others, {path.name}:")
        for place, names in private_names(path / "src" / "allstep").items():
            print(f"  {place}: {', '.join(sorted(names))}")


def measured(checkout: Path) -> dict[str, str | int]:
    """The figures of one checkout by name."""
    root = checkout / "src" / "allstep"
    files = sorted(root.rglob("*.py"))
    lines = {path: len(path.read_text().splitlines()) for path in files}
    rooms = [path for path in files if path.name != "__init__.py"]
    largest = max(rooms, key=lambda path: lines[path])
    private = private_names(root)
    result: dict[str, str | int] = {
        "files": len(rooms),
        "lines": sum(lines.values()),
        "lines of code, without docstrings and comments": sum(len(_code(path)[0]) for path in files),
        "median lines of a file": round(median(lines[path] for path in rooms)),
        "largest file": f"{largest.relative_to(root)}, {lines[largest]}",
        "modules that one other imports": sum(1 for n in importers(root, rooms).values() if n == 1),
        "module names that occur twice": _doubled(path.stem for path in rooms),
        "class names that occur twice": _doubled(node.name for path in rooms for node in _classes(path)),
        "files with private names of others": len(private),
        "comments, of lines of code": f"{_comments(files):.1%}",
    }
    for name in WALKS:
        entered, returns = walk(checkout, name)
        result[f"walk of a {name}: files, returns"] = f"{entered}, {returns}"
    return result


def importers(root: Path, rooms: list[Path]) -> dict[str, int]:
    """By module, how many other modules import from it by name; a package's `__init__` is none of them."""
    known = {".".join(("allstep", *path.relative_to(root).with_suffix("").parts)): path for path in rooms}
    count = dict.fromkeys(known, 0)
    for importer, path in known.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        for module in named & known.keys() - {importer}:
            count[module] += 1
    return count


def private_names(root: Path) -> dict[str, set[str]]:
    """By file, the underscored names that allstep itself defines nowhere: those of torch, torchmetrics and CPython."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}
    own = {name for tree in trees.values() for name in _defined(tree)}
    found: dict[str, set[str]] = {}
    for path, tree in trees.items():
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
                names.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FOREIGN:
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
                names |= {part for part in parts if _is_private(part)}
            elif isinstance(node, ast.Import):
                names |= {part for alias in node.names for part in alias.name.split(".") if _is_private(part)}
        if names:
            found[str(path.relative_to(root))] = names
    return found


def walk(checkout: Path, name: str) -> tuple[int, int]:
    """Files and returns of one walk; see the module's docstring."""
    without = {function for stream in _traced(checkout, name, "without") for function in stream}
    met: set[tuple[str, str]] = set()
    stays: list[str] = []
    for stream in _traced(checkout, name, "with"):
        for function in stream:
            if function in without or function in met or not function[0].startswith(INSIDE.get(name, "")):
                continue
            met.add(function)
            if not stays or stays[-1] != function[0]:
                stays.append(function[0])
    return len(set(stays)), len(stays) - len(set(stays))


def _traced(checkout: Path, name: str, mode: str) -> list[list[tuple[str, str]]]:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace")
        trace.mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(checkout / "src"), str(HERE / "structure_scripts")]),
            "STRUCTURE_TRACE": str(trace),
            "OMP_NUM_THREADS": "1",
        }
        job = ["run", "--nproc", "2", "--runs", f"{folder}/runs", str(HERE / "structure_scripts" / "walks.py")]
        command = [sys.executable, "-m", "allstep", *job, name, mode, f"{folder}/saved"]
        ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
        fails = name == "failure" and mode == "with"
        if (ended.returncode != 0) is not fails:
            raise SystemExit(f"{name} {mode}: status {ended.returncode}\n{ended.stderr[-3000:]}")
        streams = [path.read_text().splitlines() for path in sorted(trace.iterdir())]
        return [[(file, function) for file, _, function in (line.partition("\t") for line in each)] for each in streams]


def _doubled(names: Iterator[str]) -> int:
    return sum(1 for count in Counter(names).values() if count > 1)


def _classes(path: Path) -> Iterator[ast.ClassDef]:
    return (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def _comments(files: list[Path]) -> float:
    counted = [_code(path) for path in files]
    return sum(len(comment) for _, comment in counted) / sum(len(code) for code, _ in counted)


def _code(path: Path) -> tuple[set[int], set[int]]:
    """The numbers of the lines that hold code, and of those that hold a comment."""
    text = path.read_text()
    code, comments = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_text:
            code.difference_update(range(node.lineno, node.end_lineno + 1))
    return code, comments


if __name__ == "__main__":
    main()
