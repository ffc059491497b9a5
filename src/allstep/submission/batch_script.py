"""The batch script of a job: a pure function of a `BatchJob`, so that `--dry-run` shows what would run.

Contract: `batch_script` gives a script that bash runs whatever is in the arguments, the folders and the variables:
quotes, spaces, line ends, any bytes. It has three parts: what SLURM is asked for (`#SBATCH`), the environment, and one
command, which is `allstep.submission.batch_process` around an `srun`.

How many tasks: one `allstep run` on each node by default, and with `tasks_per_node` or `tasks_per_gpu` the script
itself, a task for each rank, with as many threads as it has cores. A failed task ends its peers there
(`--kill-on-bad-exit`). Under `allstep run` the nodes do that for each other, and SLURM's way would end nodes that are
still writing their last words.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from allstep.errors import printable
from allstep.protocol.masking import masked_arguments
from allstep.protocol.save_record import SAVES
from allstep.run_record.run_folders import FOLDER
from allstep.submission.request import JobRequest

MEMBER = "ALLSTEP_ARRAY_MEMBER"  # as in allstep.world.seed, which loads torch

_LINE = 88  # columns after which a command goes on in the next line


@dataclass(frozen=True, slots=True)
class BatchJob:
    """All that a batch script says.

    Args:
        request: what SLURM is asked for.
        folder: RUNS/NAME, absolute.
        python: the interpreter.
        target: the script's path in the copy of the code, or a module's name.
        arguments: of the script.
        module: whether the target is a module.
        workdir: where the job works; None for a folder of each array member's own.
        exports: variables to set.
        through_slurm: variables whose values SLURM carries.
        python_path: folders of the code that are looked in before any other.
        run_options: of `allstep run`, as on its command line.
        submitted: the command line that a person gave, for the script's first line.
    """

    request: JobRequest
    folder: Path
    python: str
    target: str
    arguments: Sequence[str] = ()
    module: bool = False
    workdir: Path | None = None
    exports: Mapping[str, str] = field(default_factory=dict)
    through_slurm: Sequence[str] = ()
    python_path: Sequence[str] = ()
    run_options: Sequence[str] = ()
    submitted: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Of the run."""
        return self.folder.name


def batch_script(job: BatchJob) -> str:
    """The text to give to sbatch."""
    parts = [*_head(job), "", *_environment(job), "", *_command(job)]
    return "\n".join(parts) + "\n"


def _head(job: BatchJob) -> list[str]:
    request = job.request
    log = "slurm-%A_%a.log" if request.array else "slurm-%j.log"
    tasks = request.tasks_per_node or 1
    cores = tasks * (request.cpus_per_task or 1)
    asked = {
        "job-name": job.name,
        "nodes": request.nodes,
        # Told how many tasks a node has, SLURM takes the least of a range, which is enough for them.
        "ntasks-per-node": None if request.is_range or request.tasks_per_gpu else str(tasks),
        "mincpus": str(cores) if request.is_range and cores > 1 else None,
        "gpus-per-node": request.gpus_per_node,
        "gpus": request.gpus,
        "gpus-per-task": request.gpus_per_task,
        "ntasks-per-gpu": None if request.tasks_per_gpu is None else str(request.tasks_per_gpu),
        "cpus-per-task": None if request.cpus_per_task is None else str(request.cpus_per_task),
        "time": request.time,
        "partition": request.partition,
        "array": request.array,
        "dependency": ",".join(f"afterok:{each}" for each in request.after) or None,
        # A % begins a pattern of sbatch's.
        "output": f"{str(job.folder).replace('%', '%%')}/{log}",
    }
    lines = [
        "#!/bin/bash",
        f"# {printable(shlex.join(masked_arguments(job.submitted)))}",
        *(f"#SBATCH --{name}={_directive(value)}" for name, value in asked.items() if value is not None),
        *(f"#SBATCH {_option(each)}" for each in request.sbatch),
        "# The job goes on in the same log after it was requeued.",
        "#SBATCH --open-mode=append",
    ]
    if request.chain:
        lines += ["# The job goes on in a new one, so this one is never started again.", "#SBATCH --no-requeue"]
    else:
        lines += ["#SBATCH --requeue"]
    return [
        *lines,
        "# Before the end of the job's time the command below says so itself, in time for a save. This is for a",
        "# preemption that SLURM announces; at the end of the time it comes in the last minute.",
        "#SBATCH --signal=B:USR1@1",
        "# The job gets nothing of the shell that submitted it but what stands below.",
        f"#SBATCH --export={','.join(job.through_slurm) or 'NIL'}",
    ]


