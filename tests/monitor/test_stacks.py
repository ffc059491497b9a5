"""Reading stacks and flight records as Python and torch write them."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from allstep.diagnosis.stacks import main_thread, waits_in
from allstep.monitor.own_stacks import StacksTimer, make_stacks_file, own_stacks, read_stacks
from allstep.monitor.torch_private import active_collectives, summary
from allstep.testing import run_ranks
from allstep.world import World
from tests.monitor.driving import wait_for

OTHER = 'Thread 0x00007f1 [beat] (most recent call first):\n  File "/lib/python3.11/selectors.py", line 9 in select\n'


def stack(*frames: tuple[str, str]) -> str:
    lines = "".join(f'  File "{file}", line 3 in {name}\n' for file, name in frames)
    return f"{OTHER}\nThread 0x00007f2 (most recent call first):\n{lines}"


TORCH = "/venv/lib/python3.11/site-packages/torch"


@pytest.mark.parametrize(
    ("frames", "waits"),
    [
        ([("train.py", "sleep")], ""),
        ([(f"{TORCH}/autograd/graph.py", "_engine_run_backward"), ("train.py", "step")], "gradients"),
        (
            [
                (f"{TORCH}/distributed/distributed_c10d.py", "all_reduce"),
                (f"{TORCH}/distributed/c10d_logger.py", "wrapper"),
            ],
            "all_reduce",
        ),
        ([(f"{TORCH}/nn/modules/module.py", "forward")], ""),
        ([("/x/allstep/coordination/ranked.py", "wait")], "wait"),
        ([("train.py", "slow"), (f"{TORCH}/distributed/x.py", "hook")], ""),
    ],
)
def test_whether_a_rank_waits_for_its_peers_shows_in_its_stack(frames, waits):
    assert waits_in(stack(*frames)) == waits


def test_the_main_threads_stack_is_found():
    assert "train.py" in main_thread(stack(("train.py", "f")))
    assert "beat" not in main_thread(stack(("train.py", "f")))


def test_of_several_stacks_in_a_file_the_last_counts():
    text = f"Timeout (0:00:02)!\n{stack(('old.py', 'f'))}Timeout (0:00:02)!\n{stack(('new.py', 'f'))}"
    assert "new.py" in main_thread(text)
    assert "old.py" not in main_thread(text)


def test_a_real_stack_has_the_main_thread_last_and_not_the_one_that_asks():
    found: list[str] = []

    def ask() -> None:
        found.append(own_stacks())

    thread = threading.Thread(target=ask, name="asks")
    thread.start()
    thread.join()
    assert "test_a_real_stack_has_the_main_thread_last" in main_thread(found[0])
    assert "own_stacks" not in found[0]


def test_the_timer_writes_when_it_is_not_wound_up(monkeypatch):
    monkeypatch.setattr("allstep.monitor.own_stacks.WITHOUT_BEAT_S", 0.1)
    timer = StacksTimer()
    timer.wind_up()
    wait_for(lambda: "test_the_timer_writes_when" in main_thread(read_stacks(timer.address)))
    monkeypatch.setattr("allstep.monitor.own_stacks.WITHOUT_BEAT_S", 60)
    timer.wind_up()
    assert read_stacks(timer.address) == ""
    timer.close()


def test_a_timer_without_a_file_does_nothing(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    timer = StacksTimer()
    assert timer.address == ""
    timer.wind_up()
    timer.close()


def test_stacks_need_no_folder_for_temporary_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(own_stacks()))
    thread.start()
    thread.join()
    assert "test_stacks_need_no_folder" in main_thread(found[0])


def test_a_timer_whose_file_the_script_closed_does_nothing_and_leaves_the_next_file_alone(tmp_path):
    timer = StacksTimer()
    descriptor = int(timer.address.split("/")[4])
    os.close(descriptor)
    timer.wind_up()
    path = tmp_path / "kept"
    path.write_text("kept")
    other = os.open(path, os.O_RDWR)
    os.dup2(other, descriptor)
    timer.wind_up()
    timer.close()
    assert path.read_text() == "kept"
    for fd in {other, descriptor}:
        os.close(fd)  # it is still open


def test_a_stacks_file_is_read_from_another_process_and_ends_with_its_own():
    code = (
        "import os, sys; from allstep.monitor.own_stacks import make_stacks_file\n"
        "fd, address = make_stacks_file(); os.write(fd, b'in main'); print(address, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
        address = process.stdout.readline().strip()
        assert read_stacks(address) == "in main"
        process.kill()
        process.wait()
        assert read_stacks(address) == ""


def test_another_file_at_the_address_is_not_read():
    descriptor, address = make_stacks_file()
    os.write(descriptor, b"in main")
    assert read_stacks(address) == "in main"
    assert read_stacks(address[:-1] + ("0" if address[-1] != "0" else "1")) == ""
    reading, writing = os.pipe()
    os.dup2(reading, descriptor)  # reading from it would block
    assert read_stacks(address) == ""
    for fd in (reading, writing, descriptor):
        os.close(fd)
    assert read_stacks("") == read_stacks("/etc/hostname") == ""


def test_the_flight_recorders_unfinished_collectives_are_named():
    entries = [
        {"collective_seq_id": 11, "profiling_name": "gloo:all_reduce", "state": "completed"},
        {
            "collective_seq_id": 12,
            "profiling_name": "gloo:all_reduce",
            "state": "scheduled",
            "process_group": ["0", "default_pg"],
            "input_sizes": [[8]],
        },
    ]
    assert (
        summary(json.dumps({"entries": entries})) == "gloo:all_reduce #12 of group default_pg: scheduled, sizes [[8]]"
    )
    assert summary(json.dumps({"entries": entries[:1]})).endswith("completed")


@pytest.mark.parametrize("dump", [b"", b"[]", b"{}", b'{"entries": 3}', b'{"entries": [3]}'])
def test_a_record_that_cannot_be_read_is_done_without(dump):
    assert summary(dump) == ""


def test_without_torch_or_its_variables_nothing_is_recorded(monkeypatch):
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE", raising=False)
    monkeypatch.delenv("TORCH_NCCL_TRACE_BUFFER_SIZE", raising=False)
    assert active_collectives() == ""


def test_the_faulthandlers_format_is_the_one_that_is_read():
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        assert "test_the_faulthandlers_format" in main_thread(file.read())


def waits_alone(world: World, how: str, found: Path) -> str:
    """Rank 0 waits for rank 1, which comes when a thread has seen in rank 0's stack that it waits: for what it does."""
    seen: list[str] = []

    def look() -> None:
        while not (waits := waits_in(own_stacks())):
            time.sleep(0.05)  # until the main thread is in the wait, which tells nobody
        seen.append(waits)
        found.touch()

    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    loss = model(torch.ones(2, 4)).sum()
    thread = threading.Thread(target=look, daemon=True)
    if world.rank == 0:
        thread.start()
    else:
        wait_for(found.exists, 60)
    if how == "backward":
        loss.backward()
    else:
        dist.all_reduce(torch.ones(2))
    if world.rank == 0:
        thread.join()
    return seen[0] if seen else ""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "waits"), [("backward", "gradients"), ("all_reduce", "all_reduce")])
def test_torchs_own_waiting_is_recognised(how: str, waits: str, tmp_path: Path) -> None:
    assert run_ranks(waits_alone, 2, how, tmp_path / "found") == [waits, ""]
