"""The `allstep` command line: find the command, run it, turn its errors into one line and an exit code.

Contract: `main` returns the exit code and raises nothing that a user's mistake can cause. A command NAME of `COMMANDS`
is the module `NAME_command` of this package, with a `main(argv) -> int`; it is imported when it is asked for. Exit
codes: what the command returns; 2 for a wrong command line, a wrong configuration, or a run that could not be started;
130 when interrupted before it started; 141 when the reader of its output is gone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from allstep.cli.parser import Parser
from allstep.errors import AllstepError
from allstep.exit_codes import LAUNCHER_ERROR
from allstep.protocol.foreign_text import printable
from allstep.protocol.masking import mask, secret_values
from allstep.version import __version__

COMMANDS = {
    "run": "start a script on every device of this machine",
    "plan": "say what a script's training takes on each rank, without devices",
    "rehearse": "interrupt a script here as a cluster would, and compare it with an unbroken run",
    "submit": "submit a script as a SLURM job that requeues itself",
    "status": "say where runs are and how they are",
    "logs": "show what a run's ranks printed, and go on with it",
    "cancel": "end a run, with a save first",
    "history": "list runs, or the attempts of one",
    "doctor": "say whether this machine is fit to train on",
    "checkpoints": "list, verify, export and remove checkpoints",
    "port": "show a script for PyTorch-Ignite in allstep's names",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default this process's) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_what_is_closed()
    try:
        # Before argparse, which would read a command's own options.
        if arguments and arguments[0] in COMMANDS:
            return int(import_module(f"allstep.cli.{arguments[0]}_command").main(arguments[1:]))
        parser = _parser()
        parser.parse_args(arguments)
        parser.print_help(sys.stderr)
        return LAUNCHER_ERROR
    except SystemExit as exit_:  # argparse has said what there was to say
        return exit_.code if isinstance(exit_.code, int) else 0
    except AllstepError as error:
        # The words may be another machine's or a file's, and may repeat what this one was given in confidence.
        said = mask(str(error), secret_values(arguments, os.environ))
        for line in said.splitlines():  # a configuration file may have several mistakes
            print(f"allstep: error: {printable(line)}", file=sys.stderr)
        return LAUNCHER_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of `allstep ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would complain at its end
        return 128 + signal.SIGPIPE


def _open_what_is_closed() -> None:
    """Let standard descriptors that nobody gave go nowhere, so that no other file gets their numbers."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<12} {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="allstep",
        usage="allstep [-h] [--version] COMMAND ...",
        description="Train a PyTorch model on every device a job has, with every rank taking the same step.",
        epilog=f"commands:\n{listing}\n\n`allstep COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"allstep {__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser
