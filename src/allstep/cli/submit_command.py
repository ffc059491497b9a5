"""`allstep submit`: a SLURM job that trains, stops in time, requeues itself and goes on.

Contract: reads the command line and, if asked, a configuration file, whose `submit` part has these options and whose
other fields are those of `allstep run`. Options that are not its own belong to the `allstep run` on each node. With
`--dry-run` it prints the batch script and changes nothing. Otherwise it makes the folder RUNS/NAME with a copy of the
code in it, gives the script there to SLURM, and prints one line: the job's number and its log. Exit codes: 0
submitted; 2 not submitted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allstep.cli.active_environment import change_to_active_environment
from allstep.cli.parser import Parser
from allstep.cli.run_command import OPTIONS_WITH_VALUE as RUN_OPTIONS_WITH_VALUE
from allstep.cli.run_command import add_option, option_reader, split_command
from allstep.errors import ConfigurationError, SubmissionError
from allstep.launch.settings import OPTIONS as RUN_OPTIONS
from allstep.launch.settings import LaunchSettings, Option
from allstep.protocol.masking import masked_arguments, secret_values
from allstep.run_record.run_folders import PRIVATE, default_name
from allstep.submission.batch_script import BatchJob, batch_script
from allstep.submission.carried_environment import carried
from allstep.submission.code_copy import SubmittedCode, copy_code, find_code
from allstep.submission.request import OPTIONS, JobRequest, request_from_mapping, with_shell_defaults
from allstep.submission.slurm_commands import jobs_of, submit
from allstep.version import __version__

USAGE = "allstep submit [options] [options of allstep run] [-m] script [args ...]"

DESCRIPTION = """\
Submit a Python script as a SLURM job: one `allstep run` on each node, or with --tasks-per-node a task for each rank.

The job stops in time for a last save, which it knows from how long its saves took, goes back into the queue, and goes
on from there, as long as it gets any further. The script saves with `allstep.Checkpoint` and stops with
`allstep.Preemption`. It runs a copy of the code as it is now, in RUNS/NAME/code.
"""

EPILOG = """\
exit code of the job:
  0   finished
  85  stopped and saved, and goes on by itself
  93  stopped, and not started again: its last starts got no further
  N   as of allstep run

examples:
  allstep submit --gpus-per-node 4 --cpus-per-task 32 --time 12:00:00 train.py --lr 0.1
  allstep submit --nodes 2-4 --gpus-per-node 8 --time 1-00 --partition gpu -m package.train
  allstep submit --array 0-7 --time 2:00:00 sweep.py
  allstep submit --dry-run --sbatch --account=lab --sbatch --qos=high train.py
"""

# Machines and their meeting place are SLURM's to say, and a job has no terminal.
_NOT_IN_A_JOB = {"nnodes", "node_rank", "rdzv", "debug_rank", "name", "runs", "env"}
_RUN_OPTIONS = tuple(option for option in RUN_OPTIONS if option.flag and option.name not in _NOT_IN_A_JOB)
_OWN_WITH_VALUE = frozenset(option.flag for option in OPTIONS if option.constant is None) | {"--config"}


@dataclass(frozen=True, slots=True)
class Submission:
    """What a command line asks for: the job as a script, and the code to copy for it; None with --live."""

    job: BatchJob
    code: SubmittedCode | None
    left: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    """Run the command with these arguments and return the exit code."""
    change_to_active_environment(["submit", *argv])
    parser = _parser(secret_values(argv, os.environ))
    own, rest = split_command(argv, _OWN_WITH_VALUE | RUN_OPTIONS_WITH_VALUE)
    given = vars(parser.parse_args(_joined(own)))
    if not rest:
        parser.error(f"{'a module' if given.get('module') else 'a script'} to run is missing")
    submission = prepare(given, rest, argv)
    text = batch_script(submission.job)
    if given.get("dry_run"):
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        return 0
    number = _submit(submission, text)
    log = "slurm-%A_%a.log" if submission.job.request.array else "slurm-%j.log"
    log = log.replace("%j", number).replace("%A", number).replace("%a", "MEMBER")
    print(f"job {number} submitted; its log: {submission.job.folder / log}", flush=True)
    return 0


def prepare(given: dict[str, Any], rest: Sequence[str], argv: Sequence[str]) -> Submission:
    """Work out what is to be submitted, and change nothing.

    Args:
        given: the options, as `_parser` reads them.
        rest: the script or module, and its arguments.
        argv: the whole command line.

    Raises:
        ConfigurationError: an option or the file is wrong.
        SubmissionError: there is no such script, or the code cannot be copied.
    """
    fields = {option.name for option in OPTIONS}
    from_file, says_run = _from_file(given["config"]) if "config" in given else ({}, False)
    request = JobRequest(**{**from_file, **{name: value for name, value in given.items() if name in fields}})
    request = with_shell_defaults(request, os.environ)
    run_options = [*(["--config"] if says_run else []), *given.get("run_options", [])]
    if request.runs_script and run_options:
        raise ConfigurationError(
            f"{run_options[0].partition('=')[0]} is an option of allstep run, which {request.runs_script} does "
            "without; leave one of the two out"
        )
    module = bool(given.get("module"))
    runs = Path(request.runs).absolute()
    name = request.name or _free_name(runs, default_name(rest[0], time.strftime("%Y%m%d-%H%M%S")))
    folder = runs / name
    script = Path(rest[0]).absolute()
    if not module and not script.exists():
        raise SubmissionError(f"there is no script {rest[0]}; the options of the job go before its name")
    env = carried(os.environ, request.env)
    code = None if request.live else find_code(Path.cwd() if module else _real_folder(script), runs)
    if says_run:
        config = Path(os.path.realpath(given["config"]))
        run_options[0] = f"--config={config if code is None else code.moved_file(config, folder / 'code')}"
    target: str = rest[0] if module else str(script)
    python_path: list[str] = []
    if code is not None:
        # As Python would look: from the working folder for a module, from the script's own folder else.
        looked_in = [os.getcwd(), *sys.path] if module else list(sys.path[1:])
        python_path = code.python_path(looked_in, folder / "code")
        if not module:
            target = str(code.moved_file(Path(os.path.realpath(script)), folder / "code"))
    workdir = Path(request.chdir).absolute() if request.chdir else None
    if workdir is None and request.array is None:
        workdir = Path.cwd()
    job = BatchJob(
        request=replace(request, name=name),
        folder=folder,
        python=sys.executable,
        target=target,
        arguments=tuple(rest[1:]),
        module=module,
        workdir=workdir,
        exports=env.exports,
        through_slurm=env.through_slurm,
        python_path=python_path,
        run_options=run_options,
        submitted=("allstep", "submit", *_without_dry_run(argv, rest)),
    )
    return Submission(job, code, env.left)


def _submit(submission: Submission, text: str) -> str:
    """Make the job's folder and give its script to SLURM; where that fails the new folder is gone again."""
    folder, code = submission.job.folder, submission.code
    is_new = not folder.exists()
    # A job that waits still runs the script that is there, and two jobs would count as one.
    if not is_new and (jobs := jobs_of(folder / "job.sh", folder.name)):
        raise SubmissionError(
            f"job {jobs[0]} of this name is in the queue, and runs from {folder}; give another --name, or cancel it "
            "first"
        )
    try:
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        if code is not None:
            if (folder / "code").exists():
                raise SubmissionError(
                    f"{folder / 'code'} is there already: the copy of an earlier submission, which may still run; give "
                    "another --name, or --live, or remove it"
                )
            copy_code(code, folder / "code")
            (folder / "submitted.diff").write_bytes(code.diff)
        script = folder / "job.sh"
        script.touch(mode=0o600)
        script.write_bytes(text.encode("utf-8", "surrogateescape"))
        number = submit(script)
        (folder / "submission.json").write_text(json.dumps(_facts(submission, number), indent=1) + "\n")
    except (OSError, SubmissionError) as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise SubmissionError(f"the job's folder {folder} cannot be written: {error}; give --runs") from error
        raise
    return number


