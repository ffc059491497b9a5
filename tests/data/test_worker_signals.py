"""What signals do to the workers of a loader, and what is left of workers at a process' end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from allstep.data import make_loader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


class Signalled(Dataset[tuple[int, int]]):
    """Samples whose making begins with the signals that announce a job's end."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[int, int]:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return index, int(os.environ.get("STARTED_BY", -1))


def started(worker_id: int) -> None:
    os.environ["STARTED_BY"] = str(worker_id)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.nightly)])
def test_workers_go_on_after_signals_and_the_users_own_start_is_made(method: str) -> None:
    loader = make_loader(
        Signalled(),
        rank=0,
        world_size=1,
        seed=0,
        batch_size=1,
        num_workers=2,
        worker_init_fn=started,
        multiprocessing_context=method,
    )
    assert [(int(index), int(by)) for index, by in loader] == [(at, at % 2) for at in range(6)]


@pytest.mark.nightly
def test_a_worker_that_is_stuck_does_not_keep_its_process_from_ending(tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from allstep.data import make_loader

        class Stuck:
            def __len__(self):
                return 4

            def __getitem__(self, index):
                if index:
                    print(os.getpid(), flush=True)
                    for _ in range(90):
                        time.sleep(1)  # stuck in a read
                return index

        loader = make_loader(Stuck(), rank=0, world_size=1, seed=0, batch_size=1, num_workers=1)
        print(int(next(iter(loader))))
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    (stuck,) = [int(line) for line in done.stdout.split() if line != "0"]
    with pytest.raises(ProcessLookupError):
        os.kill(stuck, 0)
