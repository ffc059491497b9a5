"""The code as it was submitted: a copy that runs, and what tells it from a commit.

Contract: `find_code` says what there is to copy, and changes nothing. In a git work tree that is every file that git
tracks or would track, with submodules; elsewhere the files of the script's folder, without what is hidden or installed.
`copy_code` writes it. A job that waits in the queue then runs what was submitted, whatever is edited meanwhile. Data
does not belong to code: a file or a tree that is too large is refused, with the remedy.

A path of the code is `moved` into the copy. Folders of `sys.path` inside the tree, such as that of a package which is
installed for editing, are to be looked in first; so the job imports the copy and not the tree.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allstep.errors import SubmissionError

LARGEST_FILE = 64 << 20
LARGEST_TREE = 1 << 30
MOST_FILES = 50_000
_GIT_S = 60.0


@dataclass(frozen=True, slots=True)
class SubmittedCode:
    """What is to be copied.

    Args:
        root: the folder that holds all of it.
        files: relative to it.
        commit: of a git work tree; empty elsewhere.
        diff: from that commit to the files, as git shows it.
    """

    root: Path
    files: tuple[Path, ...]
    commit: str = ""
    diff: bytes = b""

    def moved(self, path: Path, copy: Path) -> Path:
        """Where a path of the tree is in the copy; the path itself where it is none of the tree."""
        try:
            return copy / path.relative_to(self.root)
        except ValueError:
            return path

    def moved_file(self, path: Path, copy: Path) -> Path:
        """Where a file is in the copy, or a folder with files; the path itself where it is not copied."""
        moved = self.moved(path, copy)
        if moved == path:
            return path
        relative = path.relative_to(self.root)
        return moved if any(each.is_relative_to(relative) for each in self.files) else path

    def python_path(self, looked_in: Sequence[str], copy: Path) -> list[str]:
        """Folders of the tree that Python looks in, in the copy."""
        folders = []
        for each in looked_in:
            path = Path(os.path.realpath(each))
            moved = self.moved_file(path, copy)  # an environment inside the tree is not copied
            if moved != path:
                folders.append(str(moved))
        return list(dict.fromkeys(folders))


def find_code(beside: Path, runs: Path) -> SubmittedCode:
    """Say what there is to copy.

    Args:
        beside: a folder of the code, absolute.
        runs: the folder of run folders, which is never copied.

    Raises:
        SubmissionError: it is too large for code, or cannot be read.
    """
    beside, runs = Path(os.path.realpath(beside)), Path(os.path.realpath(runs))
    top = _git(beside, "rev-parse", "--show-toplevel")
    if top is None:
        code = SubmittedCode(beside, tuple(_walk(beside, runs)))
    else:
        root = Path(os.path.realpath(os.fsdecode(top.rstrip(b"\n"))))
        commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD") or b""
        diff = (_git(root, "diff", "--binary", "HEAD") or b"") if commit else b""
        files = tuple(file for file in _tracked(root) if not (root / file).is_relative_to(runs))
        code = SubmittedCode(root, files, commit.decode("ascii", "replace").strip(), diff)
    _check_size(code)
    return code


def copy_code(code: SubmittedCode, target: Path) -> None:
    """Write the copy; raises SubmissionError."""
    try:
        for file in code.files:
            to = target / file
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(code.root / file, to, follow_symlinks=False)
            if to.is_symlink() and not os.path.isabs(link := os.readlink(to)):
                aim = Path(os.path.normpath(code.root / file.parent / link))
                # A link within the code stays one; one to data leads to the data from the copy too.
                if not any(each == aim.relative_to(code.root) for each in code.files if aim.is_relative_to(code.root)):
                    to.unlink()
                    to.symlink_to(aim)
    except OSError as error:
        raise SubmissionError(f"the code cannot be copied to {target}: {error}; with --live none is made") from error


def _tracked(root: Path) -> list[Path]:
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard") or b""
    files: list[Path] = []
    for name in dict.fromkeys(listed.split(b"\0")):
        path = Path(os.fsdecode(name))
        full = root / path
        if not name or not os.path.lexists(full):  # deleted, and not committed yet
            continue
        if full.is_dir() and not full.is_symlink():  # a submodule
            files += [path / each for each in _tracked(full)] if (full / ".git").exists() else []
        else:
            files.append(path)
    return files


def _walk(folder: Path, runs: Path) -> list[Path]:
    files: list[Path] = []
    for here, folders, names in os.walk(folder):
        at = Path(here)
        folders[:] = [
            each
            for each in sorted(folders)
            if not each.startswith(".")
            and each not in ("__pycache__", "node_modules")
            and not (at / each / "pyvenv.cfg").exists()
            and not (at / each / "conda-meta").exists()
            and at / each != runs
        ]
        files += [(at / each).relative_to(folder) for each in sorted(names) if (at / each).is_file()]
        if len(files) > MOST_FILES:
            break
    return files


def _check_size(code: SubmittedCode) -> None:
    remedy = "have git ignore data, or submit with --live, which copies nothing"
    if len(code.files) > MOST_FILES:
        raise SubmissionError(f"{code.root} has more than {MOST_FILES} files, which is no code to copy; {remedy}")
    total = 0
    for file in code.files:
        size = (code.root / file).lstat().st_size
        total += size
        if size > LARGEST_FILE:
            raise SubmissionError(f"{code.root / file} has {size >> 20} MiB, too large to be code; {remedy}")
    if total > LARGEST_TREE:
        raise SubmissionError(f"the files of {code.root} have {total >> 20} MiB, too large to be code; {remedy}")


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints; None where there is no git, or no work tree."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
