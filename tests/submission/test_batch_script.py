"""The batch script as text, and as bash reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allstep.submission.batch_script import BatchJob, batch_script
from allstep.submission.request import JobRequest

AWKWARD = [
    "a b",
    "it's",
    'say "hi"',
    "$HOME `id` \\",
    "ünï ✓",
    "two\nlines",
    "",
    "*",
    "~",
    "-m",
    "#x",
    "100%",
    "\udcff",
]

ECHO = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))"


def job(folder: Path, **fields: object) -> BatchJob:
    return BatchJob(
        **{"request": JobRequest(), "folder": folder, "python": "/env/bin/python", "target": "/code/t.py", **fields}
    )


@pytest.fixture
def echoing(tmp_path: Path) -> Path:
    """A python and an srun that print what they are given, as a python of a script's."""
    program = tmp_path / "the python"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{ECHO}' \"$@\"\n")
    program.chmod(0o755)
    return program


def run(text: str, **environ: str) -> tuple[list[str], dict[str, str], str]:
    done = subprocess.run(
        ["bash"],
        input=text.encode("utf-8", "surrogateescape"),
        env={"PATH": os.defpath, "SLURM_JOB_NUM_NODES": "3", **environ},
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    argv, environment, folder = json.loads(done.stdout)
    return argv, environment, folder


def test_a_person_reads_what_is_asked_for_what_is_set_and_what_runs() -> None:
    request = JobRequest(nodes="2", gpus_per_node="4", cpus_per_task=32, time="12:00:00", sbatch=("--qos=high",))
    text = batch_script(
        BatchJob(
            request=request,
            folder=Path("/runs/big"),
            python="/env/bin/python",
            target="/runs/big/code/train.py",
            arguments=["--lr", "0.1"],
            workdir=Path("/home/me/project"),
            exports={"PATH": "/env/bin:/usr/bin"},
            python_path=["/runs/big/code/src"],
            submitted=["allstep", "submit", "--nodes=2", "train.py", "--token", "hf_secret", "a\nb"],
        )
    )
    assert text == EXPECTED


EXPECTED = """\
#!/bin/bash
# allstep submit --nodes=2 train.py --token '***' 'a\\nb'
#SBATCH --job-name=big
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --output=/runs/big/slurm-%j.log
#SBATCH --qos=high
# The job goes on in the same log after it was requeued.
#SBATCH --open-mode=append
#SBATCH --requeue
# Before the end of the job's time the command below says so itself, in time for a save. This is for a
# preemption that SLURM announces; at the end of the time it comes in the last minute.
#SBATCH --signal=B:USR1@1
# The job gets nothing of the shell that submitted it but what stands below.
#SBATCH --export=NIL

trap '' USR1  # a notice that comes before the command below listens would end this script
export PATH=/env/bin:/usr/bin
# The code as it was submitted, before what is installed.
export PYTHONPATH=/runs/big/code/src${PYTHONPATH:+:$PYTHONPATH}
export SLURM_EXPORT_ENV=ALL  # srun hands all of this to its tasks
folder=/runs/big
export ALLSTEP_SAVES="$folder/saves.jsonl"
mkdir -p -m 700 "$folder" || exit 1
cd /home/me/project || exit 1

# Says when the job has to stop, and requeues it where it was stopped.
exec /env/bin/python -P -m allstep.submission.batch_process --folder="$folder" \\
    --script=/runs/big/job.sh --margin=30 -- \\
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=32 \\
        --kill-on-bad-exit=0 \\
        /env/bin/python -P -m allstep run --name=big --runs=/runs \\
            /runs/big/code/train.py --lr 0.1
"""


def test_bash_hands_on_every_argument_as_it_was_given(echoing: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's a földer"
    text = batch_script(
        job(folder, python=str(echoing), arguments=AWKWARD, workdir=tmp_path, run_options=["--env=A=b 'c'"])
    )
    argv, _, at = run(text)
    assert argv[-len(AWKWARD) :] == AWKWARD
    assert argv[argv.index("--") + 1 :][:4] == ["srun", "--nodes=3", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    assert f"--folder={folder}" in argv
    assert f"--script={folder}/job.sh" in argv
    assert "--env=A=b 'c'" in argv
    assert at == str(tmp_path)


def test_bash_sets_every_variable_as_it_was_here(echoing: Path, tmp_path: Path) -> None:
    exports = {f"V{number}": value for number, value in enumerate(AWKWARD)}
    text = batch_script(job(tmp_path, python=str(echoing), exports=exports, workdir=tmp_path, python_path=["/a b"]))
    _, environment, _ = run(text, PYTHONPATH="/mine")
    assert {name: environment[name] for name in exports} == exports
    assert environment["PYTHONPATH"] == "/a b:/mine"
    assert environment["ALLSTEP_SAVES"] == f"{tmp_path}/saves.jsonl"


def test_members_of_an_array_have_names_folders_and_seeds_of_their_own(echoing: Path, tmp_path: Path) -> None:
    text = batch_script(job(tmp_path / "sweep", python=str(echoing), request=JobRequest(array="0-7")))
    seen = [run(text, SLURM_ARRAY_TASK_ID=str(member)) for member in (0, 7)]
    for member, (argv, environment, at) in zip((0, 7), seen, strict=True):
        own = f"{tmp_path}/sweep-{member}"
        assert f"--name=sweep-{member}" in argv
        assert f"--folder={own}" in argv
        assert (environment["ALLSTEP_ARRAY_MEMBER"], environment["ALLSTEP_SAVES"]) == (
            str(member),
            f"{own}/saves.jsonl",
        )
        assert at == own


def test_members_share_a_seed_where_a_person_says_so(echoing: Path, tmp_path: Path) -> None:
    request, exports = JobRequest(array="0-7"), {"ALLSTEP_ARRAY_MEMBER": ""}
    text = batch_script(job(tmp_path / "sweep", python=str(echoing), request=request, exports=exports))
    assert run(text, SLURM_ARRAY_TASK_ID="3")[1]["ALLSTEP_ARRAY_MEMBER"] == ""


def test_a_task_for_each_rank_is_the_script_itself(echoing: Path, tmp_path: Path) -> None:
    request = JobRequest(tasks_per_node=4, chain=True)
    text = batch_script(
        job(tmp_path, python=str(echoing), request=request, workdir=tmp_path, module=True, target="a.b")
    )
    argv, _, _ = run(text)
    assert argv[argv.index("srun") :] == [
        *("srun", "--nodes=3", "--ntasks-per-node=4", "--kill-on-bad-exit=1", str(echoing), "-u", "-m", "a.b"),
    ]
    assert "--chain" in argv
    assert "#SBATCH --no-requeue" in text


@pytest.mark.parametrize(
    ("request_fields", "asked", "given"),
    [
        ({"gpus": "6"}, ["--ntasks-per-node=1", "--gpus=6"], ["--ntasks-per-node=1"]),
        (
            {"tasks_per_node": 4, "gpus_per_task": "1"},
            ["--ntasks-per-node=4", "--gpus-per-task=1"],
            ["--ntasks-per-node=4", "--gpus-per-task=1"],
        ),
        (
            {"gpus_per_node": "4", "tasks_per_gpu": 1},
            ["--gpus-per-node=4", "--ntasks-per-gpu=1"],
            ["--ntasks-per-gpu=1"],
        ),
    ],
)
def test_gpus_are_asked_for_as_slurm_counts_them(
    request_fields: dict[str, Any], asked: list[str], given: list[str], tmp_path: Path
) -> None:
    lines = batch_script(job(tmp_path, request=JobRequest(**request_fields))).splitlines()
    counted = ("--ntasks", "--gpus")
    directives = [line.removeprefix("#SBATCH ") for line in lines]
    assert [each for each in directives if each.startswith(counted)] == asked
    srun = next(line for line in lines if line.strip().startswith("srun "))
    assert [word for word in srun.split() if word.startswith(counted)] == given


def test_a_task_a_rank_has_as_many_threads_as_cores(echoing: Path, tmp_path: Path) -> None:
    request = JobRequest(tasks_per_node=4, cpus_per_task=8)
    one = job(tmp_path, python=str(echoing), request=request, workdir=tmp_path)
    assert run(batch_script(one))[1]["OMP_NUM_THREADS"] == "8"
    assert run(batch_script(replace(one, exports={"OMP_NUM_THREADS": "2"})))[1]["OMP_NUM_THREADS"] == "2"
    under_run = replace(one, request=JobRequest(cpus_per_task=8))
    assert "OMP_NUM_THREADS" not in run(batch_script(under_run))[1]


def test_a_range_of_nodes_asks_for_cores_and_leaves_the_tasks_to_srun(tmp_path: Path) -> None:
    text = batch_script(job(tmp_path, request=JobRequest(nodes="2-4", tasks_per_node=4, cpus_per_task=2)))
    assert {"#SBATCH --nodes=2-4", "#SBATCH --mincpus=8", "#SBATCH --cpus-per-task=2"} <= set(text.splitlines())
    assert "#SBATCH --ntasks-per-node" not in text
    assert "--ntasks-per-node=4" in text


def test_a_secret_goes_through_slurm_and_not_into_the_text(tmp_path: Path) -> None:
    text = batch_script(job(tmp_path, through_slurm=["WANDB_API_KEY"]))
    assert "#SBATCH --export=WANDB_API_KEY\n" in text


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("/a b/c", '#SBATCH --output="/a b/c/slurm-%j.log"'),
        ("/100%", "#SBATCH --output=/100%%/slurm-%j.log"),
        ('/it\'s "x"', '#SBATCH --output="/it\'s \\"x\\"/slurm-%j.log"'),
    ],
)
def test_what_sbatch_would_read_otherwise_is_quoted(folder: str, line: str) -> None:
    assert line in batch_script(job(Path(folder))).splitlines()


def test_the_text_depends_on_the_arguments_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = job(tmp_path, arguments=["x"])
    text = batch_script(one)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.chdir(tmp_path)
    assert batch_script(replace(one)) == text
