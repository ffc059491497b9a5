"""`allstep doctor` with faults that are really there: each is named, with a remedy, and a healthy machine is well.

`ill_machine` has most faults; those that exclude each other, or need a program that is not there, are put in here.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from allstep.host_checks import Host, HostFinding, Verdict
from allstep.host_checks.checking import CHECKS, Check, run_checks
from allstep.host_checks.finding import ask
from tests.host_checks.ill_machine import FAULTS, look_at_healthy, look_at_ill, program, torch_that
from tests.jobs.launchers import ALLSTEP
from tests.jobs.running import start

pytestmark = pytest.mark.slow


def named(findings: list[HostFinding], subject: str, verdict: Verdict, words: str) -> None:
    """Assert that one finding has these words and a remedy."""
    fitting = [each for each in findings if each.subject == subject and words in each.text]
    assert [each.verdict for each in fitting] == [verdict], (subject, words, findings)
    assert fitting[0].remedy


def check_an_ill_machine(folder: Path) -> None:
    seen = look_at_ill(folder)
    assert seen.code == 1
    assert [fault.what for fault in FAULTS if not seen.names(fault)] == [], seen.findings
    good = {each.subject for each in seen.findings if each.verdict == "good"}
    assert good >= {"requirements", "GPUs", "memory"}, seen.findings


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_every_fault_of_an_ill_machine_is_named(tmp_path: Path) -> None:
    check_an_ill_machine(tmp_path)


def check_a_healthy_machine(folder: Path) -> None:
    listing = sorted(os.listdir(folder))
    seen = look_at_healthy(folder)
    assert seen.ill == []
    assert seen.code == 0
    assert sorted(os.listdir(folder)) == listing  # nothing is left behind


def test_a_healthy_machine_has_no_warning(tmp_path: Path) -> None:
    check_a_healthy_machine(tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_every_fault_is_named_five_of_five_and_none_in_fifty_runs(tmp_path: Path) -> None:
    for index in range(5):
        folder = tmp_path / f"ill{index}"
        folder.mkdir()
        check_an_ill_machine(folder)
    for index in range(50):
        folder = tmp_path / f"well{index}"
        folder.mkdir()
        check_a_healthy_machine(folder)


def found_by(subject: str, host: Host) -> list[HostFinding]:
    return run_checks(host, [each for each in CHECKS if each.subject == subject])


def host(folder: Path, within: float = 20.0, root: Path = Path("/"), **environ: str) -> Host:
    return Host(environ={**os.environ, **environ}, folder=folder, within=within, root=root)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_taken_master_port_is_named_with_who_has_it(tmp_path: Path, taken_port: int) -> None:
    found = found_by("ports", host(tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken_port)))
    named(found, "ports", "bad", f"MASTER_PORT is {taken_port}, and that port is taken by process {os.getpid()} ")


def test_a_master_port_of_another_machine_is_not_looked_at_here(tmp_path: Path, taken_port: int) -> None:
    found = found_by("ports", host(tmp_path, MASTER_ADDR="192.0.2.77", MASTER_PORT=str(taken_port)))
    assert [each.verdict for each in found] == ["good"], found


@pytest.mark.parametrize(
    ("stub", "words"),
    [
        ("#!/bin/sh\nexec sleep 600\n", "scontrol did not answer within"),
        ("#!/bin/sh\necho Unable to contact slurm controller >&2\nexit 1\n", "Unable to contact slurm controller"),
    ],
)
def test_a_controller_that_is_gone_is_named(stub: str, words: str, tmp_path: Path) -> None:
    program(tmp_path / "programs", "scontrol", stub)
    path = f"{tmp_path / 'programs'}:{os.environ['PATH']}"
    with pytest.MonkeyPatch().context() as patched:
        patched.setenv("PATH", path)
        named(found_by("SLURM", host(tmp_path, within=1.5)), "SLURM", "bad", words)


def test_a_machine_with_slurms_programs_and_no_cluster_is_well(tmp_path: Path) -> None:
    text = "#!/bin/sh\necho 'scontrol: fatal: Could not establish a configuration source' >&2\nexit 1\n"
    program(tmp_path / "programs", "scontrol", text)
    with pytest.MonkeyPatch().context() as patched:
        patched.setenv("PATH", f"{tmp_path / 'programs'}:{os.environ['PATH']}")
        assert [each.verdict for each in found_by("SLURM", host(tmp_path))] == ["good"]


@pytest.mark.parametrize(
    ("text", "within", "verdict", "words"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", 20.0, "bad", "ImportError: libcudart.so.12: cannot open"),
        ("raise SystemExit", 20.0, "bad", "it ended the process"),
        ("import time\ntime.sleep(600)", 1.0, "warning", "importing torch takes more than 1 s"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGILL)", 20.0, "bad", "ended with signal 4"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_named(
    text: str, within: float, verdict: Verdict, words: str, tmp_path: Path
) -> None:
    environ = torch_that(tmp_path / "packages", text)
    named(found_by("torch", host(tmp_path, within, **environ)), "torch", verdict, words)


def test_a_gpu_that_fell_off_the_bus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "<nvidia_smi_log><gpu><product_name>H100</product_name></gpu></nvidia_smi_log>"
    program(tmp_path / "programs", "nvidia-smi", f"#!/bin/sh\necho '{listing}'\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}:{os.environ['PATH']}")
    for index in range(2):  # as the kernel shows them
        (tmp_path / f"proc/driver/nvidia/gpus/{index}").mkdir(parents=True)
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / f"dev/nvidia{index}").touch()
    found = found_by("GPUs", host(tmp_path, root=tmp_path))
    named(found, "GPUs", "bad", "this process may use 2 GPUs, and nvidia-smi shows 1")


def test_an_nvidia_smi_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "programs", "nvidia-smi", "#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}:{os.environ['PATH']}")
    (tmp_path / "proc/driver/nvidia/gpus/0").mkdir(parents=True)
    found = found_by("GPUs", host(tmp_path, within=0.5, root=tmp_path))
    named(found, "GPUs", "bad", "nvidia-smi did not answer within 0.5 s")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts need root")
    (tmp_path / "runs").mkdir()
    text = f'mount --bind -o ro "$1/runs" "$1/runs"; shift; exec {shlex.join(ALLSTEP)} "$@"'
    around = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", text, "sh", str(tmp_path)]
    env = torch_that(tmp_path / "packages", "raise ImportError('not looked at here')")
    with start(tmp_path, [*around, "doctor", "--json"], env=env) as running:
        found = [HostFinding(**each) for each in json.loads(running.end().out)]
    named(found, "folder", "bad", "is mounted read-only")
    named(found, "folder", "bad", "no file can be written there")


def test_what_a_check_that_is_late_has_started_is_ended(tmp_path: Path) -> None:
    machine = host(tmp_path, within=0.2)

    def asks(machine: Host) -> list[HostFinding]:
        ask(["sleep", "600"], machine, within=600)
        return []

    while not machine.asked:  # on a busy machine it may be later than even that
        run_checks(machine, [Check("one", asks, "Wait")])
    assert machine.asked[0].wait(10) == -signal.SIGKILL


def test_a_check_that_hangs_and_one_that_raises_are_findings(tmp_path: Path) -> None:
    def hangs(_: Host) -> list[HostFinding]:
        threading.Event().wait()
        return []

    def breaks(_: Host) -> list[HostFinding]:
        raise ZeroDivisionError("of a check")

    checks = [
        Check("one", hangs, "Wait"),
        Check("two", breaks, ""),
        Check("three", lambda _: [HostFinding("t", "good", "")], ""),
    ]
    first, second, third = run_checks(host(tmp_path, within=0.1), checks)
    assert (first.verdict, first.remedy) == ("bad", "Wait")
    assert second.verdict == "warning"
    assert "ZeroDivisionError: of a check" in second.text
    assert third.verdict == "good"
