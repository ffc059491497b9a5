"""`allstep run`: one worker per device of this machine, or of several, each running the same script.

Contract: reads the command line and, if asked, a configuration file; works out everything that can be wrong before
anything is started; then hands over to the supervisor and returns its exit status. What is given on the command line
wins over the file. Everything after the script's name belongs to the script, whatever it looks like.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from allstep.errors import ConfigurationError, LaunchError
from allstep.launch.devices import probe_hardware, visible_devices
from allstep.launch.folder import default_name
from allstep.launch.machine import Launch
from allstep.launch.settings import LaunchSettings, parse_nproc, parse_show, parse_variable, shown_ranks
from allstep.launch.supervisor import supervise
from allstep.launch.worker_plan import Command, worker_count

if TYPE_CHECKING:
    from allstep.launch.nodes import Nodes

T = TypeVar("T")

USAGE = "allstep run [options] [-m] script [args ...]"

DESCRIPTION = """\
Run a Python script once per device of this machine, or of several, as the ranks of one job.

Each worker gets the environment that torchrun would give it (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, ...), so
scripts made for torchrun run unchanged. Output comes out with the rank before each line, and is kept per rank in
RUNS/NAME/attempt_K/rank_R.log. The first worker that fails ends the attempt. On several machines start the same
command on each, with --nnodes, --node-rank and --rdzv, or as one SLURM task per node.
"""

EPILOG = """\
exit code:
  0      every worker exited with 0
  N      the exit code of the worker that failed first; 128 + N if signal N killed it
  128+N  signal N stopped the run (130 for Ctrl-C, 143 for SIGTERM)
  2      nothing was started: wrong command line or configuration, or machines that did not come together
  83     a worker hung: no progress for longer than its section may last
  84     the link to another machine or worker was lost
  85     the workers made room in order; start the run again to go on

examples:
  allstep run train.py --lr 0.1
  allstep run --nproc 2 -m package.train
  allstep run --config configs/quickstart.yaml examples/digits.py
  allstep run --max-restarts 3 train.py
  allstep run --nnodes 2 --node-rank 0 --rdzv node0:29400 train.py
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    parser, options_with_value = _parser()
    own, rest = split_command(argv, options_with_value)
    given = vars(parser.parse_args(own))
    module = given.pop("module")
    config = given.pop("config", None)
    if not rest:
        parser.error(f"{'a module' if module else 'a script'} to run is missing")
    settings = _at_a_place(LaunchSettings(**_merged(_from_file(config), given)))
    command = Command(rest[0], tuple(rest[1:]), module)
    if not module:
        _check_script(command.target)
    return _launch(settings, command)


def split_command(argv: Sequence[str], options_with_value: frozenset[str]) -> tuple[list[str], list[str]]:
    """Split a command line before the script's name: our options, and the script with its arguments, untouched."""
    index = 0
    while index < len(argv):
        token = argv[index]
        if token == "--":
            return list(argv[:index]), list(argv[index + 1 :])
        if not token.startswith("-") or token == "-":
            break
        index += 2 if token in options_with_value else 1
    return list(argv[:index]), list(argv[index:])


def _launch(settings: LaunchSettings, command: Command) -> int:
    environ = {**os.environ, "ALLSTEP_LAUNCH": secrets.token_hex(8)}
    devices = visible_devices({**environ, **settings.env}, probe_hardware)
    workers = worker_count(settings, devices)
    nodes = _nodes(settings, environ)
    if nodes is None:
        shown_ranks(settings.show, workers)
    return supervise(
        Launch(
            settings=settings,
            command=command,
            name=settings.name or default_name(command.target, time.strftime("%Y%m%d-%H%M%S")),
            workers=workers,
            devices=devices,
            cores=_cores(),
            environ=environ,
            nodes=nodes,
        )
    )


def _nodes(settings: LaunchSettings, environ: Mapping[str, str]) -> Nodes | None:
    """This machine's place among several, with a warning where there are others that it does not use."""
    if (settings.nnodes, settings.node_rank, settings.rdzv) == (None, None, None) and "SLURM_JOB_ID" not in environ:
        return None
    from allstep.launch.nodes import find_nodes, warning

    nodes = find_nodes(settings, environ)
    if nodes is None and (remark := warning(environ)):
        print(f"allstep: warning: {remark}", file=sys.stderr, flush=True)
    return nodes


