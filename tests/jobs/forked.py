"""Scripts as processes that part after they have imported torch, which takes seconds for each that is started alone.

Contract: `run_forked` starts one Python, which imports what `MODULES` names and forks a process for each script. A
script is then run as `__main__`, with arguments and variables of its own; its end is Python's own, with its exit code
and handlers. The scripts run at the same time. For tests of what a process does once it is there; not for those of how
it starts, or of what it imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.jobs.job import Job, Line, Stream
from tests.jobs.processes import LIMIT
from tests.jobs.running import start

MODULES = ("torch", "allstep.engine", "allstep.handlers", "allstep.world")

_PROGRAM = """
import sys
sys.path.pop(0)  # the folder: what lies there is the scripts'
import json, os
from importlib import import_module
for name in json.loads(sys.argv[1]):
    import_module(name)
running = {}
for number, script in enumerate(json.loads(sys.argv[2])):
    pid = os.fork()
    if pid == 0:
        break
    running[pid] = number
else:
    for stream in sum((each["streams"] for each in json.loads(sys.argv[2])), []):
        os.close(stream)
    while running:
        pid, status = os.wait()
        print(running.pop(pid), pid, os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)
for target, stream in enumerate(script["streams"], 1):
    os.dup2(stream, target)
os.environ.update(script["variables"])
sys.path.insert(0, os.path.dirname(script["path"]))
sys.argv[:] = [script["path"], *script["arguments"]]
__file__ = script["path"]
exec(compile(open(script["path"]).read(), script["path"], "exec"))
"""


@dataclass(frozen=True)
class Script:
    """A file to run, its arguments, and what is added to its environment."""

    path: Path
    arguments: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def run_forked(folder: Path, *scripts: Script, env: Mapping[str, str] | None = None) -> list[Job]:
    """Run the scripts to their ends in `folder`, and say what came of each."""
    said: list[list[Line]] = [[] for _ in scripts]
    with contextlib.ExitStack() as stack:
        asked, theirs, readers = [], [], []
        for lines, script in zip(said, scripts, strict=True):
            streams = []
            names: tuple[Stream, ...] = ("out", "err")
            for name in names:
                reading, writing = os.pipe()
                streams.append(writing)
                readers.append(threading.Thread(target=_read, args=(reading, name, lines), daemon=True))
            theirs += streams
            asked.append(
                {
                    "path": str(script.path),
                    "arguments": list(script.arguments),
                    "variables": dict(script.variables),
                    "streams": streams,
                }
            )
        argv = [sys.executable, "-c", _PROGRAM, json.dumps(MODULES), json.dumps(asked)]
        variables = {"OMP_NUM_THREADS": "1"} | dict(env or {})
        running = stack.enter_context(start(folder, argv, env=variables, passed=theirs))
        for reader in readers:
            reader.start()
        for fd in theirs:
            os.close(fd)
        whole = running.end()
        for reader in readers:
            reader.join(LIMIT)
    assert whole.code == 0, whole.text
    ended = {number: (pid, code, line.at) for line in whole.said for number, pid, code in [map(int, line.text.split())]}
    return [
        Job(code, tuple(said[number]), whole.began, at, [], folder, pid)
        for number, (pid, code, at) in sorted(ended.items())
    ]


def _read(fd: int, name: Stream, lines: list[Line]) -> None:
    with open(fd, errors="replace") as stream:
        lines.extend(Line(time.monotonic(), name, line) for line in stream)
