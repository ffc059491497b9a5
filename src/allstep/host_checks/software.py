"""Whether the Python environment is the one that was meant, and has what allstep needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from allstep.host_checks.finding import Host, HostFinding


def check_python(host: Host) -> Iterator[HostFinding]:
    """The interpreter, the active environment, and the `allstep` that a shell would start."""
    scripts = sysconfig.get_path("scripts")
    yield from judge_environment(host.environ, sys.prefix, scripts)


def judge_environment(environ: Mapping[str, str], prefix: str, scripts: str) -> Iterator[HostFinding]:
    """Compare this interpreter's environment with what the shell has activated.

    Args:
        environ: variables of the shell.
        prefix: of this interpreter's environment, as `sys.prefix`.
        scripts: the folder in which its `allstep` lies.
    """
    here = f"Python {platform.python_version()} of {prefix}"
    active = environ.get("VIRTUAL_ENV") or environ.get("CONDA_PREFIX")
    command = shutil.which("allstep", path=environ.get("PATH", os.defpath))
    if active and os.path.realpath(active) != os.path.realpath(prefix):
        remedy = f"Install allstep there ({active}/bin/pip install allstep), or deactivate it"
        yield HostFinding("python", "warning", f"{here}, while {active} is the active environment", remedy)
    elif command and Path(command).parent.resolve() != Path(scripts).resolve():
        remedy = "Activate this environment, or start `python -m allstep`"
        yield HostFinding("python", "warning", f"{here}, while the shell would start {command}", remedy)
    else:
        yield HostFinding("python", "good", here)


def check_requirements(host: Host) -> Iterator[HostFinding]:
    """The versions of what allstep needs."""
    try:
        wanted = importlib.metadata.requires("allstep") or ()
    except importlib.metadata.PackageNotFoundError:
        yield HostFinding("requirements", "good", "allstep is used from its source, which says nothing of versions")
        return
    yield from judge_requirements(wanted, _installed)


def judge_requirements(wanted: Sequence[str], installed: Callable[[str], str | None]) -> Iterator[HostFinding]:
    """Compare what is wanted, as package metadata has it, with the versions that are installed."""
    needed = [each for each in map(Requirement, wanted) if each.marker is None or each.marker.evaluate({"extra": ""})]
    unmet = []
    for each in needed:
        version = installed(each.name)
        if version is None:
            unmet.append((each, f"{each.name} is not installed"))
        elif not each.specifier.contains(version, prereleases=True):
            unmet.append((each, f"{each.name} is {version}, and {each.specifier} is needed"))
    if unmet:
        names = " ".join(f"'{each.name}{each.specifier}'" for each, _ in unmet)
        yield HostFinding("requirements", "bad", "; ".join(text for _, text in unmet), f"pip install {names}")
    else:
        yield HostFinding("requirements", "good", f"{len(needed)} packages have versions that fit")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
