"""A worker's script runs as it would under plain python."""

from __future__ import annotations

import os
import py_compile
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.job import Job
from tests.jobs.launchers import script
from tests.jobs.running import run

SAY_ALL = """
import json
main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv,
    "orig_argv": sys.orig_argv,
    "path": sys.path,
    "file": __file__,
    "name": __name__,
    "spec": getattr(__spec__, "name", None),
    "package": __package__,
    "doc": __doc__,
    "globals": sorted(globals()),
    "main is this": vars(main) is globals(),
    "loader": type(__loader__).__name__,
    "annotations": __annotations__ if sys.version_info < (3, 14) else None,
    "torch": "torch" in sys.modules,
    "allstep": "allstep" in sys.modules,
}))
"""


def plain(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> Job:
    return run(folder, *arguments, command=[sys.executable], env=(env or {}) | {"RANK": "0"})


BY_NIGHT = (
    *("deep/script.py x", "link.py", "link/../folder", "./deep/../script.py", "compiled_without_a_suffix"),
    *("archive.zip", "-m package"),
)


@pytest.mark.parametrize(
    "command",
    [
        ["script.py"],
        ["script.py", "--nproc", "3", "-m", "--", "--help", ""],
        ["link/../script.py"],
        ["__pycache__/compiled.pyc"],
        ["folder", "x"],
        ["-m", "package.module", "-m", "x"],
        *(pytest.param(command.split(), marks=pytest.mark.nightly) for command in BY_NIGHT),
    ],
    ids=" ".join,
)
def test_argv_path_and_main_are_what_plain_python_gives(command: list[str], tmp_path: Path) -> None:
    for name in ("script.py", "deep/script.py", "folder/__main__.py", "package/module.py", "package/__main__.py"):
        script(tmp_path, SAY_ALL, name)
    (tmp_path / "package/__init__.py").touch()
    (tmp_path / "link.py").symlink_to("deep/script.py")
    # The kernel takes `link/..` for `elsewhere`, where other files are.
    (tmp_path / "elsewhere/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/inner")
    for name in ("elsewhere/script.py", "elsewhere/folder/__main__.py"):
        script(tmp_path, SAY_ALL + "print('elsewhere')", name)
    for name in ("__pycache__/compiled.pyc", "compiled_without_a_suffix"):
        py_compile.compile(str(tmp_path / "script.py"), str(tmp_path / name), dfile="script.py")
    subprocess.run(
        [sys.executable, "-m", "zipfile", "-c", "../archive.zip", "__main__.py"], cwd=tmp_path / "folder", check=True
    )
    expected = plain(tmp_path, *command)
    assert expected.code == 0, expected.err
    assert run(tmp_path, "--nproc", "1", *command).out == expected.out


def test_the_current_folder_is_not_searched_for_what_the_bootstrap_needs(tmp_path: Path) -> None:
    for name in ("runpy.py", "contextlib.py", "select.py", "allstep.py", "deep/signal.py"):
        script(tmp_path, "raise SystemExit('wrong module')", name)
    script(tmp_path, "print('right')", "deep/script.py")
    result = run(tmp_path, "deep/script.py", command=[Path(sys.executable).with_name("allstep"), "run"])
    assert (result.code, result.out) == (0, "right\n"), result.err


def test_safe_path_is_respected(tmp_path: Path) -> None:
    script(tmp_path, SAY_ALL)
    env = {"PYTHONSAFEPATH": "1"}
    assert run(tmp_path, "script.py", env=env).out == plain(tmp_path, "script.py", env=env).out


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def f():\n    raise ValueError('bad')\nf()", 1),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise KeyError('x')", 1),
        ("sys.exit(7)", 7),
        ("sys.exit('words')", 1),
        ("sys.exit()", 0),
        ("raise KeyboardInterrupt", -2),
        ("def hook(*error):\n    print('hooked', error[0], error[2].tb_lineno)\nsys.excepthook = hook\nint('x')", 1),
        ("import atexit; atexit.register(print, 'at exit'); raise OSError('x')", 1),
        ("import threading; threading.Thread(target=lambda: print('thread done')).start()", 0),
    ],
    ids=range(9),
)
def test_an_end_is_told_as_plain_python_tells_it(text: str, code: int, tmp_path: Path) -> None:
    script(tmp_path, text)
    expected = plain(tmp_path, "script.py")
    result = run(tmp_path, "script.py")
    said = result.err.partition("\n")[2].partition("allstep: ")[0]
    assert expected.code == code
    assert (result.out, said) == (expected.out, expected.err)
    assert result.code == (code if code >= 0 else 128 - code)


