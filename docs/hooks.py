"""Parts of the site that are made from the source when the site is built, so that they cannot differ from it.

A page asks for such a part by a comment of its own line:

    <!-- names: allstep.engine -->   the reference of every name in that package's `__all__`
    <!-- run options -->             the options of `allstep run`, from the table that makes its command line
    <!-- submit options -->          those of `allstep submit`
    <!-- errors -->                  every exception type, from `allstep.errors`

mkdocs calls `on_page_markdown`. The functions below are pure and are tested in tests/docs/test_site.py.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).resolve().parents[1] / "src"


def public_names(package: str) -> list[str]:
    """The names in a package's `__all__`, in its order.

    Packages are read and not imported, because most of them import torch, which a build of the site does not need.
    """
    if package == "allstep":
        return list(allstep().__all__)
    tree = ast.parse((SOURCE / package.replace(".", "/") / "__init__.py").read_text())
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))
    raise LookupError(f"{package} has no __all__")


def names(package: str) -> str:
    """Markdown that has mkdocstrings write the reference of each public name of a package.

    What `allstep` itself offers is on the page of `allstep` only, so that each name has one place in the site.
    """
    own = sorted(public_names(package), key=str.lower)
    if package == "allstep":
        return "\n\n".join(f"::: allstep.{name}" for name in own if name != "__version__")
    shared = [name for name in own if name in public_names("allstep")]
    parts = [f"::: {package}.{name}" for name in own if name not in shared]
    if shared:
        links = ", ".join(f"[`{name}`][allstep.{name}]" for name in shared)
        parts.insert(0, f"Also from this package, and described under [allstep](allstep.md): {links}.")
    return "\n\n".join(parts)


def allstep() -> ModuleType:
    """The package of this checkout; importing it alone loads no torch."""
    if str(SOURCE) not in sys.path:
        sys.path.insert(0, str(SOURCE))
    return import_module("allstep")


def run_options() -> str:
    """The table of the options of `allstep run`."""
    allstep()
    return str(import_module("allstep.launch.settings").options_table())


def submit_options() -> str:
    """The table of the options of `allstep submit`."""
    allstep()
    table = import_module("allstep.launch.settings").options_table
    return str(table(import_module("allstep.submission.request").OPTIONS))


def errors() -> str:
    """The table of error types that `allstep/errors.py` begins with."""
    allstep()
    said = import_module("allstep.errors").__doc__ or ""
    return "\n".join(line for line in said.splitlines() if line.startswith("|"))


def expand(markdown: str) -> str:
    """A page with its comments replaced by what they ask for."""
    markdown = re.sub(r"^<!-- names: ([\w.]+) -->$", lambda found: names(found[1]), markdown, flags=re.MULTILINE)
    for comment, made in (("run options", run_options), ("submit options", submit_options), ("errors", errors)):
        if f"<!-- {comment} -->" in markdown:
            markdown = markdown.replace(f"<!-- {comment} -->", made())
    return "\n".join(bar_in_code(line) if line.startswith("|") else line for line in markdown.split("\n"))


def bar_in_code(row: str) -> str:
    """A row of a table whose code spans may have an escaped bar, which Markdown here would show with its backslash."""
    return re.sub(r"`([^`]*\\\|[^`]*)`", lambda found: f"<code>{found[1].replace(chr(92) + '|', '&#124;')}</code>", row)


def on_page_markdown(markdown: str, **_: object) -> str:
    """What mkdocs calls for each page."""
    return expand(markdown)
