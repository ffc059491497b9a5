"""Ranks are forked for each call from a warm server: new processes that know nothing of other calls."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from allstep.testing import RanksError, run_ranks
from allstep.testing.fork_server import close_server, own_server
from allstep.world import World
from tests.jobs import running
from tests.jobs.job import Job
from tests.jobs.processes import LIMIT, alive, await_condition

pytestmark = pytest.mark.slow

PATHS = {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
"""For scripts that use functions of these tests."""


def pid(world: World) -> int:
    return os.getpid()


def pids(world_size: int = 2) -> set[int]:
    return set(run_ranks(pid, world_size))


def test_each_call_has_new_processes_which_are_gone_after_it() -> None:
    first = pids()
    assert len(first) == 2
    assert first.isdisjoint(second := pids())
    assert not any(map(alive, first | second))


def leaves_traces(world: World) -> tuple[int, int]:
    found = len(vars(torch).get("_traces", [])), int(os.environ.get("TRACES", 0))
    torch._traces = [world.rank]  # type: ignore[attr-defined]
    os.environ["TRACES"] = "1"
    torch.set_default_dtype(torch.float64)
    return found


def test_nothing_that_a_call_does_in_its_process_reaches_the_next() -> None:
    assert run_ranks(leaves_traces, 2) == run_ranks(leaves_traces, 2) == [(0, 0)] * 2


def parent_and_threads(world: World) -> tuple[int, int]:
    return os.getppid(), len(os.listdir(f"/proc/{os.getppid()}/task"))


def test_the_server_has_one_thread_after_all_its_imports() -> None:
    run_ranks(parent_and_threads, 1)
    assert "torchmetrics" in sys.modules or importlib.import_module("torchmetrics")
    (server, threads), again = run_ranks(parent_and_threads, 2)
    assert threads == 1
    assert again == (server, 1)


THREADED = """
import os, sys
from allstep.testing import RanksError, run_ranks
from tests.testing.without_torch import rank_of
if __name__ == "__main__":
    os.environ["PYTHONPATH"] = sys.argv[1] + os.pathsep + os.environ["PYTHONPATH"]
    try:
        run_ranks(rank_of, 2)
    except RanksError as error:
        print(error)
"""


def test_a_server_with_threads_is_not_forked_and_the_error_says_why(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
    )
    script = tmp_path / "script.py"
    script.write_text(THREADED)
    job = run_script(script, str(tmp_path))
    assert "has started 1 threads" in job.out, job.err
    assert "sitecustomize" in job.out


def run_script(script: Path, *arguments: str) -> Job:
    return running.run(script.parent, script, *arguments, command=[sys.executable], env=PATHS)


@pytest.mark.nightly
def test_a_closed_server_has_ended_and_the_next_call_starts_another() -> None:
    (closed, _), _ = run_ranks(parent_and_threads, 2)
    close_server()
    assert not alive(closed)
    assert own_server().is_alive()


def kills_the_server_and_waits(world: World, folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    world.barrier()
    if world.rank == 0:
        os.kill(os.getppid(), 9)
    time.sleep(1000)


@pytest.mark.nightly
def test_ranks_end_with_the_server_and_the_next_call_has_another(tmp_path: Path) -> None:
    before = run_ranks(parent_and_threads, 1)
    with pytest.raises(RanksError, match="died with exit code"):
        run_ranks(kills_the_server_and_waits, 2, tmp_path)
    await_condition(lambda: not any(alive(int(path.name)) for path in tmp_path.iterdir()))
    assert run_ranks(parent_and_threads, 1) != before


def random_numbers(world: World) -> tuple[float, float]:
    return float(np.random.rand()), float(torch.rand(()))


def test_ranks_draw_their_own_numpy_numbers_as_started_processes_do() -> None:
    drawn = [*run_ranks(random_numbers, 2), *run_ranks(random_numbers, 2)]
    assert len({numpy for numpy, _ in drawn}) == 4
    assert len({torch for _, torch in drawn}) == 1  # torch begins with the same seed in every process


def raises(world: World) -> None:
    if world.rank == 1:
        raise KeyError(os.getpid())
    world.barrier()


def test_the_ranks_of_a_failed_call_are_ended() -> None:
    with pytest.raises(RanksError, match="rank 1") as caught:
        run_ranks(raises, 2)
    assert isinstance(caught.value.__cause__, KeyError)
    assert not alive(caught.value.__cause__.args[0])


def environment(world: World, name: str) -> tuple[str | None, str]:
    return os.environ.get(name), os.getcwd()


def test_ranks_have_the_environment_and_folder_of_the_moment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAID", "now")
    monkeypatch.chdir(tmp_path)
    assert run_ranks(environment, 2, "SAID") == [("now", str(tmp_path))] * 2
    assert run_ranks(environment, 2, "SAID", env={"SAID": "over it"}) == [("over it", str(tmp_path))] * 2
    monkeypatch.delenv("SAID")
    assert run_ranks(environment, 2, "SAID") == [(None, str(tmp_path))] * 2


def prints(world: World) -> None:
    print(f"rank {world.rank} says", flush=True)
    os.write(2, b"to standard error\n")


def test_what_ranks_print_goes_where_the_caller_prints_now(capfd, tmp_path: Path) -> None:
    run_ranks(prints, 2)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["rank 0 says", "rank 1 says"]
    assert err == "to standard error\n" * 2


def test_a_module_is_imported_with_its_present_source(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "module_under_change.py"
    source.write_text("calls = []\ndef call(world):\n    calls.append(1)\n    return 'first', len(calls)\n")
    module = importlib.import_module("module_under_change")
    assert run_ranks(module.call, 2) == run_ranks(module.call, 2) == [("first", 1)] * 2
    source.write_text(source.read_text().replace("first", "another"))
    assert run_ranks(module.call, 2) == [("another", 1)] * 2


def test_a_function_that_a_rank_cannot_load_is_an_error_and_says_why(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "soon_gone.py"
    source.write_text("def call(world):\n    pass\n")
    call = importlib.import_module("soon_gone").call
    source.unlink()
    with pytest.raises(RanksError, match=r"(?s)could not load the function.*soon_gone"):
        run_ranks(call, 2)


def leaves_a_thread(world: World) -> int:
    threading.Thread(target=time.sleep, args=(1000,), name="left behind").start()
    return os.getpid()


def leaves_a_group(world: World) -> int:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return os.getpid()


@pytest.mark.parametrize(("leave", "world_size"), [(leaves_a_thread, 2), (leaves_a_group, 1)])
def test_what_a_rank_leaves_running_does_not_keep_its_process(leave, world_size: int) -> None:
    assert not any(map(alive, run_ranks(leave, world_size)))


def leaves_a_process(world: World) -> int:
    return subprocess.Popen(["sleep", "1000"]).pid


def test_what_a_rank_started_ends_with_it() -> None:
    (child,) = run_ranks(leaves_a_process, 1)
    await_condition(lambda: not alive(child))


def loads_with_workers(world: World) -> int:
    loader = DataLoader(torch.arange(8.0), batch_size=2, num_workers=1)  # type: ignore[arg-type]
    return int(sum(batch.sum() for batch in loader))


def test_a_rank_may_have_data_loader_workers() -> None:
    assert run_ranks(loads_with_workers, 2) == [28, 28]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def open_in_server(world: World) -> int:
    return len(os.listdir(f"/proc/{os.getppid()}/fd"))


@pytest.mark.parametrize("calls", [6, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.timeout(300)
def test_many_calls_leave_no_descriptor_open(calls: int) -> None:
    in_server, own = max(run_ranks(open_in_server, 2)), open_descriptors()
    for _ in range(calls):
        last = max(run_ranks(open_in_server, 2))
    assert last <= in_server + 2  # the status pipe of the other rank, or not
    assert open_descriptors() <= own


def test_threads_may_call_at_the_same_time() -> None:
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: pids(2), range(3)))
    assert all(len(each) == 2 for each in found)


CALLER = """
import signal, sys
from allstep.testing import run_ranks
from tests.testing.without_torch import rank_of, stays_in_a_collective

