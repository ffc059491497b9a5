"""What a worker does in a Python that lacks a name which is not documented."""

from __future__ import annotations

import atexit
import threading
from pathlib import Path

import pytest

from allstep.launch import interpreter
from tests.jobs.launchers import script
from tests.jobs.running import run


def without(folder: Path, module: str, name: str) -> dict[str, str]:
    """The environment of workers whose interpreter has no such name."""
    text = f"import os, {module}\nif 'RANK' in os.environ:\n    del {module}.{name}\n"
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(text)
    return {"PYTHONPATH": str(folder / "site")}


@pytest.mark.parametrize("kind", ["module", "folder"])
def test_without_runpys_own_function_a_module_runs_with_one_warning(kind: str, tmp_path: Path) -> None:
    env = without(tmp_path, "runpy", "_run_module_as_main")
    target = "package.train" if kind == "module" else "package"
    script(tmp_path, "print(__name__, sys.argv[1:])", "package/train.py" if kind == "module" else "package/__main__.py")
    result = run(tmp_path, *(["-m"] if kind == "module" else []), target, "-x", env=env)
    assert (result.code, result.out) == (0, "__main__ ['-x']\n"), result.err
    assert result.err.count("allstep: warning: this Python has no runpy._run_module_as_main") == 1


def test_without_the_exit_functions_a_script_that_raises_ends_as_in_python(tmp_path: Path) -> None:
    env = without(tmp_path, "atexit", "_run_exitfuncs")
    text = "import atexit\natexit.register(print, 'handler')\nraise ValueError('bad')"
    result = run(tmp_path, script(tmp_path, text), env=env)
    assert (result.code, result.out) == (1, "handler\n")
    (log,) = tmp_path.glob("runs/*/attempt_0/rank_0.log")  # the report on the terminal says it all once more
    assert log.read_text().count("allstep: warning: this Python has no") == 1
    assert "ValueError: bad" in log.read_text()
    assert "AttributeError" not in log.read_text()


@pytest.mark.parametrize(("module", "name"), [(threading, "_shutdown"), (atexit, "_run_exitfuncs")])
def test_neither_name_is_used_where_the_other_is_missing(
    module: object, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "_shutdown", pytest.fail)
    monkeypatch.setattr(atexit, "_run_exitfuncs", pytest.fail)
    monkeypatch.delattr(module, name)
    monkeypatch.setattr(interpreter, "_said", set())
    assert not interpreter.finish_threads_and_handlers()
    assert not interpreter.finish_threads_and_handlers()
    assert capsys.readouterr().err.count("allstep: warning") == 1
