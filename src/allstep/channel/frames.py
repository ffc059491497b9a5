"""Setting a user's frames off from a library's, in the text of a traceback or of faulthandler's stacks. Pure."""

from __future__ import annotations

import re

_FRAME = re.compile(r'^\s*(?:\|\s*)*File "(?P<file>[^"]*)", line \d+')
_LIBRARY = re.compile(
    r"/(site|dist)-packages/|/lib(64)?/python3(\.\d+)?/|^<frozen |^<string>$|/torch/_?[a-z]"
    r"|/allstep/(channel|checkpoint|cli|coordination|data|engine|faults|handlers|launch|metrics|parallel|placement"
    r"|testing|world)/"
)


def set_off(text: str) -> list[str]:
    """The lines of a traceback, the user's frames marked with `>`, everything else indented alike."""
    lines = []
    users = False
    for line in text.rstrip().splitlines():
        frame = _FRAME.match(line)
        if frame:
            users = not _LIBRARY.search(frame["file"])
        elif not line.startswith("    "):
            users = False
        lines.append(f"{'> ' if users else '  '}{line}".rstrip())
    return lines
