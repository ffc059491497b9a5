"""Libraries of CUDA that hold nothing, so that a CUDA build of torch loads on a machine without CUDA.

torch_xla loads beside one torch only, whose builds on PyPI are linked against CUDA's libraries. Several gigabytes of
these would be installed for nothing. For each library that torch's own need and this machine does not have, a stub is
compiled with the names that torch asks it for. Every function in it returns 100, which is CUDA's code for "no device".

Usage: `python stub_libraries.py`, in the environment that has torch. Needs gcc and binutils.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

_OF_CUDA = re.compile(r"^lib(cu|nccl|nv)")
_UNVERSIONED = re.compile(r"^(cu|nccl|nv)")


def main() -> None:
    """Write the stubs to a folder in which torch's libraries look for CUDA's."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        sys.exit("torch is not installed in this environment")
    package = Path(found.origin).parent
    needed: set[str] = set()
    names: dict[str, set[str]] = defaultdict(set)
    versions: dict[str, set[str]] = defaultdict(set)
    for library in sorted((package / "lib").glob("*.so")):
        dynamic = _output("readelf", "-dVW", str(library))
        needed |= {name for name in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic) if _OF_CUDA.match(name)}
        owner = ""
        for file, version in re.findall(r"File: (\S+)|Name: (\S+)", dynamic[dynamic.find("Version needs") :]):
            owner = file or owner
            if version:
                versions[owner].add(version)
        for line in _output("nm", "-D", "--undefined-only", "--with-symbol-versions", str(library)).splitlines():
            name, _, version = line.split()[-1].partition("@")
            if version or _UNVERSIONED.match(name):
                names[version].add(name)
    missing = sorted(name for name in needed if not _loads(name))
    folder = package.parent / "nvidia" / "cuda_runtime" / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    # A name without a version is found in any library that is loaded.
    unversioned = names[""]
    for at, library_name in enumerate(missing):
        exported = {version: names[version] for version in versions[library_name]}
        _compile(folder / library_name, exported, unversioned if at == 0 else set())
    print(f"stubs of {len(missing)} libraries are in {folder}")


def _compile(target: Path, exported: dict[str, set[str]], unversioned: set[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, versions = Path(scratch, "stub.c"), Path(scratch, "versions")
        every = unversioned.union(*exported.values())
        source.write_text("".join(f"int {name}() {{ return 100; }}\n" for name in sorted(every)))
        versions.write_text(
            "".join(
                f"{version} {{ global: {' '.join(f'{name};' for name in sorted(of))} }};\n"
                for version, of in exported.items()
            )
        )
        options = [f"-Wl,--version-script={versions}"] if exported else []
        command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{target.name}", *options, "-o", target, source]
        subprocess.run(list(map(str, command)), check=True)


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
