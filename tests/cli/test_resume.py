"""`allstep run --resume auto|PATH|none`, on a real job that two ranks have saved before."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from allstep.testing import run_ranks
from allstep.world import World
from tests.checkpoint import training
from tests.checkpoint.storages import listed
from tests.jobs.job import Job
from tests.jobs.launchers import script
from tests.jobs.running import run

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(240)


def train(folder: Path, *options: str, ranks: int = 1, job: tuple[str, ...] = ()) -> Job:
    """An epoch of five iterations, with checkpoints of iterations 2, 4 and 5."""
    command = ["-m", "tests.faults.ending_job", "saved", "epochs=1", *job]
    return run(folder, "--nproc", str(ranks), *options, *command, env=ENV)


def first_iteration(done: Job) -> int | None:
    return min((int(each) for each in re.findall(r"iteration (\d+)$", done.out, re.M)), default=None)


def first_epoch(world: World, folder: str) -> None:
    """What `train` does over two ranks, but for its script."""
    training.Run(world, training.Job(folder, every="2 iterations", window=1)).go(epochs=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(first_epoch, 2, str(folder / "saved"))
    names = listed(folder / "saved")
    assert names == ["save-000001-step-2", "save-000002-step-4", "save-000003-step-5"]
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "saved", tmp_path / "saved")
    return tmp_path


@slow
@pytest.mark.parametrize(
    ("asked", "first"),
    [
        pytest.param(["--resume", "auto"], 6, marks=pytest.mark.nightly),
        (["--resume", "saved/save-000001-step-2"], 3),
        pytest.param(["--resume", "none"], 1, marks=pytest.mark.nightly),
    ],
)
def test_training_begins_where_the_command_line_says(asked: list[str], first: int, folder: Path) -> None:
    done = train(folder, *asked, ranks=2, job=("epochs=2",))
    assert done.code == 0, done.err
    assert first_iteration(done) == first


@slow
@pytest.mark.nightly
def test_paths_of_the_command_line_are_what_the_kernel_says(folder: Path) -> None:
    """Issue 13 E4: `link/..` is where the link leads, and not the current folder, as its text would have it."""
    (folder / "elsewhere").mkdir()
    shutil.move(folder / "saved", folder / "elsewhere")
    (folder / "link").symlink_to("elsewhere/saved")
    (folder / "run.yaml").write_text("nproc: none of this\n")
    (folder / "elsewhere/run.yaml").write_text("name: linked\n")
    options = ("--config", "link/../run.yaml", "--runs", "link/../runs", "--resume", "link/../saved")
    done = train(folder, *options, job=("epochs=2",))
    assert done.code == 0, done.err
    assert first_iteration(done) == 6
    assert (folder / "elsewhere/runs/linked/attempt_0/rank_0.log").is_file()
    assert not (folder / "runs").exists()


@slow
@pytest.mark.nightly
def test_a_folder_without_a_checkpoint_is_an_error_before_training(folder: Path) -> None:
    (folder / "empty").mkdir()
    done = train(folder, "--resume", "empty")
    assert done.code == 1
    assert f"there is no checkpoint to resume from at {folder / 'empty'}" in done.err
    assert first_iteration(done) is None


@slow
@pytest.mark.nightly
def test_a_place_that_the_script_names_wins_over_the_command_line(folder: Path) -> None:
    done = train(folder, "--resume", "none", job=("at=saved/save-000002-step-4",))
    assert done.code == 0, done.err
    assert first_iteration(done) == 5
    said = "the script resumes from 'saved/save-000002-step-4', so --resume none has no effect"
    assert done.err.count(said) == 1


@slow
@pytest.mark.parametrize(
    ("asked", "begins", "ranks"),
    [("none", 1, 1), ("saved/save-000002-step-4", 5, 2)],
)
@pytest.mark.nightly
def test_a_restart_goes_on_from_what_the_launch_has_saved_if_anything(
    asked: str, begins: int, ranks: int, folder: Path
) -> None:
    options = ["--resume", asked, "--max-restarts", "2", "--name", "exp"]
    rank = ranks - 1
    faults = [f"rank={rank},iteration={begins},attempt=0,kill=9", f"rank={rank},iteration=9,attempt=1,kill=9"]
    done = train(folder, *options, "--fault", ";".join(faults), ranks=ranks, job=("epochs=2",))
    assert done.code == 0, done.err
    logs = [(folder / f"runs/exp/attempt_{attempt}/rank_0.log").read_text() for attempt in range(3)]
    began = [min(int(each) for each in re.findall(r"iteration (\d+)$", log, re.M)) for log in logs[1:]]
    assert began[0] == begins  # nothing was saved in the first attempt
    assert began[1] >= 7  # the save of iteration 8 waits for that of 6


def test_a_path_that_is_not_there_is_one_line_and_nothing_is_started(tmp_path: Path) -> None:
    script(tmp_path, "open('started', 'w')")
    done = run(tmp_path, "--resume", "saved/save-000009-step-9", "script.py")
    assert done.code == 2
    assert done.err == (
        "allstep: error: resume is saved/save-000009-step-9, and there is no folder of that name "
        f"(in {tmp_path}); give the path of a checkpoint or of a folder of checkpoints, auto, or none\n"
    )
    assert not (tmp_path / "started").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("asked", "told"),
    [("auto", "auto"), ("none", "none"), ("saved/", "{folder}/saved"), ("s3://bucket/run", "s3://bucket/run")],
)
def test_the_script_is_told_of_a_local_path_wherever_it_goes(asked: str, told: str, tmp_path: Path) -> None:
    script(tmp_path, "print(os.environ['ALLSTEP_RESUME'])")
    (tmp_path / "saved").mkdir()
    assert run(tmp_path, "--resume", asked, "script.py").out == told.format(folder=tmp_path) + "\n"


def test_a_place_in_the_file_counts_and_the_command_line_wins_over_it(tmp_path: Path) -> None:
    script(tmp_path, "print(os.environ['ALLSTEP_RESUME'])")
    (tmp_path / "c.yaml").write_text("resume: absent\n")
    assert run(tmp_path, "--config", "c.yaml", "script.py").code == 2
    assert run(tmp_path, "--config", "c.yaml", "--resume", "none", "script.py").out == "none\n"


def test_restarts_of_a_launch_have_its_name_and_no_other_launch_has(tmp_path: Path) -> None:
    script(tmp_path, "print(os.environ['ALLSTEP_LAUNCH'], flush=True); sys.exit(os.environ['ALLSTEP_ATTEMPT'] == '0')")
    done = run(tmp_path, "--max-restarts", "1", "script.py", env={"ALLSTEP_LAUNCH": "of an outer one"})
    first, second = done.out.split("\n")[:2]
    assert first == second != "of an outer one"
    assert run(tmp_path, "--max-restarts", "1", "script.py").out.split("\n")[0] != first
