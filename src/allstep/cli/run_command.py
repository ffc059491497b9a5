"""`allstep run`: one worker per device of this machine, or of several, each running the same script.

Contract: reads the command line and, if asked, a configuration file, by the table in `allstep.launch.settings`; what is
given on the command line wins over the file. Everything after the script's name belongs to the script, whatever it
looks like. `allstep.launch.supervisor` does the rest, and its exit status is this command's.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from allstep.cli.active_environment import change_to_active_environment
from allstep.cli.parser import Parser
from allstep.errors import ConfigurationError
from allstep.launch.settings import COMMAND_LINE_ONLY, OPTIONS, LaunchSettings, Option
from allstep.launch.supervisor import launch
from allstep.launch.worker_plan import Command
from allstep.protocol.masking import secret_values

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
  85     the workers were preempted; start the run again to go on

examples:
  allstep run train.py --lr 0.1
  allstep run --nproc 2 -m package.train
  allstep run --config configs/quickstart.yaml examples/digits.py
  allstep run --max-restarts 3 train.py
  allstep run --nnodes 2 --node-rank 0 --rdzv node0:29400 train.py
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    change_to_active_environment(["run", *argv])
    # Before the parser, which would take options of the script for ours.
    own, rest = split_command(argv, OPTIONS_WITH_VALUE)
    parser = _parser(secret_values(argv, os.environ))
    given = vars(parser.parse_args(own))  # without defaults, so that a file's values show through
    module = given.pop("module", False)
    config = given.pop("config", None)
    if not rest:
        parser.error(f"{'a module' if module else 'a script'} to run is missing")
    from_file = _from_file(config) if config is not None else {}
    env = {**from_file.get("env", {}), **_joined(given.get("env", []))}
    settings = LaunchSettings(**{**from_file, **given, "env": env})
    return launch(settings, Command(rest[0], tuple(rest[1:]), module))


OPTIONS_WITH_VALUE = frozenset(
    option.flag for option in (*COMMAND_LINE_ONLY, *OPTIONS) if option.flag and option.constant is None
)
"""The options after which the next word is a value, and not the script."""


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


def _from_file(path: str) -> dict[str, Any]:
    from allstep.launch.config_file import load_settings  # loads YAML, which takes longer than all the rest

    return load_settings(Path(path))


def _joined(variables: Sequence[dict[str, str]]) -> dict[str, str]:
    return {name: value for each in variables for name, value in each.items()}


def _parser(secrets: frozenset[str]) -> argparse.ArgumentParser:
    """Return the parser of our own options; what is not given is left out of its result."""
    parser = Parser(
        secrets=secrets,
        prog="allstep run",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    for option in (*COMMAND_LINE_ONLY, *OPTIONS):
        if not option.flag:  # only a file can set it
            continue
        add_option(parser, option)
    return parser


def add_option(parser: argparse.ArgumentParser, option: Option, *, of_lists: str = "store") -> None:
    """Add an option of a table to a parser.

    Args:
        parser: which.
        option: the option.
        of_lists: argparse's action where its value is a list; "extend" where it may be given several times.
    """
    if option.constant is not None:
        parser.add_argument(
            option.flag, dest=option.name, action="store_const", const=option.constant, help=option.help
        )
        return
    default = f" (default: {option.default})" if option.default else ""
    parser.add_argument(
        option.flag,
        dest=option.name,
        action={"mapping": "append", "list": of_lists}.get(option.type.form, "store"),
        type=option_reader(option),
        metavar=option.metavar,
        help=option.help + default,
    )


def option_reader(option: Option) -> Callable[[str], Any]:
    """What argparse is to read an option with: it shows the message of an ArgumentTypeError as it is."""

    def read(text: str) -> Any:
        try:
            return option.value(text)
        except ConfigurationError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read