def imported(world):
    return [name in sys.modules for name in ("torch", "torchmetrics")]

if __name__ == "__main__":
    print(run_ranks(rank_of, 2), "torch" in sys.modules)
    print(run_ranks(imported, 2))
    if "metrics" in sys.argv:
        import torchmetrics
    print(run_ranks(imported, 2))
    print("called", flush=True)
    if "busy" in sys.argv:
        run_ranks(stays_in_a_collective, 2)
    elif "idle" in sys.argv:
        signal.pause()
"""


def called(folder: Path, *doing: str) -> tuple[Job, int]:
    """What came of a process that calls ranks, and how many processes there were before it was killed or ended."""
    path = folder / "caller.py"
    path.write_text(CALLER)
    with running.start(folder, [sys.executable, path, *doing], env=PATHS) as caller:
        caller.await_line("in a collective" if "busy" in doing else "called")
        if "ends" in doing:
            return caller.end(), 0
        processes = len(caller.pids())
        caller.process.kill()
        return caller.end(), processes  # which fails where a process is left


@pytest.fixture(scope="module")
def idle_caller(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, int]:
    return called(tmp_path_factory.mktemp("idle"), "idle", "metrics")


def test_ranks_and_server_end_with_their_caller(idle_caller: tuple[Job, int]) -> None:
    job, processes = idle_caller
    assert (job.code, processes) == (-signal.SIGKILL, 2)  # the caller and the server


def test_the_process_that_calls_loads_no_torch(idle_caller: tuple[Job, int]) -> None:
    assert idle_caller[0].out.splitlines()[0] == "[0, 1] False"


def test_ranks_have_torchmetrics_once_their_caller_has_imported_it(idle_caller: tuple[Job, int]) -> None:
    before, after = idle_caller[0].out.splitlines()[1:3]
    assert (before, after) == (str([[True, False]] * 2), str([[True, True]] * 2))


@pytest.mark.nightly
@pytest.mark.parametrize(("doing", "code", "processes"), [("busy", -signal.SIGKILL, 4), ("ends", 0, 0)])
def test_a_caller_that_is_busy_or_ends_leaves_nobody(doing: str, code: int, processes: int, tmp_path: Path) -> None:
    job, there = called(tmp_path, doing)
    assert (job.code, there) == (code, processes)
    assert job.out.splitlines()[2] == str([[True, False]] * 2)  # without an import of theirs


def call_in_a_child(answers: Any) -> None:
    answers.put(run_ranks(parent_and_threads, 2))


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_of_the_caller_has_ranks_and_a_server_of_its_own(method: str) -> None:
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    ours, _ = run_ranks(parent_and_threads, 2)
    child = context.Process(target=call_in_a_child, args=(answers,))
    child.start()
    theirs = answers.get(timeout=LIMIT)
    child.join(LIMIT)
    assert child.exitcode == 0
    assert ours not in theirs
    await_condition(lambda: not alive(theirs[0][0]))
    assert run_ranks(parent_and_threads, 2)[0] == ours
