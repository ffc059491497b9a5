"""The copy of the code: what is in it, and what it is refused for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from allstep.errors import SubmissionError
from allstep.submission import code_copy
from allstep.submission.code_copy import copy_code, find_code


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git work tree with a change, a new file, an ignored one, and links."""
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "data").mkdir()
    (project / "data" / "big.bin").write_text("data")
    (project / ".gitignore").write_text("data\nruns\n")
    (project / "src" / "train.py").write_text("old")
    (project / "gone.py").write_text("x")
    git(project, "init", "--quiet")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "-m", "first")
    (project / "src" / "train.py").write_text("changed")
    (project / "src" / "new ü.py").write_text("new")
    (project / "gone.py").unlink()
    (project / "to_data").symlink_to("data")
    (project / "to_code.py").symlink_to("src/train.py")
    return project


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def test_a_work_tree_is_copied_as_it_is_without_what_git_ignores(project: Path) -> None:
    code = find_code(project / "src", project / "runs")
    target = project / "runs" / "job" / "code"
    copy_code(code, target)
    assert listed(target) == {".gitignore", "src/train.py", "src/new ü.py", "to_data", "to_code.py"}
    assert (target / "src" / "train.py").read_text() == "changed"
    assert code.commit == git(project, "rev-parse", "HEAD")
    assert b"-old" in code.diff
    assert b"+changed" in code.diff


def test_links_lead_to_code_in_the_copy_and_to_data_in_the_tree(project: Path) -> None:
    target = project / "runs" / "code"
    copy_code(find_code(project, project / "runs"), target)
    assert os.readlink(target / "to_code.py") == "src/train.py"
    assert (target / "to_data" / "big.bin").read_text() == "data"


def test_submodules_are_copied_too(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "lib.py").write_text("lib")
    git(other, "init", "--quiet")
    git(other, "add", ".")
    git(other, "commit", "--quiet", "-m", "lib")
    git(project, "submodule", "--quiet", "add", str(other), "lib")
    assert Path("lib/lib.py") in find_code(project, project / "runs").files


def test_without_git_the_scripts_folder_is_copied_but_no_environment(tmp_path: Path) -> None:
    for name in ("train.py", "pkg/a.py", "pkg/__pycache__/a.pyc", ".venv/x.py", "env/pyvenv.cfg", "env/x.py", "runs/l"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    code = find_code(tmp_path, tmp_path / "runs")
    assert {str(each) for each in code.files} == {"train.py", "pkg/a.py"}
    assert (code.commit, code.diff) == ("", b"")


def test_folders_that_python_looks_in_are_those_of_the_copy(project: Path) -> None:
    code = find_code(project, project / "runs")
    looked_in = [str(project / "src"), str(project), str(project / "data"), "/usr/lib", str(project / "src")]
    assert code.python_path(looked_in, Path("/copy")) == ["/copy/src", "/copy"]


@pytest.mark.parametrize("limit", ["LARGEST_FILE", "LARGEST_TREE", "MOST_FILES"])
def test_what_is_too_large_for_code_is_refused(limit: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_copy, limit, 3)
    with pytest.raises(SubmissionError, match="--live"):
        find_code(project, project / "runs")
