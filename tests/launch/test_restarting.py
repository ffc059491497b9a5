"""Attempts that follow each other, with real processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.launch.command import LIMIT, lines, run, script, started

FAIL_UNTIL = (
    "attempt = int(os.environ['ALLSTEP_ATTEMPT'])\nif rank == 1 and attempt < {}:\n    raise ValueError('bad')\n"
)


def test_a_run_that_fails_three_times_recovers_at_the_third_restart(tmp_path: Path) -> None:
    places = "print(attempt, os.environ['MASTER_PORT'], os.environ['ALLSTEP_NONCE'], os.environ['ALLSTEP_CHANNEL'])\n"
    script(tmp_path, FAIL_UNTIL.format(3).replace("\nif", f"\n{places}if"))
    result = run(tmp_path, "--nproc", "2", "--name", "exp", "--max-restarts", "3", "script.py")
    assert result.returncode == 0, result.stderr
    told = {tuple(line.split()[1:]) for line in result.stdout.splitlines()}
    assert len(told) == 4  # the ranks of an attempt agree
    assert [len(set(column)) for column in zip(*told, strict=True)] == [4, 4, 4, 4]  # and no attempt shares a thing
    for number in range(3):
        short = f"allstep: attempt {number} failed: rank 1: exit code 1 (ValueError: bad); restart {number + 1} of"
        assert short in result.stderr
        assert json.loads((tmp_path / f"runs/exp/attempt_{number}/failure.json").read_text())["cause"]["rank"] == 1
    assert "failed first" not in result.stderr  # the whole report is for a run that failed
    assert result.stderr.endswith("allstep: run exp succeeded after 3 restarts\n")
    assert not (tmp_path / "runs/exp/attempt_3/failure.json").exists()
    assert (tmp_path / "runs/exp/attempt_3/rank_1.log").read_text().startswith("3 ")


def test_the_last_failure_is_reported_in_full_and_gives_the_exit_code(tmp_path: Path) -> None:
    script(tmp_path, "if rank == 0:\n    sys.exit(40 + int(os.environ['ALLSTEP_ATTEMPT']))\n")
    result = run(tmp_path, "--nproc", "2", "--max-restarts", "2", "script.py")
    assert result.returncode == 42
    assert result.stderr.count("failed first") == 1
    assert "allstep: attempt 0 had failed before: rank 0: exit code 40\n" in result.stderr
    assert "allstep: attempt 1 had failed before: rank 0: exit code 41\n" in result.stderr
    assert result.stderr.endswith("allstep: not begun again: 2 restarts taken\n")


def test_a_signal_to_stop_ends_restarts(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import signal\nif os.environ['ALLSTEP_ATTEMPT'] == '0':\n    sys.exit(1)\n"
        "print('second', flush=True)\nwhile True:\n    signal.pause()\n",
    )
    with started(tmp_path, "--max-restarts", "9", "script.py") as process:
        assert lines(process.stdout, 1) == ["second"]
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 143
    assert said.endswith("allstep: stopped by SIGTERM\n")
    assert len(list(tmp_path.glob("runs/*/attempt_*"))) == 2


def test_workers_that_make_room_in_order_are_not_started_again(tmp_path: Path) -> None:
    script(tmp_path, "sys.exit(85)")
    result = run(tmp_path, "--nproc", "2", "--max-restarts", "3", "--name", "exp", "script.py")
    assert result.returncode == 85
    assert result.stderr.endswith("allstep: run exp made room (exit code 85); start it again to go on\n")
    assert len(list(tmp_path.glob("runs/exp/attempt_*"))) == 1


def test_workers_that_make_room_when_told_to_stop_give_that_code(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import signal\nsignal.signal(15, lambda *_: sys.exit(85))\nprint('ready', flush=True)\n"
        "while True:\n    signal.pause()\n",
    )
    with started(tmp_path, "--nproc", "2", "script.py") as process:
        lines(process.stdout, 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT)
    assert process.returncode == 85


def test_a_worker_that_makes_room_alone_is_named_while_the_others_go_on(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import signal\nif rank == 1:\n    sys.exit(85)\n"
        "signal.signal(15, lambda *_: sys.exit(85))\nwhile True:\n    signal.pause()\n",
    )
    with started(tmp_path, "--nproc", "3", "script.py") as process:
        assert lines(process.stderr, 2)[1] == "allstep: rank 1 made room (exit code 85), and ranks 0, 2 go on"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT)
    assert process.returncode == 85


@pytest.mark.slow
def test_a_worker_that_makes_room_in_the_middle_of_a_run_is_the_one_that_left_early(tmp_path: Path) -> None:
    leaves = 'raise ValueError("bad batch")'
    script(tmp_path, TRAIN.replace("STOPS", "[7]").replace(leaves, "os._exit(85)"))
    result = run(tmp_path, "--nproc", "2", "--name", "exp", "script.py")
    assert result.returncode == 85
    cause = json.loads((tmp_path / "runs/exp/attempt_0/failure.json").read_text())["cause"]
    assert (cause["rank"], cause["kind"]) == (1, "left early"), result.stderr
    assert "made room (exit code 85)" in cause["what"]


def test_attempts_go_on_without_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file is in the way")
    script(tmp_path, FAIL_UNTIL.format(2) + "print(attempt)")
    result = run(tmp_path, "--nproc", "2", "--max-restarts", "2", "script.py")
    assert result.returncode == 0, result.stderr
    assert "[1] 2" in result.stdout.splitlines()


def test_a_report_that_cannot_be_written_is_still_shown(tmp_path: Path) -> None:
    script(tmp_path, "import shutil\nshutil.rmtree('runs')\nraise ValueError('the original')")
    result = run(tmp_path, "--name", "exp", "script.py")
    assert result.returncode == 1
    assert "rank 0 of 1 failed first" in result.stderr
    assert "    ValueError: the original\n" in result.stderr
    assert "warning: runs/exp/attempt_0/failure.json cannot be written: No such file or directory" in result.stderr


TRAIN = """
import torch
import allstep
from allstep import Engine, Events

