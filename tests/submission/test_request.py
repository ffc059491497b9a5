"""What `allstep submit` may be asked for, and what of a shell it takes along."""

from __future__ import annotations

from typing import Any

import pytest

from allstep.errors import ConfigurationError
from allstep.submission.carried_environment import carried
from allstep.submission.request import JobRequest, request_from_mapping, with_shell_defaults


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nodes": "0"}, "nodes is '0'"),
        ({"nodes": "4-2"}, "least and most"),
        ({"nodes": "2\n--uid=0"}, "nodes is"),
        ({"time": "soon"}, "such as 12:00:00"),
        ({"array": "0..7"}, "such as 0-7"),
        ({"gpus_per_node": "many"}, "a100:4"),
        ({"after": ("yesterday",)}, "a job's number"),
        ({"partition": "a\n#SBATCH --x"}, "cannot hold that"),
        ({"sbatch": ("--nodes=3",)}, "--nodes instead"),
        ({"sbatch": ("-p", "gpu")}, "--partition instead"),
        ({"sbatch": ("--signal=USR1@9",)}, "allstep submit sets it"),
        ({"sbatch": ("--wrap=rm",)}, "leave it out"),
        ({"sbatch": ("train.py",)}, "one option of sbatch"),
        ({"sbatch": ("--a=b\nc",)}, "one option of sbatch"),
        ({"after": ("1",), "sbatch": ("--dependency=singleton",)}, "both give a dependency"),
        ({"env": ("1X=2",)}, "NAME=VALUE"),
        ({"gpus": "8", "gpus_per_node": "4"}, "both say how many GPUs"),
        ({"tasks_per_gpu": 1, "tasks_per_node": 4, "gpus_per_node": "8"}, "both say how many tasks"),
        ({"tasks_per_gpu": 1, "gpus": "8"}, "give --gpus-per-node"),
        ({"tasks_per_gpu": 1, "gpus_per_task": "1"}, "give --gpus-per-node"),
        ({"nodes": "2-4", "gpus_per_task": "1"}, "SLURM knows no gpus_per_task for a range"),
        ({"nodes": "2-4", "gpus_per_node": "8", "tasks_per_gpu": 1}, "SLURM knows no tasks_per_gpu for a range"),
        ({"sbatch": ("--ntasks-per-gpu=1",)}, "--tasks-per-gpu instead"),
        ({"sbatch": ("-G", "8")}, "--gpus instead"),
        ({"tasks_per_node": 0}, "1 or more"),
    ],
)
def test_what_cannot_be_meant_is_named_with_the_remedy(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        JobRequest(**fields)


@pytest.mark.parametrize("time", ["90", "90:30", "12:00:00", "2-12", "2-12:30", "2-12:30:15", "UNLIMITED"])
def test_every_form_of_a_time_that_sbatch_reads_is_allowed(time: str) -> None:
    assert JobRequest(time=time).time == time


def test_a_file_says_the_same_as_the_command_line() -> None:
    section = {"nodes": "2-4", "tasks_per_node": "8", "live": "true", "sbatch": ["--qos=high", "--account=lab"]}
    found = JobRequest(**request_from_mapping(section, "a.yaml"))
    assert found == JobRequest(nodes="2-4", tasks_per_node=8, live=True, sbatch=("--qos=high", "--account=lab"))
    assert found.most_nodes == 4


@pytest.mark.parametrize(
    ("section", "words"), [({"node": "2"}, "did you mean nodes"), ({"nodes": ["1", "2"]}, "one value")]
)
def test_a_file_with_a_mistake_is_named(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"a.yaml: submit.*{words}"):
        request_from_mapping(section, "a.yaml")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (
            JobRequest(sbatch=("--mem-bind=none",)),
            JobRequest(
                partition="gpu",
                time="60",
                sbatch=("--mem-bind=none", "--account=lab", "--exclusive", "--mem-per-cpu=2G"),
            ),
        ),
        (
            JobRequest(partition="cpu", time="5", sbatch=("-Alab2", "--exclusive=user", "--mem=0")),
            JobRequest(partition="cpu", time="5", sbatch=("-Alab2", "--exclusive=user", "--mem=0")),
        ),
    ],
)
def test_what_the_shell_says_for_every_sbatch_stands_in_the_script(asked: JobRequest, found: JobRequest) -> None:
    shell = {"SBATCH_PARTITION": "gpu", "SBATCH_TIMELIMIT": "60", "SBATCH_ACCOUNT": "lab", "SBATCH_EXCLUSIVE": ""}
    assert with_shell_defaults(asked, {**shell, "SBATCH_MEM_PER_CPU": "2G", "SBATCH_SIGNAL": "USR2"}) == found


SHELL = {
    "PATH": "/bin",
    "VIRTUAL_ENV": "/env",
    "CONDA_PREFIX": "/conda",
    "LOADEDMODULES": "cuda/12",
    "NCCL_DEBUG": "INFO",
    "HF_HOME": "/cache",
    "HF_TOKEN": "hf_abcdef",
    "ALLSTEP_SECRET": "abcdefgh",
    "EDITOR": "vi",
    "RANK": "3",
    "MASTER_ADDR": "n1",
    "SLURM_JOB_ID": "7",
    "ALLSTEP_SAVES": "/other",
    "BASH_FUNC_module%%": "() { :; }",
}


def test_a_job_gets_what_makes_up_its_python_and_no_rank_of_another() -> None:
    found = carried(SHELL)
    assert sorted(found.exports) == ["CONDA_PREFIX", "HF_HOME", "LOADEDMODULES", "NCCL_DEBUG", "PATH", "VIRTUAL_ENV"]
    assert found.through_slurm == ()
    assert {"EDITOR", "HF_TOKEN", "RANK", "SLURM_JOB_ID"} <= set(found.left)


def test_what_is_named_comes_along_and_secrets_outside_the_text() -> None:
    found = carried(SHELL, ("HF_TOKEN", "EDITOR", "MASTER_ADDR=127.0.0.1", "NEW=a=b"))
    assert found.through_slurm == ("HF_TOKEN",)
    assert found.exports.items() >= {"EDITOR": "vi", "MASTER_ADDR": "127.0.0.1", "NEW": "a=b"}.items()
    assert "hf_abcdef" not in found.exports.values()


@pytest.mark.parametrize(("asked", "words"), [("ABSENT", "not set here"), ("RANK=0", "set for each worker")])
def test_a_variable_that_cannot_come_along_is_an_error(asked: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        carried(SHELL, (asked,))
