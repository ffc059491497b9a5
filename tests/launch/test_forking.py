"""Workers that are forked after the imports that they share: as if each had been started by itself.

A module `torchmetrics` of the test's own stands in for what is imported; it notes who imports it in `imported`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.jobs.job import Job
from tests.jobs.launchers import script
from tests.jobs.processes import await_end, watch
from tests.jobs.running import run, started

pytestmark = pytest.mark.slow

STAY = "print('here', flush=True)\nimport signal\nsignal.pause()\n"


def module(folder: Path, text: str = "") -> dict[str, str]:
    """Write the module, and say where it is found."""
    (folder / "lib").mkdir()
    noting = f"import os\nopen({str(folder / 'imported')!r}, 'a').write(f\"{{os.environ.get('RANK')}}\\n\")\n"
    (folder / "lib/torchmetrics.py").write_text(noting + text)
    path = os.pathsep.join([str(folder / "lib"), str(Path(__file__).parents[2] / "src")])
    return {"PYTHONPATH": path}


def importers(folder: Path) -> list[str]:
    return sorted((folder / "imported").read_text().split())


SAY_ALL = """import torchmetrics
import json, numpy, random, signal
main = sys.modules["__main__"]
with open(f"said_{rank}.json", "w") as file:
    json.dump({
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "file": __file__,
        "main": sorted(vars(main)),
        "modules": sorted(set(sys.modules) - {"_json", "json", "json.decoder", "json.encoder", "json.scanner"}),
        "environment": {name: value for name, value in os.environ.items() if name not in UNLIKE},
        "descriptors": len(os.listdir("/proc/self/fd")),
        "leads": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "handlers": [type(signal.getsignal(number)).__name__ for number in (2, 10, 15)],
        "files": sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in (0, 1, 2)),
    }, file)
