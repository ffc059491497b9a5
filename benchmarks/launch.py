"""Start-up, and time from a fault to the end, of `allstep run` beside other launchers; and who names the right cause.

    python benchmarks/launch.py                          # everything, 10 trials: about 40 minutes on two cores
    python benchmarks/launch.py --only startup --trials 3
    python benchmarks/launch.py --quick                  # a few trials of each part, to see that it works

Parts: `startup` (from the command to the end of rank 0's first step, with 2 and 4 ranks), `fault` (from a ValueError on
rank 1 to the launcher's exit, all processes gone), `cause` (of how many runs the report names the right first cause),
`restarts` (of how many jobs that fail three times recover). Trials of the launchers are interleaved, so that a slow
minute of the machine hits all alike; figures are medians. `accelerate launch --cpu` starts a single process, so
accelerate is started through torchrun. Lightning's launcher is that of strategy "ddp": the script starts its peers.
The packages of the `bench` extra are needed; a launcher whose package is missing is left out and said.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from machine import machine_line

SCRIPTS = Path(__file__).with_name("launch_scripts")
LIMIT = 120.0
Command = Callable[[int, Path, int], list[str]]


@dataclass(frozen=True)
class Launcher:
    name: str
    package: str
    command: Command


@dataclass(frozen=True)
class Trial:
    """One run: its exit code, what it wrote, when it began and ended, the marks of its ranks, and who was left."""

    code: int
    text: str
    began: float
    ended: float
    marks: Mapping[str, tuple[float, int]]
    orphans: int
    report: Mapping[str, object]

    def first_step(self) -> float:
        return self.marks["first_0"][0] - self.began

    def fault_to_end(self) -> float:
        return self.ended - min(at for name, (at, _) in self.marks.items() if name.startswith("fault"))


def _allstep(ranks: int, folder: Path, restarts: int) -> list[str]:
    options = ["--nproc", str(ranks), "--runs", str(folder / "runs"), "--name", "bench"]
    return [
        *(sys.executable, "-m", "allstep", "run", *options, "--max-restarts", str(restarts)),
        *("--stop-after", "100", str(SCRIPTS / "with_allstep.py")),
    ]


def _torchrun(script: str) -> Command:
    def command(ranks: int, folder: Path, restarts: int) -> list[str]:
        options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        return [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPTS / script)]

    return command


def _lightning(ranks: int, folder: Path, restarts: int) -> list[str]:
    return [sys.executable, str(SCRIPTS / "with_lightning.py")]


LAUNCHERS = (
    Launcher("allstep run", "allstep", _allstep),
    Launcher("torchrun", "torch", _torchrun("with_torch.py")),
    Launcher("accelerate (torchrun)", "accelerate", _torchrun("with_accelerate.py")),
    Launcher("Lightning (ddp)", "lightning", _lightning),
)


def run(launcher: Launcher, ranks: int, fault: str = "none", restarts: int = 0) -> Trial:
    with tempfile.TemporaryDirectory(prefix="allstep-bench-") as name:
        folder = Path(name)
        marks = folder / "marks"
        marks.mkdir()
        environ = {
            **{
                key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD_SIZE", "MASTER_"))
            },
            "BENCH_MARKS": str(marks),
            "BENCH_FAULT": fault,
            "BENCH_RANKS": str(ranks),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONWARNINGS": "ignore",
        }
        began = time.time()
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                launcher.command(ranks, folder, restarts),
                env=environ,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                code = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                code = 124
        ended = time.time()
        found = {path.name: _mark(path) for path in marks.iterdir()}
        left = [pid for pid in {pid for _, pid in found.values()} if _alive(pid)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        if process.poll() is None:
            process.kill()
            process.wait()
        reports = sorted((folder / "runs").glob("bench/attempt_*/failure.json"))
        report = json.loads(reports[-1].read_text()) if reports else {}
        return Trial(code, (folder / "output").read_text(errors="replace"), began, ended, found, len(left), report)


def _mark(path: Path) -> tuple[float, int]:
    at, pid = path.read_text().split()
    return float(at), int(pid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def startup(launchers: list[Launcher], trials: int) -> None:
    for ranks in (2, 4):
        took: dict[str, list[float]] = {launcher.name: [] for launcher in launchers}
        ended_badly = dict.fromkeys(took, 0)
        for _ in range(trials):
            for launcher in launchers:
                trial = run(launcher, ranks)
                _insist("first_0" in trial.marks, launcher, trial)
                took[launcher.name].append(trial.first_step())
                ended_badly[launcher.name] += trial.code != 0
        _table(f"Start-up to the end of the first step, {ranks} ranks", took)
        _say_counts("trained and then ended with another code than 0", ended_badly)


def fault(launchers: list[Launcher], trials: int) -> None:
    took: dict[str, list[float]] = {launcher.name: [] for launcher in launchers}
    orphans = dict.fromkeys(took, 0)
    for _ in range(trials):
        for launcher in launchers:
            trial = run(launcher, 2, "raise")
            _insist(trial.code != 0, launcher, trial)
            took[launcher.name].append(trial.fault_to_end())
            orphans[launcher.name] += trial.orphans
    _table("From a ValueError on rank 1 of 2 to the launcher's exit", took)
    _say_counts("processes left behind", orphans)


ROWS = {
    "raise": ("1: a rank raises", 2),
    "cleanup": ("2: it raises, then cleans up slowly", 2),
    "leave": ("3: it leaves early with code 0", 2),
    "kill": ("4: it is killed with SIGKILL", 2),
    "both": ("9: two ranks raise together", 3),
}


def cause(launchers: list[Launcher], trials: int) -> None:
    print(f"\nThe right first cause in the closing report, of {trials} runs")
    compared = launchers[:2]
    for kind, (row, ranks) in ROWS.items():
        right = {launcher.name: 0 for launcher in compared}
        for _ in range(trials):
            for launcher in compared:
                trial = run(launcher, ranks, kind)
                judge = _allstep_is_right if launcher.name == "allstep run" else _torchrun_is_right
                right[launcher.name] += trial.code != 0 and judge(kind, trial)
        print(f"  row {row:<38}" + "   ".join(f"{name} {count}/{trials}" for name, count in right.items()))


def _allstep_is_right(kind: str, trial: Trial) -> bool:
    named = re.search(r"failed: rank (\d+) of", trial.text)
    block = trial.text[named.start() :] if named else ""
    if named is None or named[1] not in ("12" if kind == "both" else "1"):
        return False
    words = {
        "raise": ["ValueError: bad batch on rank 1"],
        "cleanup": ["ValueError: bad batch on rank 1"],
        "leave": ["left early"],
        "kill": ["SIGKILL"],
        "both": ["ValueError: bad batch on rank 1", "ValueError: bad batch on rank 2"],
    }[kind]
    return all(word in block for word in words)


def _torchrun_is_right(kind: str, trial: Trial) -> bool:
    """Whether "Root Cause" names the rank, and the block the reason, of both ranks where two failed."""
    _, _, block = trial.text.rpartition("Root Cause (first observed failure)")
    named = re.search(r"rank\s*: (\d+) ", block)
    if named is None or named[1] not in ("12" if kind == "both" else "1"):
        return False
    if kind == "both":
        whole = trial.text[trial.text.rfind("FAILED") :]
        return all(f"bad batch on rank {rank}" in whole for rank in (1, 2))
    word = {"leave": "", "kill": "SIGKILL"}.get(kind, "bad batch on rank 1")
    return word in block


def restarts(launchers: list[Launcher], trials: int) -> None:
    jobs = 2 * trials
    print(f"\nJobs that fail in their first three attempts and recover with --max-restarts 3, of {jobs}")
    recovered = {launcher.name: 0 for launcher in launchers[:2]}
    for _ in range(jobs):
        for launcher in launchers[:2]:
            recovered[launcher.name] += run(launcher, 2, "restarts", restarts=3).code == 0
    for name, count in recovered.items():
        print(f"  {name:<24}{count}/{jobs}")


def _say_counts(what: str, counts: Mapping[str, int]) -> None:
    if any(counts.values()):
        print(f"  {what}: " + ", ".join(f"{name} {count}" for name, count in counts.items() if count))


def _insist(well: bool, launcher: Launcher, trial: Trial) -> None:
    if not well or trial.code == 124:
        sys.exit(f"{launcher.name} went wrong, exit code {trial.code}:\n{trial.text[-3000:]}")


def _table(title: str, took: Mapping[str, list[float]]) -> None:
    print(f"\n{title}: median of {len(next(iter(took.values())))} interleaved trials, seconds")
    ours = statistics.median(took["allstep run"])
    for name, seconds in took.items():
        middle = statistics.median(seconds)
        print(
            f"  {name:<24}{middle:7.2f}   {min(seconds):.2f} to {max(seconds):.2f}   {middle / ours:.2f} x allstep run"
        )


PARTS = {"startup": startup, "fault": fault, "cause": cause, "restarts": restarts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    parser.add_argument(
        "--trials", type=int, default=10, help="of each measurement; cause and restarts take twice that"
    )
    parser.add_argument("--quick", action="store_true", help="two trials of each")
    options = parser.parse_args()
    trials = 2 if options.quick else options.trials
    launchers = [launcher for launcher in LAUNCHERS if importlib.util.find_spec(launcher.package) is not None]
    print(machine_line())
    for launcher in LAUNCHERS:
        if launcher not in launchers:
            print(f"{launcher.name} is left out: the package {launcher.package} is not installed")
    for name, part in PARTS.items():
        if options.only in (None, name):
            part(launchers, 2 * trials if name == "cause" else trials)


if __name__ == "__main__":
    main()
