"""`allstep logs` and `allstep cancel`: what they print, and when they end."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import pytest

from allstep.cli import logs_command
from allstep.cli.main import main
from tests.jobs.launchers import ALLSTEP, environment
from tests.run_control.records import ELSEWHERE, Record, programs, submitted


def log(record: Record, attempt: int, rank: int, text: str) -> None:
    path = record.folder / f"attempt_{attempt}" / f"rank_{rank}.log"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def test_all_ranks_are_shown_by_attempt_with_the_rank_before_each_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path, "r").attempt().end()
    log(record, 0, 0, "one\n")
    log(record, 0, 1, "two\nthree")
    log(record, 1, 0, "four\n")
    assert main(["logs", "--runs", str(tmp_path), "r"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *("==> attempt 0 <==", "[0] one", "[1] two"),
        *("==> attempt 1 <==", "[0] four"),
        *("==> attempt 0 <==", "[1] three"),
    ]


def test_following_goes_on_into_the_next_attempt_and_ends_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_command, "_ASK_S", 0.05)
    record = Record(tmp_path, "r", process=ELSEWHERE, ago=1).attempt()
    log(record, 0, 3, "before\n")
    shown: list[str] = []

    def train() -> None:
        # The next step comes when the one before was shown, so nothing depends on how fast that is.
        for attempt, text in ((0, "while\n"), (1, "restarted\n"), (1, "unended")):
            log(record, attempt, 3, text)
            until = time.monotonic() + 20
            while text.endswith("\n") and text.strip() not in "".join(shown) and time.monotonic() < until:
                shown.append(capsys.readouterr().out)
                time.sleep(0.02)
        record.end()

    thread = threading.Thread(target=train)
    thread.start()
    assert main(["logs", "--runs", str(tmp_path), "-f", "--rank", "3", "r"]) == 0
    thread.join()
    shown.append(capsys.readouterr().out)
    assert "".join(shown).splitlines() == [
        *("==> attempt 0 <==", "before", "while"),
        *("==> attempt 1 <==", "restarted", "unended"),
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rank", "7", "r"], "no log of rank 7"),
        (["--rank", "-1", "r"], "rank is -1"),
        (["none"], "there is no run none"),
        (["sweep"], "is an array"),
    ],
)
def test_what_cannot_be_shown_is_named(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(Record(tmp_path, "r").attempt().end(), 0, 0, "one\n")
    submitted(tmp_path, "sweep", "50", array="0-1")
    assert main(["logs", "--runs", str(tmp_path), *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    record = Record(tmp_path, "r").attempt().end()
    log(record, 0, 0, "a line that is long enough\n" * 100_000)
    command = [*ALLSTEP, "logs", "--runs", str(tmp_path), "r"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_members_of_an_array_are_cancelled_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    programs(tmp_path, squeue="printf '50_0|RUNNING|None|N/A|n1\\n50_1|PENDING|Resources|N/A|\\n'", scancel="")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    submitted(runs, "sweep", "50", array="0-1")
    member = Record(runs, "sweep-0", job="50_0", process=ELSEWHERE).attempt()
    (member.folder / "starts.jsonl").touch()
    assert main(["cancel", "--runs", str(runs), "50"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run sweep-0: job 50_0 is told to save and stop",
        "run sweep-1: job 50_1 is cancelled",
    ]


def test_what_cannot_be_cancelled_is_said_with_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Record(tmp_path, "r").attempt().end()
    assert main(["cancel", "--runs", str(tmp_path), "r"]) == 1
    assert "is over: finished" in capsys.readouterr().err
