"""`allstep run`: the command line, the configuration file and the run folder together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from allstep.cli.run_command import split_command
from tests.jobs.launchers import script
from tests.jobs.running import run

VALUES = frozenset({"--nproc", "--name"})


@pytest.mark.parametrize(
    ("argv", "own"),
    [
        (["x.py"], 0),
        (["x.py", "--nproc", "2"], 0),
        (["--nproc", "2", "x.py", "-m", "--", "-h"], 2),
        (["--nproc=2", "-m", "x", "--help"], 2),
        (["-m", "--name", "n", "x"], 3),
        (["--nproc", "2"], 2),
        ([], 0),
    ],
)
def test_everything_from_the_script_on_belongs_to_the_script(argv: list[str], own: int) -> None:
    assert split_command(argv, VALUES) == (argv[:own], argv[own:])


def test_two_dashes_end_our_options() -> None:
    assert split_command(["--nproc", "2", "--", "-odd.py", "--"], VALUES) == (["--nproc", "2"], ["-odd.py", "--"])


def test_arguments_that_look_like_ours_reach_the_script(tmp_path: Path) -> None:
    script(tmp_path, "print(sys.argv[1:])")
    arguments = ["--nproc", "7", "--help", "-m", "--", "", "a b"]
    assert run(tmp_path, "script.py", *arguments).out == f"{arguments}\n"


def test_a_module_is_run_with_dash_m(tmp_path: Path) -> None:
    script(tmp_path, "print(__spec__.name, sys.argv[1:])", "package/train.py")
    result = run(tmp_path, "--nproc", "2", "-m", "package.train", "-x")
    assert sorted(result.out.splitlines()) == ["[0] package.train ['-x']", "[1] package.train ['-x']"]
    assert next((tmp_path / "runs").iterdir()).name.startswith("package-train-")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_environment(tmp_path: Path) -> None:
    script(tmp_path, "print(os.environ['WORLD_SIZE'], [os.environ.get(name) for name in 'ABCD'])")
    (tmp_path / "c.yaml").write_text("nproc: 3\nname: from-file\nshow: [0, 1]\nenv: {A: file, B: file}\n")
    result = run(
        tmp_path,
        *("--config", "c.yaml", "--nproc", "2", "--env", "A=line", "--env", "D=x=y", "script.py"),
        env={"A": "shell", "B": "shell", "C": "shell"},
    )
    assert sorted(result.out.splitlines()) == [f"[{rank}] 2 ['line', 'file', 'shell', 'x=y']" for rank in range(2)]
    assert (tmp_path / "runs/from-file/attempt_0/rank_1.log").exists()


def test_auto_means_the_files_number_of_cpu_processes_without_devices(tmp_path: Path) -> None:
    script(tmp_path, "print(os.environ['WORLD_SIZE'])")
    (tmp_path / "c.yaml").write_text("nproc: auto\ncpu_processes: 2\n")
    result = run(tmp_path, "--config", "c.yaml", "script.py")
    assert sorted(result.out.splitlines()) == ["[0] 2", "[1] 2"]
    assert run(tmp_path, "script.py").out == "1\n"


def fake_gpus(folder: Path, count: int) -> dict[str, str]:
    tool = folder / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n" + "".join(f"echo 'GPU {n}: Fake (UUID: GPU-{n}a)'\n" for n in range(count)))
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}


def test_auto_means_one_worker_per_visible_device(tmp_path: Path) -> None:
    script(tmp_path, "print(os.environ['WORLD_SIZE'])")
    path = fake_gpus(tmp_path, 4)
    result = run(tmp_path, "script.py", env=path | {"CUDA_VISIBLE_DEVICES": "3,1,2"})
    assert sorted(result.out.splitlines()) == ["[0] 3", "[1] 3", "[2] 3"]


def test_devices_that_the_file_hides_do_not_count(tmp_path: Path) -> None:
    script(tmp_path, "print(os.environ['WORLD_SIZE'])")
    (tmp_path / "c.yaml").write_text('env: {CUDA_VISIBLE_DEVICES: ""}\n')
    env = fake_gpus(tmp_path, 4) | {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert run(tmp_path, "--config", "c.yaml", "script.py", env=env).out == "1\n"


def test_a_mistake_in_the_file_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    script(tmp_path, "open('started', 'w')")
    (tmp_path / "c.yaml").write_text("nproc: 2\nnmae: exp\n")
    result = run(tmp_path, "--config", "c.yaml", "script.py")
    assert (result.code, result.err) == (
        2,
        "allstep: error: c.yaml:2: nmae is not a field; did you mean name?\n",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "script.py"]


def test_a_name_used_again_begins_the_next_attempt(tmp_path: Path) -> None:
    script(tmp_path, "print(os.environ['ALLSTEP_ATTEMPT'])")
    for attempt in ("0", "1"):
        assert run(tmp_path, "--name", "exp", "script.py").out == f"{attempt}\n"
        assert (tmp_path / f"runs/exp/attempt_{attempt}/rank_0.log").read_text() == f"{attempt}\n"


def test_without_a_place_for_logs_a_run_goes_on_unless_the_place_was_asked_for(tmp_path: Path) -> None:
    script(tmp_path, "print('ran')")
    (tmp_path / "runs").write_text("a file is in the way")
    result = run(tmp_path, "script.py")
    assert (result.code, result.out) == (0, "ran\n")
    assert "warning: no log can be written to runs/script-" in result.err
    assert "File exists; going on without logs" in result.err
    for asked in (["--name", "exp"], ["--runs", "runs"]):
        result = run(tmp_path, *asked, "script.py")
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("allstep: error: no log can be written to runs/")


def test_a_rank_to_show_that_will_not_exist_is_an_error(tmp_path: Path) -> None:
    script(tmp_path, "print('ran')")
    result = run(tmp_path, "--nproc", "2", "--show", "0,2", "script.py")
    assert (result.code, result.out) == (2, "")
    assert "show names rank 2, but this run has 2 workers" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limits", "speed=3"], "limits: "),
        (["--fault", "rank=1,explode"], "'explode' is wrong"),
        (["--nnodes", "2"], "--node-rank, --rdzv are missing"),
        (["--max-restarts", "-1"], "max_restarts is -1"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_started(arguments: list[str], message: str, tmp_path: Path) -> None:
    script(tmp_path, "print('ran')")
    result = run(tmp_path, *arguments, "script.py")
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert not (tmp_path / "runs").exists()


def test_limits_and_faults_reach_the_workers(tmp_path: Path) -> None:
    script(tmp_path, "print(os.environ['ALLSTEP_LIMITS'], os.environ['ALLSTEP_FAULT'])")
    result = run(tmp_path, "--limits", "step=60", "--fault", "rank=1,kill=9", "script.py")
    assert result.out == "step=60 rank=1,kill=9\n", result.err
