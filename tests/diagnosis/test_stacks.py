"""Reading stacks as faulthandler writes them, with torch's frames in them."""

from __future__ import annotations

import faulthandler
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.c10d_logger
from torch import nn

from allstep.diagnosis import torch_private
from allstep.diagnosis.stacks import at_a_prompt, main_thread, waits_in
from allstep.monitor.own_stacks import own_stacks
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


@pytest.mark.parametrize(
    ("frames", "waits"),
    [
        (
            [("/lib/python3.11/cmd.py", "cmdloop"), ("/lib/python3.11/pdb.py", "interaction"), ("train.py", "step")],
            True,
        ),
        ([("/s/IPython/terminal/debugger.py", "cmdloop"), ("train.py", "step")], True),
        ([("/s/pydevd.py", "_do_wait_suspend"), ("train.py", "step")], True),
        ([("/lib/python3.11/code.py", "raw_input"), ("/lib/python3.11/code.py", "interact")], True),
        ([("train.py", "step"), ("/lib/python3.11/pdb.py", "runscript"), ("/lib/python3.11/pdb.py", "main")], False),
        ([("/home/ada/game.py", "interaction"), ("train.py", "step")], False),
    ],
)
def test_whether_a_rank_waits_for_a_person_shows_in_its_stack(frames, waits):
    assert at_a_prompt(stack(*frames)) is waits


def test_the_main_threads_stack_is_found():
    assert "train.py" in main_thread(stack(("train.py", "f")))
    assert "beat" not in main_thread(stack(("train.py", "f")))


def test_of_several_stacks_in_a_file_the_last_counts():
    text = f"Timeout (0:00:02)!\n{stack(('old.py', 'f'))}Timeout (0:00:02)!\n{stack(('new.py', 'f'))}"
    assert "new.py" in main_thread(text)
    assert "old.py" not in main_thread(text)


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


def test_torch_still_has_the_frames_that_are_looked_for():
    assert hasattr(torch.autograd.graph, torch_private.BACKWARD_FRAME)
    assert Path(torch.distributed.c10d_logger.__file__).name == torch_private.LOGGING_FILE


def test_a_backward_pass_under_another_name_is_no_wait_and_no_error():
    assert waits_in(stack((f"{TORCH}/autograd/graph.py", "_run_backward"), ("train.py", "step"))) == ""


def test_a_logging_wrapper_in_another_file_leaves_the_collectives_name():
    frames = [(f"{TORCH}/distributed/x.py", "all_reduce"), (f"{TORCH}/distributed/renamed.py", "wrapper")]
    assert waits_in(stack(*frames)) == "all_reduce"