def _facts(submission: Submission, number: str) -> dict[str, Any]:
    job, code = submission.job, submission.code
    return {
        "job": number,
        "array": job.request.array or "",
        "command": masked_arguments(job.submitted),
        "from": os.getcwd(),
        "python": job.python,
        "allstep": __version__,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": None if code is None else str(code.root),
        "commit": "" if code is None else code.commit,
        "variables_left_behind": list(submission.left),
    }


def _free_name(runs: Path, name: str) -> str:
    """A name that was made up, with a number at its end where jobs were submitted within one second.

    The number is set off by _, since a member of an array has a folder of its own behind -.
    """
    free, number = name, 1
    while (runs / free).exists():
        number += 1
        free = f"{name}_{number}"
    return free


def _without_dry_run(argv: Sequence[str], rest: Sequence[str]) -> list[str]:
    """The command line as it is where the job is submitted, so that both write the same script."""
    ours = len(argv) - len(rest)
    return [token for index, token in enumerate(argv) if index >= ours or token != "--dry-run"]


def _real_folder(script: Path) -> Path:
    real = Path(os.path.realpath(script))
    return real if real.is_dir() else real.parent


def _from_file(path: str) -> tuple[dict[str, Any], bool]:
    """The fields of the `submit` part, and whether the rest of the file has something for `allstep run`."""
    from allstep.launch.config_file import load_section, load_settings

    section = load_section(Path(path), "submit")
    settings = load_settings(Path(path))
    LaunchSettings(**settings)
    if present := sorted(_NOT_IN_A_JOB & settings.keys() - {"env"}):
        raise ConfigurationError(f"{path}: {present[0]} is not for a job; say it under submit, or leave it out")
    return request_from_mapping(section, path), bool(settings)


def _joined(tokens: Sequence[str]) -> list[str]:
    """The tokens, with `--sbatch --qos=high` as one, since argparse takes the second for an option."""
    joined: list[str] = []
    for token in tokens:
        if joined and joined[-1] == "--sbatch":
            joined[-1] = f"--sbatch={token}"
        else:
            joined.append(token)
    return joined


class _RunOption(argparse.Action):
    """Checks an option of `allstep run` and keeps it as it was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        words = [option_string] if self.nargs == 0 else [f"{option_string}={values}"]
        namespace.run_options = [*getattr(namespace, "run_options", []), *words]


def _parser(secrets: frozenset[str]) -> Parser:
    parser = Parser(
        secrets=secrets,
        prog="allstep submit",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")
    parser.add_argument("-m", dest="module", action="store_true", help="script is the name of a module")
    parser.add_argument("--config", metavar="FILE", help="YAML file: these options under `submit`, those of run beside")
    for option in OPTIONS:
        add_option(parser, option, of_lists="extend")
    run = parser.add_argument_group("options of allstep run, for each node")
    for option in _RUN_OPTIONS:
        if option.constant is not None:
            run.add_argument(option.flag, dest=f"run_{option.name}", action=_RunOption, nargs=0, help=option.help)
        else:
            run.add_argument(
                option.flag,
                dest=f"run_{option.name}",
                action=_RunOption,
                type=_checked(option),
                metavar=option.metavar,
                help=option.help,
            )
        parser.options.append(option.flag)
    return parser


def _checked(option: Option) -> Callable[[str], str]:
    read = option_reader(option)

    def text(given: str) -> str:
        read(given)
        return given

    return text
