"""`allstep doctor`: whether this machine is fit to train on, in under ten seconds.

Contract: starts nothing that outlives it and changes nothing. Exit codes: 0 all good, or warnings only; 1 something is
bad, and with `--strict` a warning is enough; 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from allstep.cli.active_environment import change_to_active_environment
from allstep.cli.parser import Parser
from allstep.errors import ConfigurationError, printable
from allstep.host_checks import Host, HostFinding
from allstep.host_checks.checking import LEEWAY_S, run_checks
from allstep.launch.devices import probe_hardware, visible_devices
from allstep.launch.settings import check_count, check_seconds, read_integer, read_seconds

DESCRIPTION = """\
Look whether this machine is fit to train on: Python and torch, devices and driver, names and ports, limits, the folder
for runs, clocks, and SLURM's settings. What is not good is shown with what to do about it.
"""

EPILOG = """\
exit code:
  0  all is good, or there are warnings only
  1  something is bad; with --strict, or a warning
  2  wrong command line

examples:
  allstep doctor
  allstep doctor --folder /scratch/me/runs --nnodes 4
  allstep doctor --json --strict
"""

WITHIN_S = 9.0 - LEEWAY_S


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    change_to_active_environment(["doctor", *argv])  # as `allstep run` would
    host = Host(
        environ=os.environ,
        folder=arguments.folder,
        workers=arguments.nproc,
        nodes=arguments.nnodes or meant_nodes(os.environ),
        visible=_visible,
        within=arguments.timeout,
    )
    findings = run_checks(host)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for line in shown(findings):
            print(line)
    verdicts = {finding.verdict for finding in findings}
    return int("bad" in verdicts or (arguments.strict and "warning" in verdicts))


def shown(findings: Sequence[HostFinding]) -> list[str]:
    """The findings as lines: verdict, subject, what was seen, and below it what to do."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(printable(f"{finding.verdict:<7}  {finding.subject:<{width}}  {finding.text}"))
        if finding.remedy:
            lines.append(printable(f"{'':<7}  {'':<{width}}  -> {finding.remedy}"))
    counts = {verdict: sum(each.verdict == verdict for each in findings) for verdict in ("good", "warning", "bad")}
    warnings = f"{counts['warning']} warning{'' if counts['warning'] == 1 else 's'}"
    return [*lines, f"{counts['good']} good, {warnings}, {counts['bad']} bad"]


def meant_nodes(environ: Mapping[str, str]) -> int:
    """How many machines the environment says that a job has."""
    for variable in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"):
        if environ.get(variable, "").isdecimal():
            return int(environ[variable])
    return 1


def _visible() -> tuple[str, ...]:
    return visible_devices(os.environ, probe_hardware).names


def _parser() -> Parser:
    parser = Parser(prog="allstep doctor", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), metavar="DIR", help="folder that holds run folders (default: runs)"
    )
    parser.add_argument(
        "--nproc", type=partial(_count, "nproc"), metavar="N", help="ranks that are meant for this machine"
    )
    parser.add_argument(
        "--nnodes", type=partial(_count, "nnodes"), metavar="N", help="machines that are meant for a run"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=WITHIN_S,
        metavar="SECONDS",
        help=f"how long to wait for what does not answer (default: {WITHIN_S:g})",
    )
    parser.add_argument("--json", action="store_true", help="as JSON: subject, verdict, text, remedy of each")
    parser.add_argument("--strict", action="store_true", help="exit with 1 also where there are warnings only")
    return parser


def _count(name: str, text: str) -> int:
    try:
        return check_count(name, read_integer(name, text))
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seconds(text: str) -> float:
    try:
        value = read_seconds("timeout", text)
        check_seconds("timeout", value)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value
