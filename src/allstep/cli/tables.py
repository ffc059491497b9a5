"""What commands about runs have in common: tables, numbers in words, and the options that say which run is meant."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from allstep.cli.parser import Parser
from allstep.errors import printable


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of cells, the headings first, in columns as wide as they have to be."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def utc(moment: float | None) -> str:
    """A time as a table shows it, in UTC; empty for none."""
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment))


def shown_rate(rate: float | None) -> str:
    """Iterations a second, or seconds an iteration where that is more to the point; empty for none."""
    if not rate:
        return ""
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"


def run_parser(command: str, description: str, epilog: str) -> Parser:
    """A parser with the option that says where runs are."""
    parser = Parser(prog=f"allstep {command}", description=description, epilog=epilog)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder that holds run folders (default: runs)"
    )
    return parser