def test_an_exception_ends_the_process_after_threads_exit_handlers_and_output(tmp_path: Path) -> None:
    text = """
import atexit, threading, time

class Lingers:
    def __del__(self):  # while the interpreter takes itself apart
        print("taken apart")

def work():
    time.sleep(0.3)
    print("the thread is done")

lingers = Lingers()
atexit.register(lambda: print("exit handlers saw", repr(sys.last_value), end=""))
threading.Thread(target=work).start()
raise ValueError("bad batch")
"""
    job = run(tmp_path, str(script(tmp_path, text)), env={"PYTHONUNBUFFERED": ""})
    assert job.code == 1
    assert job.out == "the thread is done\nexit handlers saw ValueError('bad batch')"


def test_a_module_that_is_not_there_is_told_as_plain_python_tells_it(tmp_path: Path) -> None:
    result = run(tmp_path, "-m", "absent.module")
    assert result.code == 1
    assert plain(tmp_path, "-m", "absent.module").err in result.err


@pytest.mark.parametrize(
    ("module", "method"),
    [
        (False, "fork"),
        (True, "spawn"),
        (False, "forkserver"),
        *(pytest.param(*each, marks=pytest.mark.nightly) for each in ((True, "fork"), (False, "spawn"))),
        pytest.param(True, "forkserver", marks=pytest.mark.nightly),
    ],
)
def test_a_script_can_start_processes_of_its_own(method: str, module: bool, tmp_path: Path) -> None:
    script(
        tmp_path,
        f"""
import multiprocessing
class Item:
    pass
def work(item):
    return type(item).__name__, os.getpid()
if __name__ == "__main__":
    with multiprocessing.get_context({method!r}).Pool(1) as pool:
        name, pid = pool.apply(work, (Item(),))
        print(name, pid != os.getpid())
""",
    )
    result = run(
        tmp_path, "--nproc", "2", *(["-m", "script"] if module else ["script.py"]), env={"PYTHONWARNINGS": "error"}
    )
    assert (result.code, sorted(result.out.splitlines())) == (0, ["[0] Item True", "[1] Item True"]), result.err


def test_a_crash_in_native_code_leaves_a_python_stack(tmp_path: Path) -> None:
    script(tmp_path, "import ctypes\ndef crash():\n    ctypes.string_at(0)\ncrash()")
    result = run(tmp_path, "script.py")
    assert result.code == 139
    assert "killed by SIGSEGV (exit code 139)" in result.err
    assert re.search(r"    Fatal Python error: Segmentation fault(.|\n)*line \d+ in crash", result.err)


def test_where_the_kernel_cannot_tie_processes_a_thread_ends_the_group(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import signal\nfrom allstep.launch import worker\n"
        "worker._die_with_parent = worker._kill_group_on_close = lambda *_: False\n"
        "worker.tie_to_supervisor(os.getppid(), int(sys.argv[1]))\n"
        "os.fork()\nos.write(1, b'.')\nsignal.pause()\n",
    )
    read_end, write_end = os.pipe()
    with subprocess.Popen(
        [sys.executable, "script.py", str(read_end)],
        cwd=tmp_path,
        pass_fds=(read_end,),
        start_new_session=True,
        stdout=subprocess.PIPE,
    ) as process:
        os.close(read_end)
        assert process.stdout is not None
        assert process.stdout.read(2) == b".."  # both run
        os.close(write_end)
        assert process.wait(60) == -9
        assert process.stdout.read() == b""  # the child that shares the pipe is gone too


def test_a_worker_whose_supervisor_is_gone_before_it_is_tied_leaves(tmp_path: Path) -> None:
    bootstrap = Path(__file__).parents[2] / "src/allstep/launch/worker.py"
    target = script(tmp_path, "print('ran')")
    read_end, write_end = os.pipe()
    try:
        result = subprocess.run(
            [sys.executable, bootstrap, "999999999", str(read_end), "script", target],
            pass_fds=(read_end,),
            start_new_session=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(read_end)
        os.close(write_end)
    assert (result.returncode, result.stdout) == (-9, b"")


def test_importing_torch_leaves_collector_and_import_system_as_they_were(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import gc\nfinders = len(sys.meta_path)\nimport torch, torch._dynamo\n"
        "print(torch.seen, torch._dynamo.seen, gc.isenabled(), finders - len(sys.meta_path), vars(torch.__loader__))\n",
    )
    script(tmp_path, "import gc\nseen = gc.isenabled()\n", "torch/__init__.py")
    script(tmp_path, "import gc\nseen = gc.isenabled()\n", "torch/_dynamo.py")
    result = run(tmp_path, "script.py")
    path = tmp_path / "torch/__init__.py"
    assert result.out == f"False False True 1 {{'name': 'torch', 'path': '{path}'}}\n", result.err


def test_an_import_of_torch_that_fails_is_told_as_plain_python_tells_it(tmp_path: Path) -> None:
    script(tmp_path, "import torch")
    script(tmp_path, "import gc\nraise OSError('libtorch.so is missing')\n", "torch/__init__.py")
    said = run(tmp_path, "script.py").err
    assert plain(tmp_path, "script.py").err in said
