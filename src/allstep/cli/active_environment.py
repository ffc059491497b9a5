"""The interpreter of the environment that a person has activated.

Contract: `allstep run` calls `change_to_active_environment` before anything else. Where the command `allstep` that the
shell found belongs to another environment than the active one (a virtual environment, or conda's), and the active one
can import allstep too, as one made with --system-site-packages can, this process becomes the same command under its
interpreter: workers then find the packages that the person installed there. Where it cannot, a warning says whose
interpreter is used. `python -m allstep` says which interpreter is meant, and nothing is changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_PATIENCE_S = 60.0


def active_interpreter(environ: Mapping[str, str], prefix: str, program: str) -> str | None:
    """The interpreter of the active environment, where it is another than this process's; else None.

    Args:
        environ: variables of the shell, of which activation sets VIRTUAL_ENV or CONDA_PREFIX.
        prefix: of this process's environment, as `sys.prefix`.
        program: as `sys.argv[0]`.
    """
    folder = environ.get("VIRTUAL_ENV") or environ.get("CONDA_PREFIX")
    if not folder or Path(program).name != "allstep":
        return None
    interpreter = Path(folder) / "bin" / "python"
    is_other = os.path.realpath(folder) != os.path.realpath(prefix)
    return str(interpreter) if is_other and os.access(interpreter, os.X_OK) else None


def change_to_active_environment(argv: Sequence[str]) -> None:
    """Run `allstep ARGV` under the active environment's interpreter, where that is another and can; else return."""
    interpreter = active_interpreter(os.environ, sys.prefix, sys.argv[0])
    if interpreter is None:
        return
    look = [interpreter, "-c", "import allstep.cli.main"]
    try:
        found = subprocess.run(look, capture_output=True, timeout=_PATIENCE_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        found = False
    if found:
        os.execv(interpreter, [interpreter, "-m", "allstep", *argv])
    print(
        f"allstep: warning: the active environment {Path(interpreter).parents[1]} has no allstep, so workers run under "
        f"{sys.executable}; install allstep there to have its packages",
        file=sys.stderr,
        flush=True,
    )