def _environment(job: BatchJob) -> list[str]:
    lines = ["trap '' USR1  # a notice that comes before the command below listens would end this script"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.exports.items()]
    if job.python_path:
        first = ":".join(job.python_path)
        lines += [
            "# The code as it was submitted, before what is installed.",
            f"export PYTHONPATH={shlex.quote(first)}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]
    if job.module and job.python_path:
        lines.append("export PYTHONSAFEPATH=1  # else python -m would look in the working folder first")
    if job.request.runs_script and job.request.cpus_per_task and "OMP_NUM_THREADS" not in job.exports:
        lines.append(
            f"export OMP_NUM_THREADS={job.request.cpus_per_task}  # a task would start one for each core it sees"
        )
    lines.append("export SLURM_EXPORT_ENV=ALL  # srun hands all of this to its tasks")
    if job.request.array:
        lines += [
            "# Each member has its own folder, and its own seed in place of the script's.",
            f'folder={shlex.quote(str(job.folder))}-"$SLURM_ARRAY_TASK_ID"',
            # A person may have it empty, for the same seed in all members.
            *([] if MEMBER in job.exports else [f'export {MEMBER}="$SLURM_ARRAY_TASK_ID"']),
        ]
    else:
        lines.append(f"folder={shlex.quote(str(job.folder))}")
    lines += [f'export {SAVES}="$folder/saves.jsonl"']
    if job.request.tasks_per_node is not None:  # else each `allstep run` is told its folder
        lines += [f'export {FOLDER}="$folder"']
    if job.workdir is None:
        lines += ['mkdir -p -m 700 "$folder" && cd "$folder" || exit 1']
    else:
        lines += ['mkdir -p -m 700 "$folder" || exit 1', f"cd {shlex.quote(str(job.workdir))} || exit 1"]
    return lines


def _command(job: BatchJob) -> list[str]:
    """One command, over several lines; what is not quoted here is meant for bash."""
    request = job.request
    script = f"{shlex.quote(str(job.folder))}/job.sh"
    ours = ['--folder="$folder"', f"--script={script}", f"--margin={request.margin:g}"]
    ours += ["--chain"] if request.chain else []
    srun = [
        "srun",
        '--nodes="$SLURM_JOB_NUM_NODES"',
        f"--ntasks-per-gpu={request.tasks_per_gpu}"
        if request.tasks_per_gpu
        else f"--ntasks-per-node={request.tasks_per_node or 1}",
        *([f"--gpus-per-task={request.gpus_per_task}"] if request.gpus_per_task else []),
        *([f"--cpus-per-task={request.cpus_per_task}"] if request.cpus_per_task else []),
        f"--kill-on-bad-exit={1 if request.runs_script else 0}",
    ]
    python = shlex.quote(job.python)
    target = (["-m"] if job.module else []) + [job.target]
    if request.runs_script is None:
        name = shlex.quote(job.name) + ('-"$SLURM_ARRAY_TASK_ID"' if request.array else "")
        runs = shlex.quote(str(job.folder.parent))
        given = list(map(shlex.quote, job.run_options))
        task = [python, "-P", "-m", "allstep", "run", f"--name={name}", f"--runs={runs}", *given]
    else:
        task = [python, "-u"]
    return [
        "# Says when the job has to stop, and requeues it where it was stopped.",
        *_folded(["exec", python, "-P", "-m", "allstep.submission.batch_process", *ours, "--"], goes_on=True),
        *_folded(srun, goes_on=True, indent=4),
        *_folded([*task, *map(shlex.quote, [*target, *job.arguments])], indent=8),
    ]


def _folded(words: Sequence[str], *, goes_on: bool = False, indent: int = 0) -> list[str]:
    """Words as lines of a command, each but the last with a backslash at its end."""
    lines: list[str] = [" " * indent + words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 1 > _LINE:
            lines.append(" " * (indent + 4) + word)
        else:
            lines[-1] += " " + word
    ends = [" \\"] * (len(lines) - 1) + [" \\" if goes_on else ""]
    return [line + end for line, end in zip(lines, ends, strict=True)]


def _directive(value: str) -> str:
    """A value in a line for sbatch, which reads double quotes, and a backslash before what they would end."""
    if not value or any(each in value for each in " \t\"'\\#"):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return value


def _option(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}={_directive(value)}" if equals else option
