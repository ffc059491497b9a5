"""Whether the folder for runs is on a file system that does what a save relies on.

Contract: `check_folder` looks at the folder, or where it is not there yet, at the nearest folder above it. What is
tried out there happens in a process of its own (`folder_probe`), which can be killed where a file server is silent.
Nothing is left behind.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allstep.host_checks import folder_probe
from allstep.host_checks.finding import Host, HostFinding, ask, graded, in_bytes
from allstep.protocol.foreign_text import one_line

MIB, GIB = 1 << 20, 1 << 30
SLOW_SYNC_S = 1.0
SLOW_BYTES_A_SECOND = 10 * MIB
FAR_CLOCK_S = 2.0
LONG_CACHE_S = 60  # as NFS has it by default

_IN_MEMORY = ("tmpfs", "ramfs")

_FAILURES = {
    "create": "no file can be written there",
    "replace": "a file cannot be renamed over another, which every save does",
    "exclusive": "creating a file that is there already succeeds, so two jobs could take one folder of checkpoints",
    "lock": "a lock that one process holds does not keep out another",
    "sync": "a file cannot be written through to the disk",
    "write": "a file of some megabytes cannot be written",
    "remove": "what was written cannot be removed",
}


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system: where it is mounted, its kind, and its options."""

    point: str
    kind: str
    options: tuple[str, ...]


def mount_of(path: str, mountinfo: str) -> Mount | None:
    """The mount on which an absolute path without links lies, by the text of /proc/self/mountinfo."""
    best: Mount | None = None
    for line in mountinfo.splitlines():
        fields, separator, rest = line.partition(" - ")
        words, kind_and_more = fields.split(), rest.split()
        if not separator or len(words) < 6 or len(kind_and_more) < 1:
            continue
        # Spaces in names stand as octal numbers.
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), words[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.point)):  # of two at one place the later one is on top
            options = (*words[5].split(","), *(kind_and_more[2].split(",") if len(kind_and_more) > 2 else ()))
            best = Mount(point, kind_and_more[0], options)
    return best


def check_folder(host: Host) -> Iterator[HostFinding]:
    """The folder's file system: its kind and options, its room, and what it does when it is used."""
    folder = nearest(host.folder)
    mount = mount_of(os.path.realpath(folder), host.read("proc/self/mountinfo"))
    shown = f"{folder} ({mount.kind})" if mount else str(folder)
    ill: list[HostFinding] = []
    if mount is not None:
        ill += judge_mount(mount, shown)
    room = os.statvfs(folder)
    free, names = room.f_bavail * room.f_frsize, room.f_favail if room.f_files else None
    ill += judge_room(free, names, shown)
    inside = folder / f".allstep-doctor-{secrets.token_hex(6)}"
    # Isolated, and without the environment's packages: neither is needed, and both take time.
    said = ask([sys.executable, "-I", "-S", folder_probe.__file__, inside], host)
    if said.problem and inside.is_dir():
        shutil.rmtree(inside, ignore_errors=True)
    results, silent = read_steps(said.out)
    if silent or (said.problem and not results):
        step = f" while it was to {silent}" if silent else ""
        remedy = "Its file server may be gone or overloaded: ask its administrator, or choose another folder"
        ill.append(HostFinding("folder", "bad", f"{shown}: {said.problem}{step}", remedy))
    ill += judge_steps(results, shown)
    yield from ill
    if not ill:
        yield HostFinding("folder", "good", f"{shown}: {_in_numbers(results)}, {in_bytes(free)} free")


def nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    path = folder.absolute()
    return next(each for each in (path, *path.parents) if os.path.isdir(each))