"""
UNLIKE = ("MASTER_PORT", "ALLSTEP_STORE_FD", "ALLSTEP_KEY", "ALLSTEP_CHANNEL", "ALLSTEP_LAUNCH", "TEST_JOB_MARK")


def said(folder: Path, env: dict[str, str], *options: str) -> list[dict[str, object]]:
    job = run(folder, "--nproc", "3", "--name", "x", *options, "--lr", "1", env=env)
    assert job.code == 0, job.err
    return [json.loads((folder / f"said_{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("target", [["script.py"], ["-m", "script"]], ids=" ".join)
def test_a_worker_is_what_it_would_be_if_it_had_been_started_by_itself(target: list[str], tmp_path: Path) -> None:
    env = module(tmp_path)
    script(tmp_path, SAY_ALL.replace("UNLIKE", repr(UNLIKE)))
    forked = said(tmp_path, env, *target)
    assert importers(tmp_path) == ["None"]
    shutil.rmtree(tmp_path / "runs")
    alone = said(tmp_path, env, "--no-shared-imports", *target)
    assert importers(tmp_path) == ["0", "1", "2", "None"]
    assert forked == alone


def test_workers_are_children_of_the_supervisor_and_only_they(tmp_path: Path) -> None:
    script(tmp_path, f"import torchmetrics\nprint('pid', os.getpid(), os.getppid())\n{STAY}")
    with started(tmp_path, "--nproc", "2", "script.py", env=module(tmp_path)) as running:
        lines = running.await_line("pid", 2)
        running.await_line("here", 2)
        assert {int(line.split()[-1]) for line in lines} == {running.process.pid}
        assert len(running.pids()) == 3
        watched = watch(running.pids()[1:])
        running.process.kill()
        await_end(watched)


def test_random_numbers_differ_as_those_of_separate_processes(tmp_path: Path) -> None:
    text = "import torchmetrics, numpy, random\nprint('drew', random.random(), numpy.random.rand())\n"
    env = module(tmp_path, "import numpy.random, random\n")
    job = run(tmp_path, "--nproc", "3", script(tmp_path, text), env=env)
    drawn = re.findall(r"drew (\S+) (\S+)", job.out)
    assert importers(tmp_path) == ["None"]
    assert [len(set(each)) for each in zip(*drawn, strict=True)] == [3, 3]


LEAVES = {
    "a thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n",
    "a descriptor": "file = open('/dev/null')\n",
    "an error": "raise OSError('libtorch.so is missing')\n",
    "its end": "if 'RANK' not in os.environ: os.kill(os.getpid(), 9)\n",
    "a process": "if 'RANK' not in os.environ:\n    import subprocess\n    subprocess.Popen(['sleep', '1000'], "
    "stdin=-3, stdout=-3, stderr=-3)\n",
    "its exit": "if 'RANK' not in os.environ: raise SystemExit(0)\n",
}


@pytest.mark.parametrize("left", LEAVES)
def test_imports_that_leave_what_cannot_be_shared_start_each_worker_by_itself(left: str, tmp_path: Path) -> None:
    env = module(tmp_path, LEAVES[left])
    script(tmp_path, "import torchmetrics\nprint('here')")
    job = run(tmp_path, "--nproc", "2", "script.py", env=env)
    assert importers(tmp_path) == ["0", "1", "None"]
    if left == "an error":
        assert job.code == 1
        assert "OSError: libtorch.so is missing" in job.err
        assert "template" not in job.err
    else:
        assert (job.code, sorted(job.out.splitlines())) == (0, ["[0] here", "[1] here"]), job.err


@pytest.mark.parametrize("name", ["torchmetrics.py", "colorsys.py", "calendar/__init__.py"])
def test_a_module_beside_the_script_is_the_scripts(name: str, tmp_path: Path) -> None:
    env = module(tmp_path, "import calendar, colorsys\n")
    script(tmp_path, f"import torchmetrics\nimport {name.split('.')[0].split('/')[0]} as mine\nprint(mine.__file__)")
    script(tmp_path, "", name)
    job = run(tmp_path, "--nproc", "2", "script.py", env=env)
    expected = [f"[{rank}] {tmp_path / name}" for rank in range(2)]
    assert (job.code, sorted(job.out.splitlines())) == (0, expected), job.err


def test_folders_beside_the_script_that_are_no_modules_do_not_matter(tmp_path: Path) -> None:
    env = module(tmp_path)
    (tmp_path / "torchmetrics").mkdir()
    run(tmp_path, "--nproc", "2", script(tmp_path, "import torchmetrics"), env=env)
    assert importers(tmp_path) == ["None"]


def test_a_template_that_ends_between_two_forks_leaves_no_process(tmp_path: Path) -> None:
    kills = """
forks = []
def fork():
    forks.append(1)
    if len(forks) == 3:  # the first is a trial
        os.kill(os.getpid(), 9)
if 'RANK' not in os.environ:
    os.register_at_fork(after_in_parent=fork)
"""
    text = """import torchmetrics
