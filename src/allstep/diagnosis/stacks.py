"""Reading stacks and tracebacks: what a rank waits in, and which frames are the user's. Pure.

`waits_in` reads what `faulthandler` wrote of a rank's threads, and says whether the main thread is in a call that waits
for its peers. `at_a_prompt` says whether it waits for a person. `set_off` marks a user's frames in the text of a
traceback or of such stacks.
"""

from __future__ import annotations

import re

from allstep.diagnosis.torch_private import BACKWARD_FRAME, LOGGING_FILE

_THREAD = re.compile(r"^(Current thread|Thread) 0x[0-9a-fA-F]+.*\(most recent call first\):", re.MULTILINE)
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line \d+ in (?P<name>.+)$', re.MULTILINE)
_ANY_FRAME = re.compile(r'^\s*(?:\|\s*)*File "(?P<file>[^"]*)", line \d+')
_LIBRARY = re.compile(
    r"/(site|dist)-packages/|/lib(64)?/python3(\.\d+)?/|^<frozen |^<string>$|/torch/_?[a-z]"
    r"|/allstep/(checkpoint|cli|coordination|data|diagnosis|engine|faults|handlers|launch|metrics|monitor|outputs|parallel"
    r"|placement|protocol|testing|world)/"
)
_TIMER = re.compile(r"^Timeout \(.*\)!$", re.MULTILINE)
_PROMPTS: dict[str, tuple[str, ...]] = {
    "pdb.py": ("interaction", "cmdloop", "_cmdloop"),
    "debugger.py": ("interaction", "cmdloop"),  # of IPython and pudb
    "code.py": ("interact",),
    "embed.py": ("embed",),
    "pydevd.py": ("do_wait_suspend", "_do_wait_suspend"),  # under debugpy, which editors use
}
"""The functions, by file, that stand in a stack while a person is waited for, and at no other time."""

_NEAR = 6  # frames from the innermost among which a waiting call shows


def main_thread(text: str) -> str:
    """The stack of the main thread, which faulthandler writes last; the newest one where several were written."""
    last = _TIMER.split(text)[-1]
    starts = [match.start() for match in _THREAD.finditer(last)]
    return last[starts[-1] :].rstrip() if starts else last.strip()


def without_current_thread(text: str) -> str:
    """The stacks but for that of the thread that took them."""
    starts = [match.start() for match in _THREAD.finditer(text)]
    parts = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return "".join(part for part in parts if not part.startswith("Current thread")) or text


def waits_in(text: str) -> str:
    """What the main thread waits for its peers in: a collective's name, "gradients", or empty where it does neither."""
    # Only the innermost frames: a rank may compute for long inside a function that a collective's hook called.
    frames = [(match["file"], match["name"]) for match in _FRAME.finditer(main_thread(text))][:_NEAR]
    if frames and frames[0][1] == BACKWARD_FRAME:
        return "gradients"
    if not frames or not _waits(frames[0][0]):
        return ""
    inside = [name for file, name in frames if _waits(file) and not file.endswith(LOGGING_FILE)]
    return inside[0] if inside else frames[0][1]


def at_a_prompt(text: str) -> bool:
    """Whether the main thread waits for what a person types: at a debugger's prompt, or in an interactive console."""
    return any(
        match["name"].rpartition(".")[2] in _PROMPTS.get(match["file"].rpartition("/")[2], ())
        for match in _FRAME.finditer(main_thread(text))
    )


def _waits(file: str) -> bool:
    return "/torch/distributed/" in file or re.search(r"/allstep/(coordination|world)/", file) is not None


def set_off(text: str) -> list[str]:
    """The lines of a traceback, the user's frames marked with `>`, everything else indented alike."""
    lines = []
    users = False
    for line in text.rstrip().splitlines():
        frame = _ANY_FRAME.match(line)
        if frame:
            users = not _LIBRARY.search(frame["file"])
        elif not line.startswith("    "):  # no source line of the frame above
            users = False
        lines.append(f"{'> ' if users else '  '}{line}".rstrip())
    return lines
