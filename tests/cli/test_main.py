"""The command line as a whole: help, version, errors, and what is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from allstep.cli.main import main
from allstep.version import __version__
from tests.jobs.launchers import environment, script
from tests.jobs.running import run


def python(folder: Path, code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


HEAVY = "[name for name in ('torch', 'numpy', 'pydantic', 'yaml') if name in sys.modules]"


def test_the_parent_of_a_run_imports_neither_torch_nor_numpy_nor_yaml(tmp_path: Path) -> None:
    script(tmp_path, "")
    code = f"import sys; from allstep.cli.main import main; print(main(['run', '--nproc', '2', 'script.py']), {HEAVY})"
    assert python(tmp_path, code) == "0 []\n"


def test_with_a_configuration_the_parent_still_imports_no_torch(tmp_path: Path) -> None:
    script(tmp_path, "")
    (tmp_path / "c.yaml").write_text("nproc: 2\n")
    call = "main(['run', '--config', 'c.yaml', 'script.py'])"
    code = f"import sys; from allstep.cli.main import main; {call}; print({HEAVY})"
    assert python(tmp_path, code) == "['yaml']\n"


def test_importing_allstep_alone_imports_no_torch(tmp_path: Path) -> None:
    assert python(tmp_path, f"import sys, allstep; print(allstep.__version__, {HEAVY})") == f"{__version__} []\n"


@pytest.mark.parametrize(
    "command", [["-m", "allstep"], ["-c", "from allstep.cli.main import main; raise SystemExit(main())"]]
)
def test_the_module_and_the_command_say_their_version(command: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, *command, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"allstep {__version__}\n")


def test_help_names_the_commands_and_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "run          start a script on every device of this machine" in capsys.readouterr().out
    assert main(["run", "--help"]) == 0
    said = capsys.readouterr().out
    for option in ("--nproc", "--config", "--name", "--runs", "--show", "--env", "--grace", "-m", "exit code:"):
        assert option in said


def test_a_worker_that_cannot_be_started_is_one_line_and_exits_with_two(tmp_path: Path) -> None:
    script(tmp_path, "")
    code = (
        "import sys; from allstep.cli.main import main; sys.executable = '/absent/python'; sys.stderr = sys.stdout; "
        "print(main(['run', '--nproc', '2', 'script.py']))"
    )
    assert python(tmp_path, code) == (
        "allstep: error: rank 0 of 2 could not be started: [Errno 2] No such file or directory: '/absent/python'\n2\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "commands:"),
        (["walk"], "walk"),
        (["run"], "a script to run is missing"),
        (["run", "-m"], "a module to run is missing"),
        (["run", "--nproc"], "--nproc: expected one argument"),
        (["run", "--nproc", "0", "x.py"], "nproc is 0; it must be 1 or more"),
        (["run", "--nproc", "two", "x.py"], "nproc is 'two'"),
        (["run", "--speed", "x.py"], "--speed"),
        (["run", "--nam", "exp", "x.py"], "--nam"),
        (["run", "--env", "RANK=1", "x.py"], "the launcher sets RANK itself"),
        (["run", "--show", "some", "x.py"], "show is 'some'"),
        (["run", "--grace", "-1", "x.py"], "grace is -1.0"),
        (["run", "--name", "a/b", "x.py"], "name is 'a/b'"),
        (["run", "absent.py"], "allstep: error: script absent.py does not exist"),
        (["run", "--config", "absent.yaml", "x.py"], "allstep: error: absent.yaml cannot be read"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_explained_without_a_traceback(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_standard_descriptor_that_nobody_gave_goes_nowhere(closed: str, tmp_path: Path) -> None:
    script(tmp_path, "open(f'ran_{rank}', 'w').write('x')\nprint('words')\nprint('more', file=sys.stderr)")
    line = f"exec {sys.executable} -m allstep run --nproc 2 script.py {closed}"
    done = run(tmp_path, command=["sh", "-c", line])
    assert done.code == 0
    assert {path.name for path in tmp_path.glob("ran_*")} == {"ran_0", "ran_1"}