if rank == 0:  # the others stay until it has looked
    children = open(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read().split()
    states = [open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[0] for child in children]
    print(len(states), "children", states.count("Z"), "zombies", flush=True)
    open("looked", "w").close()
while not os.path.exists("looked"):
    pass
"""
    job = run(tmp_path, "--nproc", "3", script(tmp_path, text), env=module(tmp_path, kills))
    assert (job.code, sorted(job.out.splitlines())) == (0, ["[0] 3 children 0 zombies"]), job.err
    assert importers(tmp_path) == ["0", "1", "2", "None"]


def test_what_an_import_writes_is_written_once(tmp_path: Path) -> None:
    env = module(tmp_path, "print('welcome', os.environ.get('RANK'))\n") | {"PYTHONUNBUFFERED": ""}
    job = run(tmp_path, "--nproc", "2", script(tmp_path, "import torchmetrics"), env=env)
    assert job.out == "[0] welcome None\n"


SLOW = "import signal\nif 'RANK' not in os.environ:\n    print('importing', flush=True)\n    signal.sigwait([12])\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_stop_during_the_import_ends_the_run(number: signal.Signals, code: int, tmp_path: Path) -> None:
    script(tmp_path, "import torchmetrics")
    with started(tmp_path, "--nproc", "2", "--grace", "1000", "script.py", env=module(tmp_path, SLOW)) as running:
        running.await_line("importing")
        running.process.send_signal(number)
        job = running.end()
    assert job.code == code
    assert job.err.endswith(f"allstep: stopped by {number.name}\n")


def test_a_supervisor_that_is_killed_during_the_import_leaves_nobody(tmp_path: Path) -> None:
    script(tmp_path, "import torchmetrics")
    with started(tmp_path, "--nproc", "2", "script.py", env=module(tmp_path, SLOW)) as running:
        running.await_line("importing")
        watched = watch(running.pids())
        assert len(watched) == 2
        running.process.kill()
        await_end(watched)


def test_a_notice_during_the_import_reaches_the_workers(tmp_path: Path) -> None:
    text = "import torchmetrics\nimport signal\nprint(signal.getsignal(signal.SIGUSR1).received)\n"
    waits = "import time\nif 'RANK' not in os.environ:\n    print('importing', flush=True)\n    open('fifo').read()\n"
    text = text.replace("print(", "while not signal.getsignal(signal.SIGUSR1).received:\n    pass\nprint(")
    os.mkfifo(tmp_path / "fifo")
    script(tmp_path, text)
    with started(tmp_path, "--nproc", "2", "script.py", env=module(tmp_path, waits)) as running:
        running.await_line("importing")
        running.process.send_signal(signal.SIGUSR1)
        with (tmp_path / "fifo").open("w"):
            pass
        job = running.end()
    assert (job.code, sorted(job.out.splitlines())) == (0, ["[0] [10]", "[0] importing", "[1] [10]"]), job.err


def test_each_attempt_is_forked_from_a_template_of_its_own(tmp_path: Path) -> None:
    text = "import torchmetrics\nif rank == 1 and os.environ['ALLSTEP_ATTEMPT'] < '3':\n    raise ValueError('bad')\n"
    env = module(tmp_path)
    job: Job = run(
        tmp_path,
        "--nproc",
        "2",
        "--max-restarts",
        "3",
        "--stop-after",
        "9",
        script(tmp_path, text + "print('done')"),
        env=env,
    )
    assert job.code == 0, job.err
    assert "ValueError: bad" in job.err
    assert importers(tmp_path) == ["None"] * 4


def test_an_exception_is_told_as_that_of_a_worker_started_by_itself(tmp_path: Path) -> None:
    script(tmp_path, "import torchmetrics\ndef f():\n    raise ValueError('bad')\nif rank == 1:\n    f()\n")
    env = module(tmp_path)
    one, two = (
        run(tmp_path, "--nproc", "2", *option, "script.py", env=env) for option in ([], ["--no-shared-imports"])
    )
    told = [[line for line in job.err.splitlines() if line.startswith("[1] ")] for job in (one, two)]
    assert told[0] == told[1]
    assert told[0][-1] == "[1] ValueError: bad"


# With two, numpy's import starts one.
@pytest.mark.parametrize("threads", [pytest.param("1", marks=pytest.mark.nightly), "2"])
def test_the_real_torch_leaves_nothing_behind_that_workers_could_not_share(threads: str, tmp_path: Path) -> None:
    text = """import torch
import allstep
with allstep.init() as world:
    model = world.wrap(torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with open(f"/proc/{os.getpid()}/cmdline") as file:
        print("forked" if "template.py" in file.read() else "alone")
"""
    job = run(tmp_path, "--nproc", "2", script(tmp_path, text), env={"OMP_NUM_THREADS": threads})
    assert (job.code, sorted(job.out.splitlines())) == (0, ["[0] forked", "[1] forked"]), job.err