def _at_a_place(settings: LaunchSettings) -> LaunchSettings:
    """The same, with a local path to resume from that is there, wherever a script may change to."""
    if settings.resume in (None, "auto", "none") or "://" in str(settings.resume):
        return settings
    path = os.path.abspath(str(settings.resume))
    if not os.path.isdir(path):
        raise LaunchError(
            f"resume is {settings.resume}, and there is no folder of that name (in {os.getcwd()}); give the path of a "
            "checkpoint or of a folder of checkpoints, auto, or none"
        )
    return replace(settings, resume=path)


def _check_script(path: str) -> None:
    if not os.path.exists(path):
        raise LaunchError(f"script {path} does not exist (in {os.getcwd()}); for a module use -m")
    if not os.access(path, os.R_OK):
        raise LaunchError(f"script {path} cannot be read")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "__main__.py")):
        raise LaunchError(f"script {path} is a folder without a __main__.py")


def _from_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    from allstep.launch.config import load_settings

    return load_settings(Path(path))


def _merged(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    env = {**file.get("env", {}), **dict(given.get("env", []))}
    return {**file, **given, "env": env}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parser() -> tuple[argparse.ArgumentParser, frozenset[str]]:
    """Return the parser of our own options, which leaves out what is not given, and those options that take a value."""
    parser = argparse.ArgumentParser(
        prog="allstep run",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "-m", dest="module", action="store_true", default=False, help="script is the name of a module, as in python -m"
    )
    parser.add_argument(
        "--no-shared-imports",
        dest="share_imports",
        action="store_false",
        help="let each worker import torch by itself, rather than fork workers from a process that has",
    )
    actions = [
        parser.add_argument(
            "--nproc",
            type=_read(parse_nproc),
            metavar="auto|N",
            help="workers on this machine; auto (the default) is one per CUDA device, or one without any",
        ),
        parser.add_argument(
            "--config", metavar="FILE", help="YAML file with these settings; the command line wins over it"
        ),
        parser.add_argument("--name", metavar="NAME", help="name of the run (default: from the script and the time)"),
        parser.add_argument("--runs", metavar="DIR", help="folder that holds run folders (default: runs)"),
        parser.add_argument(
            "--show",
            type=_read(parse_show),
            metavar="all|main|R,R",
            help="whose output to print: all ranks (the default), rank 0, or those named; logs keep all",
        ),
        parser.add_argument(
            "--env",
            type=_read(parse_variable),
            action="append",
            metavar="NAME=VALUE",
            help="set an environment variable in the workers; may be given several times",
        ),
        parser.add_argument(
            "--grace",
            type=float,
            metavar="SECONDS",
            help="how long workers may take to leave after a signal to stop (default: 30)",
        ),
        parser.add_argument(
            "--max-restarts", type=int, metavar="N", help="begin a run that failed anew, at most N times (default: 0)"
        ),
        parser.add_argument(
            "--stop-after",
            type=int,
            metavar="K",
            help="but not after K restarts in a row that got no further than those before (default: 3)",
        ),
        parser.add_argument("--nnodes", type=int, metavar="N", help="machines of the run; start this on each of them"),
        parser.add_argument("--node-rank", type=int, metavar="K", help="which of them this is, from 0"),
        parser.add_argument(
            "--rdzv", metavar="HOST:PORT", help="where they meet: node 0's host, and a port that is free there"
        ),
        parser.add_argument(
            "--rdzv-timeout",
            type=float,
            metavar="SECONDS",
            help="how long machines wait for each other (default: 300)",
        ),
        parser.add_argument(
            "--limits",
            metavar="TEXT",
            help="seconds that a section may last without progress, such as step=60,data=300",
        ),
        parser.add_argument("--fault", metavar="TEXT", help="rehearse a fault, such as rank=1,iteration=7,kill=9"),
        parser.add_argument(
            "--resume",
            metavar="auto|PATH|none",
            help="what a script's Checkpoint goes on from: its newest (the default), the one at PATH, or nothing",
        ),
    ]
    return parser, frozenset(option for action in actions for option in action.option_strings)


def _read(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Let argparse show the message of a ConfigurationError as it is."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ConfigurationError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read
