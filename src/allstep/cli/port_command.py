"""`allstep port`: a script for PyTorch-Ignite in allstep's names, as a diff or written.

Contract: reads scripts and writes none of them unless `--write` is given. The diff goes to standard output, so that it
can be kept and applied; what is left for a person goes to standard error. The exit code is 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import unified_diff
from pathlib import Path

from allstep.cli.parser import Parser
from allstep.cli.porting import port
from allstep.errors import ConfigurationError

DESCRIPTION = """\
Show what changes in scripts for PyTorch-Ignite when they are written in allstep's names. Where a script uses parts of
Ignite that have no counterpart here, such as its metrics and loggers, its engine comes from allstep.ignite, on which
they work as they are.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    parser = Parser(prog="allstep port", description=DESCRIPTION)
    parser.add_argument("scripts", nargs="+", type=Path, metavar="SCRIPT", help="a Python file")
    parser.add_argument("--write", action="store_true", help="change the files")
    arguments = parser.parse_args(argv)
    for path in arguments.scripts:
        _show(path, writes=arguments.write)
    return 0


def _show(path: Path, *, writes: bool) -> None:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            before = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    ported = port(before, str(path))
    lines = unified_diff(before.splitlines(True), ported.text.splitlines(True), str(path), f"{path} (allstep)")
    for line in lines:
        sys.stdout.write(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    if ported.text == before and not ported.notes:
        print(f"{path}: nothing of ignite.engine is imported", file=sys.stderr)
    elif writes and ported.text != before:
        path.write_bytes(ported.text.encode())
    for line_number, note in ported.notes:
        print(f"{path}:{line_number}: {note}", file=sys.stderr)
