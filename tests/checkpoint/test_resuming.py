"""What to resume from: the script's word before the command line's, and what a restart makes of the latter."""

from __future__ import annotations

import pytest

from allstep.checkpoint.schedule import asked_for, launches_of, overruled, restarts_of


@pytest.mark.parametrize(
    ("script", "command_line", "taken", "ignored"),
    [
        ("auto", None, "auto", None),
        ("auto", "", "auto", None),
        ("auto", "auto", "auto", None),
        ("auto", "none", "none", None),
        ("auto", "runs/a", "runs/a", None),
        ("runs/b", None, "runs/b", None),
        ("runs/b", "auto", "runs/b", None),
        ("runs/b", "runs/a", "runs/b", "runs/a"),
        ("runs/b", "none", "runs/b", "none"),
        ("none", "runs/a", "none", "runs/a"),
        ("none", "none", "none", None),
    ],
)
def test_a_place_that_the_script_names_wins_and_what_it_overrules_is_known(
    script: str, command_line: str | None, taken: str, ignored: str | None
) -> None:
    environ = {} if command_line is None else {"ALLSTEP_RESUME": command_line}
    assert asked_for(script, environ) == taken
    assert overruled(script, environ) == ignored


@pytest.mark.parametrize(
    ("environ", "launches", "restarts"),
    [
        ({}, [], []),
        ({"ALLSTEP_LAUNCH": "ab", "TORCHELASTIC_RUN_ID": "exp"}, ["allstep-ab"], ["allstep-ab"]),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, [], []),
        ({"TORCHELASTIC_RUN_ID": "u", "TORCHELASTIC_RESTART_COUNT": "0"}, ["torchrun-u"], []),
        ({"TORCHELASTIC_RUN_ID": "u", "TORCHELASTIC_RESTART_COUNT": "1"}, ["torchrun-u"], ["torchrun-u"]),
        ({"SLURM_JOB_ID": "7"}, ["slurm-7"], []),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}, ["slurm-7"], []),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, ["slurm-7"], ["slurm-7"]),
        (
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "ALLSTEP_LAUNCH": "ab"},
            ["allstep-ab", "slurm-7"],
            ["allstep-ab", "slurm-7"],
        ),
    ],
)
def test_only_restarts_of_a_launch_are_the_same_run(
    environ: dict[str, str], launches: list[str], restarts: list[str]
) -> None:
    assert (launches_of(environ), restarts_of(environ)) == (launches, restarts)
