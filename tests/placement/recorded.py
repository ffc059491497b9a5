"""The environments under `environments/`: each recorded from a real launcher, which its first line names.

Only the variables that place a process are kept, and addresses and paths of the recording machine are left out.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "environments"


def recorded(name: str, **changes: str | None) -> dict[str, str]:
    """The recorded environment of that name, with variables changed, or removed where None."""
    lines = (FOLDER / f"{name}.env").read_text().splitlines()
    environ = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    for variable, value in changes.items():
        environ.pop(variable, None)
        if value is not None:
            environ[variable] = value
    return environ


def all_names() -> list[str]:
    """The names of all recorded environments."""
    return sorted(path.stem for path in FOLDER.glob("*.env"))
