"""Warm processes: kept from call to call, as new for each, replaced where they cannot be, and gone with their owner."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from allstep.testing import RanksError, run_ranks
from allstep.world import World

pytestmark = pytest.mark.slow

LIMIT = 30.0


def pid(world: World) -> int:
    return os.getpid()


def pids(world_size: int = 2) -> set[int]:
    return set(run_ranks(pid, world_size))


def await_end(watched: int) -> None:
    assert select.select([watched], [], [], LIMIT)[0], "the process is still there"
    os.close(watched)


def test_a_second_call_starts_no_process() -> None:
    first = pids()
    assert len(first) == 2
    assert [pids() for _ in range(3)] == [first] * 3


def test_a_larger_call_starts_only_the_missing_processes() -> None:
    assert pids(2) < pids(3)


def test_processes_are_started_for_a_call_of_their_own_and_ended_after_if_asked_for() -> None:
    kept = pids()
    fresh = run_ranks(pid, 2, fresh=True)
    assert kept.isdisjoint(fresh)
    assert not any(Path(f"/proc/{each}").exists() for each in fresh)
    assert pids() == kept


def raises(world: World) -> None:
    if world.rank == 1:
        raise KeyError("rank 1")
    world.barrier()


def test_the_ranks_of_a_failed_call_are_ended_and_replaced() -> None:
    before = pids()
    watched = [os.pidfd_open(each) for each in before]
    with pytest.raises(RanksError, match="rank 1"):
        run_ranks(raises, 2)
    for each in watched:
        await_end(each)
    assert pids().isdisjoint(before)


def state(world: World) -> dict[str, Any]:
    return {
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name not in ("MASTER_PORT", "ALLSTEP_RUN_ID", "TORCHELASTIC_RUN_ID", "ALLSTEP_NONCE", "ALLSTEP_CHANNEL")
        },
        "folder": os.getcwd(),
        "path": list(sys.path),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "anomaly": torch.is_anomaly_enabled(),
        "drawn": (random.random(), float(np.random.rand()), float(torch.rand(()))),
        "stdout": sys.stdout is sys.__stdout__,
        "handlers": [_handler(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "argv": list(sys.argv),
        "warnings": len(warnings.filters),
        "logging": (logging.getLogger().level, len(logging.getLogger().handlers)),
        "umask": os.umask(0o22),
        "pid": os.getpid(),
    }


def _handler(number: int) -> object:
    handler = signal.getsignal(number)
    return handler if isinstance(handler, signal.Handlers) else type(handler).__name__  # a World makes one of its own


def change_everything(world: World, folder: Path) -> int:
    os.environ["LEFT_BEHIND"] = "1"
    del os.environ["PATH"]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv.append("more")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True)
    world.seed_everything(5)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    warnings.simplefilter("error")
    logging.basicConfig(level=logging.DEBUG)
    os.umask(0o77)
    return os.getpid()


def test_whatever_a_call_changes_the_next_one_finds_as_it_was(tmp_path: Path) -> None:
    before = run_ranks(state, 2)
    assert set(run_ranks(change_everything, 2, tmp_path)) == {each["pid"] for each in before}
    for was, now in zip(before, run_ranks(state, 2), strict=True):
        assert {name: value for name, value in now.items() if value != was[name]} == {}


def environment(world: World, name: str) -> tuple[str | None, str]:
    return os.environ.get(name), os.getcwd()


def test_ranks_have_the_environment_and_folder_of_the_moment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAID", "now")
    monkeypatch.chdir(tmp_path)
    assert run_ranks(environment, 2, "SAID") == [("now", str(tmp_path))] * 2
    assert run_ranks(environment, 2, "SAID", env={"SAID": "over it"}) == [("over it", str(tmp_path))] * 2
    monkeypatch.delenv("SAID")
    assert run_ranks(environment, 2, "SAID") == [(None, str(tmp_path))] * 2


def test_a_module_of_the_tests_is_imported_anew_with_its_present_source(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "module_under_change.py"
    source.write_text(
        "import os\ncalls = []\ndef call(world):\n    calls.append(1)\n    return 'first', len(calls), os.getpid()\n"
    )
    module = importlib.import_module("module_under_change")
    one = run_ranks(module.call, 2)
    two = run_ranks(module.call, 2)
    assert one == two
    assert one[0][:2] == ("first", 1)
    source.write_text(source.read_text().replace("first", "another"))
    assert run_ranks(module.call, 2) == [("another", *each[1:]) for each in one]


REGISTERS = """
import os, torch
torch.library.define("allstep_tests::twice", "(Tensor x) -> Tensor")
def call(world):
    return os.getpid()
