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
    """The versions of what allstep needs, and of the libraries that this build of torch was made for."""
    yield from judge_requirements(_requirements_of("allstep"), _requirements_of("torch"), _installed)


def judge_requirements(
    wanted: Sequence[str], by_torch: Sequence[str], installed: Callable[[str], str | None]
) -> Iterator[HostFinding]:
    """Compare what is wanted with the versions that are installed.

    Args:
        wanted: by allstep, as package metadata has it.
        by_torch: the same by torch: a build for CUDA names NCCL, cuDNN and their like, each with its version.
        installed: gives the version of a package, or None.
    """
    needed = [Requirement(each) for each in wanted]
    others = [Requirement(each) for each in by_torch]
    missing, unsuited = _unmet(needed, installed), _unmet(others, installed)
    if missing:
        yield HostFinding("requirements", "bad", "; ".join(missing.values()), _install(missing))
    if unsuited:
        # Other versions often do, so torch's import is what decides.
        text = f"this torch was built for other libraries: {'; '.join(unsuited.values())}"
        yield HostFinding("requirements", "warning", text, _install(unsuited))
    if not missing and not unsuited:
        count = len({each.name for each in (*needed, *others) if _applies(each)})
        yield HostFinding("requirements", "good", f"{count} packages have versions that fit")


def _unmet(needed: Sequence[Requirement], installed: Callable[[str], str | None]) -> dict[str, str]:
    """What is wrong with each package that does not fit, by its requirement."""
    unmet = {}
    for each in filter(_applies, needed):
        version = installed(each.name)
        if version is None:
            unmet[f"{each.name}{each.specifier}"] = f"{each.name} is not installed"
        elif not each.specifier.contains(version, prereleases=True):
            unmet[f"{each.name}{each.specifier}"] = f"{each.name} is {version}, and {each.specifier} is needed"
    return unmet


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _install(unmet: Mapping[str, str]) -> str:
    return f"pip install {' '.join(repr(each) for each in unmet)}"


def _requirements_of(name: str) -> list[str]:
    """What a package says that it needs; nothing where it is not installed, or is used from its source."""
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
