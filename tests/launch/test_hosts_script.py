"""`launch/hosts.sh` makes one run of the machines that a scheduler lists, whatever form its list has.

The lists are LSF's, as a job of LSF 7 had its hosts (`LSB_HOSTS`), PBS's, by its manual a line for each slot, and Grid
Engine's, as release 8.1.9 wrote it. What starts a command elsewhere is played by a script here that writes down whom it
was asked for; `tests/hosts` and `tests/gridengine` have the real thing.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.jobs.launchers import ROOT

LISTS = Path(__file__).parent / "hostfiles"
SCRIPT = ROOT / "launch" / "hosts.sh"


@dataclass(frozen=True)
class System:
    """A scheduler: what it sets, what starts a command elsewhere, and what that is asked for."""

    variables: Mapping[str, str]
    starter: str
    asked: list[str]
    here: str
    meets: str
    code_of_85: int = 85


SYSTEMS = {
    "lsf": System(
        {"LSB_DJOB_HOSTFILE": "lsf", "LSB_JOBID": "748"},
        "blaunch",
        ["blaunch -z grid05", "blaunch -z grid03"],
        "grid01.cluster",
        "grid01:20748",
    ),
    "pbs": System(
        {"PBS_NODEFILE": "pbs", "PBS_JOBID": "314827.server"},
        "pbsdsh",
        ["pbsdsh -n 2 --"],
        "node07",
        "node07.cluster:28827",
    ),
    "grid engine": System(
        {"PE_HOSTFILE": "grid_engine", "JOB_ID": "12"},
        "qrsh",
        ["qrsh -inherit -nostdin host1"],
        "host0",
        "host0:20012",
        code_of_85=99,
    ),
    "ssh": System(
        {"HOSTFILE": "pbs"}, "ssh", ["ssh -o BatchMode=yes node07.cluster"], "node02", "node02.cluster:20000"
    ),
}


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def programs(folder: Path, system: System) -> Path:
    """A folder with a host name, an `allstep` that says how it was called, and what starts a command elsewhere."""
    bin = folder / "bin"
    bin.mkdir()
    program(bin, "hostname", f"echo {system.here}")
    program(bin, "allstep", 'printf "%s\\n" "$PWD" "$@" > "$SAID/node$5"; exit "${ENDS_WITH:-0}"')
    starts = 'echo "${0##*/}" "${@:1:$#-3}" >> "$SAID/asked"; shift $(($# - 3)); exec env -i SAID="$SAID" "$@"'
    program(bin, system.starter, starts)
    return bin


def run(folder: Path, system: System, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    path = programs(folder, system)
    (folder / "work").mkdir()
    lists = {
        name: str(LISTS / value) if (LISTS / value).is_file() else value for name, value in system.variables.items()
    }
    environ = {"PATH": f"{path}{os.pathsep}/usr/bin{os.pathsep}/bin", "SAID": str(folder), **lists, **more}
    return subprocess.run(
        [SCRIPT, *arguments], cwd=folder / "work", env=environ, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_machine_of_the_list_is_a_node_of_one_run(name: str, tmp_path: Path) -> None:
    system = SYSTEMS[name]
    done = run(tmp_path, system, "--nproc", "2", "my script.py", "--text", "a 'b' $c\n*")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(asked) == sorted(system.asked)
    nodes = str(len(system.asked) + 1)
    for node in range(int(nodes)):
        folder, *arguments = (tmp_path / f"node{node}").read_text().split("\n", 8)
        assert folder == str(tmp_path / "work")
        assert arguments[:7] == ["run", "--nnodes", nodes, "--node-rank", str(node), "--rdzv", system.meets]
        assert arguments[7] == "--nproc\n2\nmy script.py\n--text\na 'b' $c\n*\n"
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("name", ["lsf", "grid engine"])
def test_a_preempted_run_ends_with_what_its_scheduler_understands(name: str, tmp_path: Path) -> None:
    assert run(tmp_path, SYSTEMS[name], "train.py", ENDS_WITH="85").returncode == SYSTEMS[name].code_of_85


def test_the_variables_of_the_run_go_along_and_are_nobody_elses_to_read(tmp_path: Path) -> None:
    system = SYSTEMS["lsf"]
    run(tmp_path, system, "train.py")
    shows = 'stat -c "%a %n" .hosts-*.sh > "$SAID/mode$5"; env > "$SAID/environment$5"'
    program(tmp_path / "bin", "allstep", shows)
    environ = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SAID": str(tmp_path)}
    environ |= {"LSB_DJOB_HOSTFILE": str(LISTS / "lsf"), "NCCL_DEBUG": 'IN "FO', "ALLSTEP_SECRET": "0123456789abcdef"}
    environ |= {"ALLSTEP_TEXT": "two\nlines", "OTHER": "stays"}
    subprocess.run([SCRIPT, "train.py"], cwd=tmp_path / "work", env=environ, check=True, timeout=60)
    elsewhere = (tmp_path / "environment1").read_text().splitlines()
    assert 'NCCL_DEBUG=IN "FO' in elsewhere
    assert "ALLSTEP_SECRET=0123456789abcdef" in elsewhere
    assert not any(line.startswith("OTHER=") for line in elsewhere)
    assert (tmp_path / "mode1").read_text().startswith("600 ")


@pytest.mark.parametrize(
    ("sent", "comes"), [("TERM", "TERM"), ("USR2", "TERM"), ("HUP", "TERM"), ("USR1", "USR1"), ("INT", "INT")]
)
def test_a_schedulers_notice_reaches_node_0_alone(sent: str, comes: str, tmp_path: Path) -> None:
    bin = programs(tmp_path, SYSTEMS["lsf"])
    notes = 'for s in TERM INT USR1; do trap "echo $s > $SAID/came$5; exit 85" $s; done; echo > "$SAID/there$5"\n'
    notes += '[ "$5" = 0 ] || exit 85; echo ready; while :; do sleep 0.05; done'
    program(bin, "allstep", notes)
    environ = {"PATH": f"{bin}:/usr/bin:/bin", "SAID": str(tmp_path), "LSB_DJOB_HOSTFILE": str(LISTS / "lsf")}
    with subprocess.Popen(
        [SCRIPT, "train.py"], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.Signals[f"SIG{sent}"])
        assert process.wait(60) == 85
    assert (tmp_path / "came0").read_text() == f"{comes}\n"
    assert not (tmp_path / "came1").exists()


def test_without_a_list_or_this_machine_in_it_nothing_is_started(tmp_path: Path) -> None:
    none = run(tmp_path / "none", System({}, "ssh", [], "here", ""), "train.py")
    assert (none.returncode, "no list of machines" in none.stderr) == (2, True)
    foreign = run(tmp_path / "foreign", System({"HOSTFILE": "pbs"}, "ssh", [], "login", ""), "train.py")
    assert foreign.returncode == 2
    assert "this machine, login, is not in " in foreign.stderr
    missing = run(tmp_path / "missing", System({"PBS_NODEFILE": "/nowhere"}, "pbsdsh", [], "here", ""), "train.py")
    assert missing.returncode == 2
    assert "cannot be read; run this script on the job's first machine" in missing.stderr
    nothing = run(tmp_path / "nothing", SYSTEMS["lsf"])
    assert (nothing.returncode, "nothing to run" in nothing.stderr) == (2, True)
    assert not list(tmp_path.glob("*/asked"))