"""


def test_a_module_that_can_be_imported_once_only_gets_a_new_process(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "registers_once.py").write_text(REGISTERS)
    module = importlib.import_module("registers_once")
    first = run_ranks(module.call, 2)
    assert set(first).isdisjoint(run_ranks(module.call, 2))


def test_a_function_that_a_rank_cannot_load_is_an_error_and_says_why(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "soon_gone.py"
    source.write_text("def call(world):\n    pass\n")
    call = importlib.import_module("soon_gone").call
    source.unlink()
    with pytest.raises(RanksError, match=r"(?s)could not load the function.*soon_gone"):
        run_ranks(call, 2)


def leaves_a_thread(world: World) -> int:
    threading.Thread(target=time.sleep, args=(1000,), daemon=True, name="left behind").start()
    return os.getpid()


def leaves_a_process(world: World, folder: Path) -> int:
    child = subprocess.Popen(["sleep", "1000"])
    (folder / str(child.pid)).touch()
    return os.getpid()


def leaves_a_group(world: World) -> int:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return os.getpid()


def closes_standard_output(world: World) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return os.getpid()


@pytest.mark.parametrize(
    ("leave", "world_size"), [(leaves_a_thread, 2), (leaves_a_group, 1), (closes_standard_output, 2)]
)
def test_a_process_that_cannot_be_put_in_order_is_replaced(leave, world_size: int) -> None:
    left = run_ranks(leave, world_size)
    assert set(left).isdisjoint(pids())
    assert not any(Path(f"/proc/{each}").exists() for each in left)


def test_what_a_rank_started_ends_with_it(tmp_path: Path) -> None:
    left = run_ranks(leaves_a_process, 1, tmp_path)
    children = [os.pidfd_open(int(path.name)) for path in tmp_path.iterdir()]
    assert set(left).isdisjoint(pids())
    for child in children:
        await_end(child)


def loads_with_workers(world: World) -> int:
    loader = DataLoader(torch.arange(8.0), batch_size=2, num_workers=1)  # type: ignore[arg-type]
    return int(sum(batch.sum() for batch in loader))


def test_a_rank_may_have_data_loader_workers() -> None:
    assert run_ranks(loads_with_workers, 2) == [28, 28]


def trains(world: World) -> tuple[int, int, int, float]:
    model = world.wrap(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    total = float(world.all_reduce(1.0))
    return os.getpid(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), total


@pytest.mark.parametrize("worlds", [20, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.timeout(300)
def test_many_worlds_in_a_row_open_in_the_same_processes_and_leave_nothing(worlds: int) -> None:
    run_ranks(trains, 2)
    first = sorted(run_ranks(trains, 2))
    for _ in range(worlds):
        last = sorted(run_ranks(trains, 2))
    assert [each[0] for each in last] == [each[0] for each in first]
    for before, after in zip(first, last, strict=True):
        assert after[1] <= before[1] + 2
        assert after[2] <= before[2] + 2


def test_threads_may_call_at_the_same_time() -> None:
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: pids(2), range(3)))
    assert all(len(each) == 2 for each in found)


OWNER = """
import os, sys, time
from pathlib import Path
from allstep.testing import run_ranks
from tests.testing.without_torch import tell_and_stay, tell
if __name__ == "__main__":
    run_ranks(tell, 2, sys.argv[1])
    print("idle", flush=True)
    if sys.argv[2] == "busy":
        run_ranks(tell_and_stay, 2, sys.argv[1])
    elif sys.argv[2] == "idle":
        time.sleep(1000)
"""


@pytest.mark.parametrize("doing", ["idle", "busy", "ends"])
def test_warm_processes_end_with_their_owner_however_it_ends(doing: str, tmp_path: Path) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    command = [sys.executable, str(script), str(folder), doing]
    path = os.pathsep.join([os.getcwd(), *sys.path])
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        watched = []
        for file in folder.iterdir():
            try:
                watched.append(os.pidfd_open(int(file.name)))
            except ProcessLookupError:
                assert doing == "ends"
        if doing == "busy":
            deadline = time.monotonic() + LIMIT
            while not (folder / "in a collective").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)  # the file is the only sign
        if doing != "ends":
            owner.kill()
        owner.wait(LIMIT)
        for each in watched:
            await_end(each)


def call_in_a_child(answers: Any) -> None:
    answers.put(sorted(run_ranks(pid, 2)))


def test_a_child_of_the_owner_has_a_pool_of_its_own_and_ends_it() -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    before = pids()
    child = context.Process(target=call_in_a_child, args=(answers,))
    child.start()
    theirs = answers.get(timeout=LIMIT * 2)
    child.join(LIMIT * 2)
    assert child.exitcode == 0
    assert before.isdisjoint(theirs)
    assert not any(Path(f"/proc/{each}").exists() for each in theirs)
    assert pids() == before


def refused_in_a_child(answers: Any) -> None:
    try:
        run_ranks(pid, 2)
    except RanksError as error:
        answers.put(str(error))


def test_a_forked_child_of_the_owner_is_refused_with_the_remedy() -> None:
    before = pids()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=refused_in_a_child, args=(answers,))
    child.start()
    assert "spawn" in answers.get(timeout=LIMIT)
    child.join(LIMIT)
    assert pids() == before


def test_the_process_that_calls_loads_no_torch() -> None:
    text = (
        "import sys\nfrom allstep.testing import run_ranks\nimport tests.testing.without_torch as t\n"
        "if __name__ == '__main__':\n    print(run_ranks(t.rank_of, 2), 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=LIMIT * 2, check=False)
    assert ended.stdout == "[0, 1] False\n", ended.stderr
