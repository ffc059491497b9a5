"""Images built and looked into without a container engine: buildah with a store of its own, bases by debootstrap.

Contract: `ensure_possible` returns where this process can build, installing what is missing where the environment
allows that. An `ImageStore` has its images below a folder, which `close` removes. No registry of images is asked:
debootstrap makes what it would give, committed under the very name that FROM uses, so a base from here has Debian's
packages and not every file of the published one. pip inside uses what this machine's is configured for: `base` writes
that into the image, and `build` mounts the folders that it names.

What can go wrong: no root, no programs, no mirror, or a kernel that refuses; each is `ImagesUnavailable` and says so. A
build that fails is an AssertionError with the end of what it said.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.jobs.launchers import ROOT
from tests.jobs.programs import SYSTEM_PATH, ProgramsUnavailable, ensure_programs

DEBIAN_BASE = "docker.io/library/debian:bookworm-slim"
"""What the Dockerfile takes where nothing else is said."""

_MIRROR = "http://deb.debian.org/debian"
_BUILD_S = 1800.0


class ImagesUnavailable(Exception):
    """No image can be built here; the message says why."""


@dataclass(frozen=True)
class Layer:
    """One layer of an image: the instruction that made it, its bytes as they lie on disk, and compressed by gzip."""

    instruction: str
    size: int
    compressed: int


def ensure_possible(environ: Mapping[str, str]) -> None:
    """Return where images can be built and containers be run; see the module's contract."""
    if os.geteuid() != 0:
        raise ImagesUnavailable("building an image without a container engine needs root")
    try:
        programs = ("buildah", "crun", "debootstrap")
        ensure_programs(programs, programs, environ)
    except ProgramsUnavailable as reason:
        raise ImagesUnavailable(str(reason)) from None


class ImageStore:
    """Images below a folder, which is made here and removed by `close`."""

    def __init__(self, folder: Path) -> None:
        overlay = "overlay" in Path("/proc/filesystems").read_text().split()
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._buildah = [
            *("buildah", "--root", str(folder / "store"), "--runroot", str(folder / "run")),
            *("--storage-driver", "overlay" if overlay else "vfs"),
        ]
        self._undo = contextlib.ExitStack()

    def base(self, name: str, *users: str) -> None:
        """Make a base image of Debian 12 by debootstrap; `users` are there before the Dockerfile adds its own."""
        root = self._folder / "debian"
        if not root.exists():
            made = _run(["debootstrap", "--variant=minbase", "bookworm", str(root), _MIRROR])
            if made.returncode:
                shutil.rmtree(root, ignore_errors=True)
                raise ImagesUnavailable(f"debootstrap failed: {(made.stderr or made.stdout)[-500:]}")
            _configure_pip(root)
        container = self._ask("from", "scratch").strip()
        self._ask("add", "--quiet", container, str(root), "/")
        for user in users:
            self._ask("run", "--isolation", "chroot", container, "--", "useradd", "--create-home", user)
        self._ask("config", "--cmd", "/bin/bash", "--env", f"PATH={_PATH_INSIDE}", container)
        self._ask("commit", "--quiet", "--format", "docker", container, name)
        self._ask("rm", container)

    def build(self, tag: str, **arguments: str) -> None:
        """Build the repository's Dockerfile, each instruction a layer; `arguments` are those of the Dockerfile."""
        given = [each for name, value in arguments.items() for each in ("--build-arg", f"{name}={value}")]
        mounts = [each for folder in _folders_of_pip() for each in ("--volume", f"{folder}:{folder}:ro")]
        options = ["--isolation", "chroot", "--pull-never", "--format", "docker", "--layers", "--tag", tag]
        self._ask("bud", *options, *mounts, *given, str(ROOT))

    def settings(self, tag: str) -> Mapping[str, Any]:
        """What the image says of how it is to be started: User, Env, Entrypoint, Cmd, WorkingDir."""
        found: Mapping[str, Any] = json.loads(self._ask("inspect", "--type", "image", tag))["Docker"]["config"]
        return found

    def root(self, tag: str) -> Path:
        """The folder in which a new container of the image has its root, until `close`."""
        container = self._ask("from", "--pull-never", tag).strip()
        self._undo.callback(self._ask, "rm", container)
        found = self._ask("mount", container).strip()
        self._undo.callback(self._ask, "umount", container)
        return Path(found)

    def save(self, tag: str, path: Path) -> None:
        """Write an image to a file as `docker save` does."""
        self._ask("push", "--quiet", tag, f"docker-archive:{path}")

    def layers(self, tag: str) -> list[Layer]:
        """The layers of an image, the lowest first."""
        folder = self._folder / "pushed"
        self._ask("push", "--quiet", "--disable-compression", tag, f"dir:{folder}")
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            config = json.loads(_blob(folder, manifest["config"]).read_text())
            instructions = [each["created_by"] for each in config["history"] if not each.get("empty_layer")]
            blobs = [_blob(folder, each) for each in manifest["layers"]]
            return [
                Layer(instruction, blob.stat().st_size, _compressed_size(blob))
                for instruction, blob in zip(instructions, blobs, strict=True)
            ]
        finally:
            shutil.rmtree(folder)

    def close(self) -> None:
        """Unmount what was mounted, and remove the folder: images are large."""
        self._undo.close()
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for point in reversed(mounted):  # buildah's storage mounts its own folder for as long as it likes
            if Path(point).is_relative_to(self._folder):
                _run(["umount", point])
        shutil.rmtree(self._folder)

    def _ask(self, *arguments: str) -> str:
        done = _run([*self._buildah, *arguments])
        if done.returncode:
            said = (done.stdout + done.stderr)[-4000:]
            raise AssertionError(f"buildah {' '.join(arguments)} ended with {done.returncode}:\n{said}")
        return done.stdout


_PATH_INSIDE = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PATH": SYSTEM_PATH}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_BUILD_S, check=False)


def _pip_settings() -> dict[str, str]:
    """What pip is configured for here, by files and by variables, which win."""
    said = _run([sys.executable, "-m", "pip", "config", "list"]).stdout
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)='(.*)'$", said, re.MULTILINE)
    return {name: value for source in ("global", "install", ":env:") for at, name, value in found if at == source}


def _folders_of_pip() -> list[Path]:
    """The folders with packages that pip's settings name; an index has its files beside its pages."""
    found = set()
    for word in " ".join(_pip_settings().values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.is_dir():
            found.add(path.parent if word.startswith("file://") else path)
    return sorted(found)


def _configure_pip(root: Path) -> None:
    """Have pip in an image do as this machine's does; files that it is told of are copied, such as certificates."""
    kept = Path("etc/pip-files")  # at their own place a package of the base could write over them
    (root / kept).mkdir()
    lines = ["[global]"]
    for name, value in _pip_settings().items():
        path = Path(value)
        if path.is_absolute() and path.is_file():
            shutil.copyfile(path, root / kept / path.name)
            value = f"/{kept / path.name}"
        lines.append(f"{name} = {value}")
    (root / "etc/pip.conf").write_text("\n".join([*lines, ""]))


def _blob(folder: Path, described: Mapping[str, str]) -> Path:
    return folder / described["digest"].partition(":")[2]


def _compressed_size(path: Path) -> int:
    """What gzip makes of a file, in bytes: about what goes over the network."""
    compress, size = zlib.compressobj(wbits=31), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size += len(compress.compress(chunk))
    return size + len(compress.flush())
