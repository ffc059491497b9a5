"""docs/howto/ray.md on a real Ray: a job of `allstep run` and a `TorchTrainer`, with failures, over two workers.

Ray is installed into an environment of its own that sees this one's packages, so that it runs beside this torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.compat.over_this_environment import installed
from tests.docs.pages import DOCS, blocks
from tests.jobs.ports import free_port

pytestmark = [pytest.mark.nightly, pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.xdist_group("ray")]

FREE_GB = 3
JOB_S = 600.0
PAGE = DOCS / "howto" / "ray.md"
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")

FAILS_ONCE = '''
def fails_once(world, trainer, folder):
    """On rank 1, in the second epoch of the first start."""
    import os, signal

    @trainer.on(Events.ITERATION_COMPLETED)
    def fail(engine):
        mark = folder + "/failed"
        if world.rank == 1 and engine.state.iteration == 12 and not os.path.exists(mark):
            open(mark, "w").close()
            HOW
'''


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of programs of an environment with Ray, over the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    yield installed(folder, "ray[default,train]", free_gb=FREE_GB)
    shutil.rmtree(folder, ignore_errors=True)


def environ(programs: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ALLSTEP_", "RAY_"))}
    calm = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    return kept | calm | {"PATH": f"{programs}{os.pathsep}{kept['PATH']}"} | dict(more or {})


@contextlib.contextmanager
def cluster(programs: Path, folder: Path) -> Iterator[dict[str, str]]:
    """A Ray cluster of this machine; what a command needs in its environment to reach it."""
    ports = {name: free_port() for name in PORTS}
    options = [f"--{name}={port}" for name, port in ports.items()]
    options += ["--min-worker-port=0", "--max-worker-port=0"]  # any that are free
    start = [programs / "ray", "start", "--head", "--num-cpus=3", f"--temp-dir={folder}", *options]
    variables = environ(programs, {"RAY_JOB_STOP_WAIT_TIME_S": "60"})
    done = subprocess.run(start, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        yield environ(
            programs,
            {
                "RAY_ADDRESS": f"127.0.0.1:{ports['port']}",
                "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
            },
        )
    finally:
        end(folder)


def end(folder: Path) -> None:
    """End the processes of the cluster in `folder`, and no other Ray's, as `ray stop` would."""
    import psutil

    mine = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or ()):
            mine += [process, *process.children(recursive=True)]
    for process in mine:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(mine, timeout=10)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def ray(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    # Short: the path of a socket has to fit into 107 bytes.
    folder = Path("/tmp") / f"ray-{os.getpid()}"
    folder.mkdir()
    try:
        with cluster(environment, folder) as variables:
            yield variables
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(*command: str | Path, env: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=JOB_S)


def page_script(folder: Path, how: str = "") -> Path:
    """The page's script with paths of a test, and with a failure, as statements in `how`."""
    (block,) = blocks(PAGE)
    text = block.text.replace("/shared", str(folder))
    if how:
        before = text
        text = text.replace(
            "        trainer.run(", f"        fails_once(world, trainer, {str(folder)!r})\n        trainer.run("
        )
        assert text != before
        text = text.replace("\n\nif __name__", FAILS_ONCE.replace("HOW", how) + "\n\nif __name__")
    path = folder / "train.py"
    path.write_text(text)
    return path


def losses(folder: Path, ray: Mapping[str, str], how: str = "") -> tuple[str, float]:
    """What the page's script said, and its last loss."""
    folder.mkdir()
    done = run("python", page_script(folder, how), env=ray, folder=folder)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    found = re.findall(r"epoch 5: loss ([0-9.]+)", said)
    assert len(set(found)) == 1, said  # Ray may show a line twice
    return said, float(found[0])


def test_a_torch_trainer_trains_and_goes_on_after_each_failure(ray: Mapping[str, str], tmp_path: Path) -> None:
    _, unbroken = losses(tmp_path / "unbroken", ray)
    said, raised = losses(tmp_path / "raised", ray, 'raise ValueError("the true cause")')
    assert "the true cause" in said
    _, killed = losses(tmp_path / "killed", ray, "os.kill(os.getpid(), signal.SIGKILL)")
    assert raised == killed == unbroken


SCRIPT = """
import pathlib
import time

import torch

import allstep
from allstep import Checkpoint, Engine, Events, Preemption

with allstep.init(seed=0) as world:
    model = world.wrap(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(engine, batch):
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(PACE)
        if world.is_main:
            pathlib.Path("FOLDER/stepped").touch()

    trainer = Engine(step)
    Checkpoint("FOLDER/checkpoints", every="5 iterations").attach(trainer).resume()
    Preemption().attach(trainer)
    world.print("from", trainer.state.iteration)
    trainer.run([torch.ones(2, 4)] * 20, max_epochs=2)
    world.print("trained", trainer.state.iteration)
"""


def job_script(folder: Path, pace: float) -> Path:
    path = folder / "work" / "train.py"
    path.parent.mkdir(parents=True)
    path.write_text(SCRIPT.replace("FOLDER", str(folder)).replace("PACE", str(pace)))
    return path


def submit(folder: Path, *arguments: str) -> list[str | Path]:
    run_options = ["--nproc", "2", "--runs", str(folder / "runs"), *arguments]
    return ["ray", "job", "submit", "--working-dir", str(folder / "work"), "--", "allstep", "run", *run_options]


def test_a_job_of_allstep_run_is_restarted_inside_of_it(ray: Mapping[str, str], tmp_path: Path) -> None:
    job_script(tmp_path, 0.0)
    fault = ("--max-restarts", "1", "--fault", "rank=1,iteration=13,attempt=0,kill=9")
    done = run(*submit(tmp_path, *fault, "train.py"), env=ray, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attempt 0 failed: rank 1: killed by SIGKILL" in done.stdout
    assert re.search(r"\[0\] from (5|10)\b", done.stdout), done.stdout  # the save at 10 may not have been committed
    assert "[0] trained 40" in done.stdout
    assert "succeeded" in done.stdout.lower()


def test_a_job_that_fails_is_failed_for_ray_too(ray: Mapping[str, str], tmp_path: Path) -> None:
    job_script(tmp_path, 0.0)
    done = run(*submit(tmp_path, "--fault", "rank=1,iteration=13,exit=3", "train.py"), env=ray, folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rank 1 of 2 failed first" in done.stdout


def test_a_job_that_is_stopped_has_saved_and_goes_on(ray: Mapping[str, str], tmp_path: Path) -> None:
    job_script(tmp_path, 0.2)
    submission = ["--submission-id", f"stopped-{os.getpid()}"]
    command = submit(tmp_path, "--grace", "50", "train.py")
    at = command.index("--working-dir")
    with subprocess.Popen(
        [*command[:at], *submission, *command[at:]], env=ray, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as job:
        said = ""
        assert job.stdout is not None
        for line in job.stdout:
            said += line
            if "[0] from 0" in line:
                break
        stopped = run("ray", "job", "stop", submission[1], env=ray, folder=tmp_path)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        said += job.stdout.read()
    assert "preempted" in said or "stopped by SIGTERM" in said, said
    done = run(*submit(tmp_path, "train.py"), env=ray, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    went_on = int(re.search(r"\[0\] from (\d+)", done.stdout)[1])
    assert went_on > 0, said + done.stdout
    assert "[0] trained 40" in done.stdout
