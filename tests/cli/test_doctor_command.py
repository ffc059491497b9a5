"""`allstep doctor`: what it prints and its exit codes; what it finds is in tests/host_checks."""

from __future__ import annotations

import json

import pytest

from allstep.cli.doctor_command import meant_nodes
from allstep.cli.main import main
from allstep.host_checks import Host, HostFinding

GOOD = HostFinding("python", "good", "Python 3.11 of /env")
WARNING = HostFinding("clock", "warning", "nobody keeps\x1b[2J it", "Start chrony")
BAD = HostFinding("shared memory", "bad", "64 MiB", "--shm-size=16g")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Host]:
    """What the checks were told; they find what is in `found`."""
    hosts: list[Host] = []
    monkeypatch.setattr("allstep.cli.doctor_command.run_checks", lambda host: hosts.append(host) or found)
    return hosts


found: list[HostFinding] = []


@pytest.mark.parametrize(
    ("findings", "options", "code"),
    [([GOOD], [], 0), ([GOOD, WARNING], [], 0), ([WARNING], ["--strict"], 1), ([GOOD, BAD], [], 1)],
)
def test_the_exit_code_says_whether_anything_is_bad(
    findings: list[HostFinding], options: list[str], code: int, asked: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "found", findings)
    assert main(["doctor", *options]) == code


def test_the_table_has_the_remedy_below_and_acts_on_no_terminal(
    asked: list[Host], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(globals(), "found", [GOOD, WARNING, BAD])
    main(["doctor"])
    assert capsys.readouterr().out.splitlines() == [
        "good     python         Python 3.11 of /env",
        "warning  clock          nobody keeps\\x1b[2J it",
        "                        -> Start chrony",
        "bad      shared memory  64 MiB",
        "                        -> --shm-size=16g",
        "1 good, 1 warning, 1 bad",
    ]


def test_json_has_every_field(
    asked: list[Host], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(globals(), "found", [BAD])
    main(["doctor", "--json", "--nproc", "4", "--nnodes", "2", "--folder", "/scratch", "--timeout", "3"])
    (shown,) = json.loads(capsys.readouterr().out)
    assert HostFinding(**shown) == BAD
    (host,) = asked
    assert (host.workers, host.nodes, str(host.folder), host.within) == (4, 2, "/scratch", 3.0)


@pytest.mark.parametrize("options", [["--nproc", "0"], ["--timeout", "soon"], ["--nnodes", "two"]])
def test_a_wrong_option_is_refused_with_its_value(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *options]) == 2
    said = capsys.readouterr().err
    assert options[0].removeprefix("--") in said
    assert options[1] in said


def test_a_job_of_slurm_says_how_many_machines_are_meant() -> None:
    assert meant_nodes({}) == 1
    assert meant_nodes({"SLURM_JOB_NUM_NODES": "4"}) == 4