def judge_mount(mount: Mount, shown: str) -> Iterator[HostFinding]:
    """What the kind of a file system and its options say."""
    options = dict(each.partition("=")[::2] for each in mount.options)
    if "ro" in options:
        yield HostFinding("folder", "bad", f"{shown} is mounted read-only", "Choose another with --runs, or remount it")
    if mount.kind in _IN_MEMORY:
        text = f"{shown} is kept in memory: checkpoints are gone when this machine restarts, and take memory until then"
        yield HostFinding("folder", "warning", text, "Choose a folder on a disk with --runs")
    if mount.kind not in ("nfs", "nfs4"):
        return
    if "soft" in options:
        text = f"{shown} is mounted soft: a server that is slow for a moment makes writes fail"
        yield HostFinding("folder", "warning", text, "Have it mounted with `hard`")
    if "nolock" in options or options.get("local_lock", "none") not in ("none", ""):
        text = f"{shown}: locks hold on this machine only (nolock or local_lock)"
        yield HostFinding("folder", "warning", text, "Have it mounted without nolock and local_lock")
    longest = max((int(options[name]) for name in _CACHE_OPTIONS if options.get(name, "").isdecimal()), default=0)
    if longest > LONG_CACHE_S:
        text = f"{shown}: this machine may not see for {longest} s what others write there (attribute cache)"
        yield HostFinding("folder", "warning", text, "Have it mounted with acregmax=60,acdirmax=60 or less")


_CACHE_OPTIONS = ("actimeo", "acregmax", "acdirmax")


def judge_room(free: int, names: int | None, shown: str) -> Iterator[HostFinding]:
    """Decide by free bytes, and by how many more files there can be (None where that has no limit)."""
    remedy = "Remove what is no longer needed, or choose another folder with --runs"
    if free < GIB:
        verdict = graded(bad=free < 100 * MIB)
        yield HostFinding("folder", verdict, f"{shown} has {in_bytes(free)} free", remedy)
    if names is not None and names < 1000:
        verdict = graded(bad=names < 100)
        yield HostFinding("folder", verdict, f"{shown} has room for {names} more files (inodes)", remedy)


def read_steps(out: str) -> tuple[dict[str, dict[str, Any]], str]:
    """What came of each step of the probe, and the step that was begun and not ended, or ""."""
    lines = out.splitlines()
    results = {name: json.loads(text) for name, text in zip(lines[::2], lines[1::2], strict=False)}
    return results, lines[-1] if len(lines) % 2 else ""


def judge_steps(results: Mapping[str, Mapping[str, Any]], shown: str) -> Iterator[HostFinding]:
    """What the file system did when it was used."""
    for name, result in results.items():
        if "error" in result or result.get("works") is False:
            why = f": {one_line(result['error'])}" if "error" in result else ""
            # allstep itself takes no locks; tools beside it do.
            verdict = graded(bad=name not in ("lock", "remove"))
            yield HostFinding(
                "folder", verdict, f"{shown}: {_FAILURES[name]}{why}", "Choose another folder with --runs"
            )
    seconds = results.get("sync", {}).get("seconds", 0.0)
    if seconds > SLOW_SYNC_S:
        text = f"{shown} takes {seconds:.1f} s to write a few bytes through to the disk"
        yield HostFinding(
            "folder", "warning", text, "It may be overloaded: look at it again, or choose another with --runs"
        )
    speed = _speed(results)
    if speed is not None and speed < SLOW_BYTES_A_SECOND:
        text = f"{shown} is written at {speed / MIB:.1f} MiB/s, which is slow for checkpoints"
        yield HostFinding(
            "folder", "warning", text, "It may be overloaded: look at it again, or choose another with --runs"
        )
    ahead = results.get("create", {}).get("ahead", 0.0)
    if abs(ahead) > FAR_CLOCK_S:
        way = "ahead of" if ahead > 0 else "behind"
        text = f"the clock of the server of {shown} is {abs(ahead):.0f} s {way} this machine's"
        yield HostFinding("clock", "warning", text, "Start chrony or systemd-timesyncd on both")


def _speed(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    written = results.get("write", {})
    return written["bytes"] / max(written["seconds"], 1e-6) if "bytes" in written else None


def _in_numbers(results: Mapping[str, Mapping[str, Any]]) -> str:
    speed = _speed(results) or 0.0
    return f"written at {in_bytes(speed)}/s, through to the disk in {results['sync']['seconds'] * 1000:.0f} ms"
