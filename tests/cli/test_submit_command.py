"""`allstep submit` up to sbatch, which is a program of the test's here; the real one is in tests/slurm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from allstep.cli.main import main
from allstep.submission import slurm_commands


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder, with a script; no git above it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "train.py").write_text("print(1)\n")
    return tmp_path


def sbatch(project: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    folder = project / ".bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/sh\n{program}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def said(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["submit", *argv])
    return code, *capfd.readouterr()


def test_a_dry_run_prints_the_script_and_changes_nothing(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capfd, "--dry-run", "--name=a", "--nproc=2", "--sbatch", "--qos=high", "train.py", "--dry-run")
    assert code == 0
    assert "#SBATCH --qos=high\n" in out
    assert f"--runs={project}/runs" in out
    assert "--nproc=2" in out
    assert out.split()[-3::2] == [f"{project}/runs/a/code/train.py", "--dry-run"]
    assert sorted(path.name for path in project.iterdir()) == ["train.py"]


def test_what_is_submitted_is_what_a_dry_run_prints(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sbatch(project, monkeypatch, 'cp "$2" given.sh; echo "47;cluster"')
    _, shown, _ = said(capfd, "--name=a", "--dry-run", "train.py", "x y")
    code, out, _ = said(capfd, "--name=a", "train.py", "x y")
    assert (code, out) == (0, f"job 47 submitted; its log: {project}/runs/a/slurm-47.log\n")
    assert (project / "given.sh").read_text() == shown
    assert (project / "runs/a/code/train.py").read_text() == "print(1)\n"
    assert json.loads((project / "runs/a/submission.json").read_text())["job"] == "47"
    assert (project / "runs/a").stat().st_mode & 0o77 == 0


def test_a_copy_that_a_job_may_still_run_is_not_replaced(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sbatch(project, monkeypatch, "echo 47")
    said(capfd, "--name=a", "train.py")
    code, out, error = said(capfd, "--name=a", "train.py")
    assert (code, out) == (2, "")
    assert "give another --name" in error
    assert (project / "runs/a/job.sh").exists()


def test_sbatch_hears_nothing_of_the_job_that_it_is_called_in(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sbatch(project, monkeypatch, "env > seen; echo 47")
    for name in ("SLURM_CONF", "SLURM_CPU_BIND", "SLURM_JOB_ID", "SBATCH_SIGNAL", "SBATCH_QOS"):
        monkeypatch.setenv(name, "x")
    assert said(capfd, "--name=a", "train.py")[0] == 0
    seen = re.findall(r"^((?:SLURM|SBATCH)_\w+)=", (project / "seen").read_text(), re.M)
    assert seen == ["SLURM_CONF"]
    assert "#SBATCH --qos=x\n" in (project / "runs/a/job.sh").read_text()


def test_jobs_of_one_second_have_folders_of_their_own(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sbatch(project, monkeypatch, "echo 47")
    monkeypatch.setattr("time.strftime", lambda *_: "20261201-0000")
    logs = [said(capfd, "--live", "train.py")[1].split()[-1] for _ in range(2)]
    assert [Path(log).parent.name for log in logs] == ["train-20261201-0000", "train-20261201-0000_2"]


def test_a_name_is_not_used_twice_while_its_job_is_in_the_queue(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sbatch(project, monkeypatch, "echo 47")
    assert said(capfd, "--name=a", "--live", "train.py")[0] == 0
    queue = f"echo 46 /elsewhere/job.sh; echo 47 {project}/runs/a/job.sh"
    (project / ".bin" / "squeue").write_text(f"#!/bin/sh\n{queue}\n")
    (project / ".bin" / "squeue").chmod(0o755)
    code, out, error = said(capfd, "--name=a", "--live", "train.py")
    assert (code, out) == (2, "")
    assert "job 47 of this name is in the queue" in error


def test_live_runs_the_tree_and_copies_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sbatch(project, monkeypatch, "echo 47")
    assert said(capfd, "--name=a", "--live", "train.py")[0] == 0
    assert sorted(path.name for path in (project / "runs/a").iterdir()) == ["job.sh", "submission.json"]
    assert f"    {project}/train.py" in (project / "runs/a/job.sh").read_text()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (None, "there is no sbatch here"),
        ("echo 'sbatch: error: Invalid qos specification' >&2; exit 1", "SLURM refused the job: .*Invalid qos"),
        ("echo 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1", "scontrol ping"),
        ("sleep 60", "did not answer"),
    ],
)
def test_a_job_that_slurm_does_not_take_is_one_line_and_no_folder(
    program: str | None, words: str, project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_commands, "_ANSWER_S", 1.0)
    if program is None:
        monkeypatch.setenv("PATH", str(project))
    else:
        sbatch(project, monkeypatch, program)
    code, out, error = said(capfd, "--name=a", "train.py")
    assert (code, out) == (2, "")
    assert re.search(f"^allstep: error: .*{words}", error), error
    assert not (project / "runs/a").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nodes=2"], "a script to run is missing"),
        (["absent.py"], "there is no script absent.py"),
        (["--tasks-per-node=2", "--nproc=2", "train.py"], "--tasks-per-node does without"),
        (["--nnodes=2", "train.py"], "unrecognized arguments: --nnodes"),
        (["--max-restarts=many", "train.py"], "must be an integer"),
        (["--part=x", "train.py"], "did you mean"),
    ],
)
def test_a_wrong_command_line_is_named(
    argv: list[str], words: str, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, error = said(capfd, "--dry-run", *argv)
    assert (code, out) == (2, "")
    assert words in error


def test_one_file_has_the_settings_of_the_job_and_of_the_run(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "a.yaml").write_text("nproc: 2\nsubmit:\n  nodes: 2-4\n  sbatch: [--qos=high]\n  name: big\n")
    code, out, error = said(capfd, "--config=a.yaml", "--dry-run", "--time=5", "train.py")
    assert code == 0, error
    assert {"#SBATCH --nodes=2-4", "#SBATCH --qos=high", "#SBATCH --time=5", "#SBATCH --job-name=big"} <= set(
        out.splitlines()
    )
    assert f"--config={project}/runs/big/code/a.yaml" in out  # as submitted, too


@pytest.mark.parametrize(
    ("text", "words"),
    [("submit:\n  nodez: 2\n", "did you mean nodes"), ("nnodes: 2\n", "not for a job"), ("submit: 3\n", "one a line")],
)
def test_a_mistake_in_the_file_is_named(
    text: str, words: str, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "a.yaml").write_text(text)
    code, _, error = said(capfd, "--config=a.yaml", "--dry-run", "train.py")
    assert code == 2
    assert words in error


def test_a_run_reads_the_same_file_without_the_jobs_part(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "a.yaml").write_text("submit:\n  nodes: 2\n")
    assert main(["run", "--config=a.yaml", "--nproc=1", "train.py"]) == 0
    assert "1" in capfd.readouterr().out


def test_submitting_loads_no_torch(project: Path) -> None:
    look = "import sys; from allstep.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", look, "submit", "--dry-run", "train.py"], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