def main(world):
    attempt = int(os.environ["ALLSTEP_ATTEMPT"])
    trainer = Engine(lambda engine, batch: batch)

    @trainer.on(Events.ITERATION_COMPLETED)
    def fail(engine):
        if world.rank == 1 and engine.state.iteration == STOPS[min(attempt, len(STOPS) - 1)]:
            raise ValueError("bad batch")

    trainer.run(list(range(40)), max_epochs=1)

with allstep.init() as world:
    main(world)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stops", "attempts"), [("[7]", 3), ("[3, 7, 7]", 4)], ids=["never further", "further once"])
def test_a_crash_loop_ends_after_restarts_without_progress(stops: str, attempts: int, tmp_path: Path) -> None:
    script(tmp_path, TRAIN.replace("STOPS", stops))
    arguments = ["--nproc", "2", "--name", "exp", "--max-restarts", "20", "--stop-after", "2", "script.py"]
    result = run(tmp_path, *arguments)
    assert result.returncode == 1
    assert len(list(tmp_path.glob("runs/exp/attempt_*"))) == attempts, result.stderr
    assert "not begun again: 2 restarts in a row got no further than epoch 1, iteration 7" in result.stderr
    assert "ValueError: bad batch" in result.stderr


def test_a_script_that_never_comes_as_far_as_init_is_a_crash_loop(tmp_path: Path) -> None:
    script(tmp_path, "import a_package_that_is_not_there\n")
    arguments = ["--nproc", "2", "--name", "exp", "--max-restarts", "20", "--stop-after", "2", "script.py"]
    result = run(tmp_path, *arguments)
    assert result.returncode == 1
    assert len(list(tmp_path.glob("runs/exp/attempt_*"))) == 3, result.stderr
    assert "not begun again: 2 restarts in a row ended before all ranks had come through allstep.init" in result.stderr
    assert "No module named 'a_package_that_is_not_there'" in result.stderr
