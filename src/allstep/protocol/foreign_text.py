"""Text of somebody else as it may be shown: nothing in it acts on a terminal or passes for a line of ours.

Names, reasons and reports come from other machines, from scripts and from files. A terminal takes some characters for
orders: to set its title, to clear the screen, to write backwards. `printable` spells those out.
"""

from __future__ import annotations

LINE = 500
"""Characters of what is shown in one line, at most."""


def printable(text: str, *, lines: bool = False, most: int | None = None) -> str:
    """The text with all that is not printable spelled out, as Python would in a string.

    Args:
        text: somebody else's.
        lines: leave ends of lines and tabs as they are.
        most: characters of it to keep, at most; None keeps all.
    """
    cut = text if most is None or len(text) <= most else f"{text[:most]}..."
    if cut.isprintable():
        return cut
    kept = "\n\t" if lines else ""
    return "".join(each if each.isprintable() or each in kept else _spelled(each) for each in cut)


def one_line(text: str) -> str:
    """The beginning of a text, as one line that can be shown."""
    return printable(text, most=LINE)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
