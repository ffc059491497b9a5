"""Real runs: what comes out, how failures and signals end them, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.launchers import environment, script
from tests.jobs.processes import LIMIT, alive, await_end, freeze, pids, watch
from tests.jobs.running import run, started

STAY = "import signal\nprint('pid', os.getpid(), flush=True)\nwhile True:\n    signal.pause()\n"


def log(folder: Path, rank: int) -> str:
    return next(folder.glob(f"runs/*/attempt_0/rank_{rank}.log")).read_text()


def test_each_worker_has_its_place_and_the_command_ends_with_zero(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ALLSTEP_RUN_ID"]
    script(tmp_path, f"print([os.environ[name] for name in {names}])")
    result = run(tmp_path, "--nproc", "2", "--name", "exp", "script.py")
    assert result.code == 0
    assert sorted(result.out.splitlines()) == [
        f"[{rank}] ['{rank}', '{rank}', '2', '2', '127.0.0.1', 'exp']" for rank in range(2)
    ]
    assert result.err == "allstep: run exp: 2 workers, output kept in runs/exp/attempt_0\n"


def test_both_streams_are_prefixed_and_kept_in_the_log_as_they_were_written(tmp_path: Path) -> None:
    script(tmp_path, "print('out', rank); print('err', rank, file=sys.stderr); print('half', end='')")
    result = run(tmp_path, "--nproc", "2", "script.py")
    assert sorted(result.out.splitlines()) == ["[0] half", "[0] out 0", "[1] half", "[1] out 1"]
    assert sorted(result.err.splitlines()[1:]) == ["[0] err 0", "[1] err 1"]
    assert sorted(log(tmp_path, 1).replace("half", "half\n").split("\n")) == ["", "err 1", "half", "out 1"]


def test_a_single_worker_writes_and_reads_as_if_it_were_started_alone(tmp_path: Path) -> None:
    script(tmp_path, "print(sys.stdin.read().upper(), end='')")
    assert run(tmp_path, "script.py", stdin="two\nlines").out == "TWO\nLINES"


def test_output_that_is_not_text_comes_out_unchanged(tmp_path: Path) -> None:
    script(tmp_path, "sys.stdout.buffer.write(bytes(range(256)) * 4000)")
    result = subprocess.run(
        [sys.executable, "-m", "allstep", "run", "script.py"],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    assert result.stdout == bytes(range(256)) * 4000
    assert next(tmp_path.glob("runs/*/attempt_0/rank_0.log")).read_bytes() == result.stdout


def test_long_lines_of_several_ranks_do_not_mix(tmp_path: Path) -> None:
    script(tmp_path, "for _ in range(5):\n    print(str(rank) * 300_000)")
    result = run(tmp_path, "--nproc", "3", "script.py")
    assert sorted(result.out.splitlines()) == [
        f"[{rank}] " + str(rank) * 300_000 for rank in range(3) for _ in range(5)
    ]


@pytest.mark.parametrize(("show", "ranks"), [("main", [0]), ("1,2", [1, 2])])
def test_only_the_ranks_asked_for_are_shown_and_all_are_logged(show: str, ranks: list[int], tmp_path: Path) -> None:
    script(tmp_path, "print('here')")
    result = run(tmp_path, "--nproc", "3", "--show", show, "script.py")
    assert sorted(result.out.splitlines()) == [f"[{rank}] here" for rank in ranks]
    assert [log(tmp_path, rank) for rank in range(3)] == ["here\n"] * 3


def test_prefixes_are_coloured_on_a_terminal_unless_no_color_is_set(tmp_path: Path) -> None:
    script(tmp_path, "print('here')")

    def shown(extra: dict[str, str]) -> bytes:
        ours, theirs = os.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "allstep", "run", "--nproc", "2", "script.py"],
            cwd=tmp_path,
            env=environment(extra),
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
        ) as process:
            os.close(theirs)
            read = b""
            try:
                while data := os.read(ours, 4096):
                    read += data
            except OSError:  # Linux ends a terminal nobody holds open with an error
                pass
            os.close(ours)
            assert process.wait(LIMIT) == 0
        return read

    assert sorted(shown({}).split()) == [b"\x1b[33m[1]\x1b[0m", b"\x1b[36m[0]\x1b[0m", b"here", b"here"]
    assert sorted(shown({"NO_COLOR": "1"}).split()) == [b"[0]", b"[1]", b"here", b"here"]


def test_the_first_failure_ends_the_run_with_its_code_and_traceback(tmp_path: Path) -> None:
    script(tmp_path, f"if rank == 1:\n    raise ValueError('bad batch')\n{STAY}")
    result = run(tmp_path, "--nproc", "3", "--name", "exp", "script.py")
    assert result.code == 1
    report = result.err[result.err.index("allstep: run exp failed") :]
    assert report.startswith("allstep: run exp failed: rank 1 of 3 failed first\n  exit code 1\n")
    assert f'    Traceback (most recent call last):\n      File "{tmp_path}/script.py", line 4, in <module>\n' in report
    assert "    ValueError: bad batch\n" in report
    assert "runs/exp/attempt_0/rank_1.log\n" in report
    assert "ranks 0, 2: " in report
    assert json.loads((tmp_path / "runs/exp/attempt_0/failure.json").read_text())["cause"]["rank"] == 1


def test_peers_of_a_failed_worker_are_gone_even_if_they_ignore_signals(tmp_path: Path) -> None:
    ignore = "import signal\nfor number in (1, 2, 15):\n    signal.signal(number, signal.SIG_IGN)\n"
    wait = "sys.stdin.read()\nwhile not os.path.exists('go'):\n    pass\nsys.exit(5)\n"
    script(tmp_path, f"{ignore}if rank == 0:\n    {wait.replace(chr(10), chr(10) + '    ')}\n{STAY}")
    with started(tmp_path, "--nproc", "2", "script.py") as running:
        (peer,) = pids(running.await_out(1))
        watched = watch([peer])
        (tmp_path / "go").touch()
        assert running.end().code == 5
        assert not alive(peer)
        await_end(watched)


def test_the_peer_of_a_failed_worker_may_leave_by_itself(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    script(
        tmp_path,
        "if rank == 1:\n    os.read(os.open('fifo', 0), 1); print('left'); sys.exit(0)\nopen('fifo', 'w')\nsys.exit(4)",
    )
    result = run(tmp_path, "--nproc", "2", "script.py")
    assert result.code == 4
    assert result.out == "[1] left\n"
    assert "rank 1: finished without error" in result.err


def test_a_worker_killed_from_outside_is_named(tmp_path: Path) -> None:
    script(tmp_path, STAY)
    with started(tmp_path, "--nproc", "2", "script.py") as running:
        victim = running.await_out(2)[0]
        os.kill(pids([victim])[0], signal.SIGKILL)
        job = running.end()
        assert job.code == 137
        assert f"rank {victim[1]} of 2 failed first\n  killed by SIGKILL (exit code 137)\n" in job.err
        assert "it came from outside the run; when memory runs short the kernel sends it" in job.err


def test_what_workers_started_does_not_outlive_the_run_nor_hold_it_up(tmp_path: Path) -> None:
    child = "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
    script(tmp_path, child + "print('pid', child.pid, flush=True)")
    result = run(tmp_path, "--nproc", "2", "script.py")
    assert result.code == 0
    assert [alive(pid) for pid in pids(result.out.splitlines())] == [False, False]


def test_a_descendant_that_left_the_process_group_does_not_hold_the_run_up(tmp_path: Path) -> None:
    child = (
        "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], "
        "start_new_session=True)\nprint('pid', child.pid, flush=True)\n"
    )
    script(tmp_path, child)
    with started(tmp_path, "script.py") as running:
        (survivor,) = pids(running.await_out(1))
        assert running.end(leaves=True).code == 0
        assert running.pids() == [survivor]


def test_nobody_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import multiprocessing, time\n"
        "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(1000,))\n"
        f"child.start()\nprint('child pid', child.pid, flush=True)\n{STAY}",
    )
    with started(tmp_path, "--nproc", "2", "script.py") as running:
        watched = watch(pids(running.await_out(4)))
        running.process.kill()
        await_end(watched)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_stop_lets_workers_leave_and_gives_its_own_exit_code(
    number: signal.Signals, tmp_path: Path
) -> None:
    script(
        tmp_path,
        "import signal\ndef leave(number, frame):\n    print('got', signal.Signals(number).name); sys.exit(0)\n"
        "for number in (1, 2, 15):\n    signal.signal(number, leave)\n" + STAY,
    )
    with started(tmp_path, "--nproc", "2", "script.py") as running:
        running.await_out(2)
        running.process.send_signal(number)
        job = running.end()
    assert job.code == 128 + number
    passed_on = "SIGINT" if number == signal.SIGINT else "SIGTERM"
    assert sorted(job.out.splitlines()[2:]) == [f"[0] got {passed_on}", f"[1] got {passed_on}"]
    assert f"allstep: {number.name}: passed on to the workers, which have 30 s to leave" in job.err
    assert job.err.endswith(f"allstep: stopped by {number.name}\n")


def test_a_worker_that_was_stopped_can_still_act_on_the_signal(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import signal\ndef leave(number, frame):\n    print('left'); sys.exit(0)\nsignal.signal(15, leave)\n" + STAY,
    )
    with started(tmp_path, "--nproc", "2", "script.py") as running:
        for pid in pids(running.await_out(2)):
            freeze(pid)
        running.process.send_signal(signal.SIGTERM)
        job = running.end()
    assert (job.code, sorted(job.out.splitlines()[2:])) == (143, ["[0] left", "[1] left"])


def test_peers_of_a_failed_worker_never_get_the_signal_that_means_preemption(tmp_path: Path) -> None:
    deaf = "import signal\nfor number in (1, 2, 15):\n    signal.signal(number, lambda *_: print('told', flush=True))\n"
    os.mkfifo(tmp_path / "fifo")
    script(tmp_path, f"{deaf}if rank == 1:\n    open('fifo').read(); sys.exit(3)\nopen('fifo', 'w')\n{STAY}")
    result = run(tmp_path, "--nproc", "2", "script.py")
    assert result.code == 3
    assert "told" not in result.out


def test_ctrl_c_is_a_keyboard_interrupt_in_the_workers(tmp_path: Path) -> None:
    script(
        tmp_path, f"try:\n    {STAY.replace(chr(10), chr(10) + '    ')}\nexcept KeyboardInterrupt:\n    print('saved')"
    )
    with started(tmp_path, "--nproc", "2", "script.py") as running:
        running.await_out(2)
        running.process.send_signal(signal.SIGINT)
        job = running.end()
    assert (job.code, sorted(job.out.splitlines()[2:])) == (130, ["[0] saved", "[1] saved"])


DEAF = "import signal\nsignal.signal(15, lambda *_: print('deaf', flush=True))\n"


def test_workers_that_stay_after_the_grace_time_are_killed(tmp_path: Path) -> None:
    script(tmp_path, DEAF + STAY)
    with started(tmp_path, "--nproc", "2", "--grace", "0.2", "script.py") as running:
        running.await_out(2)
        running.process.send_signal(signal.SIGTERM)
        job = running.end()
    assert job.code == 143
    assert job.err.endswith("allstep: stopped by SIGTERM; ranks 0, 1 had to be killed\n")


def test_a_second_signal_ends_the_workers_at_once(tmp_path: Path) -> None:
    script(tmp_path, DEAF + STAY)
    with started(tmp_path, "--nproc", "2", "--grace", "1000", "script.py") as running:
        running.await_out(2)
        running.process.send_signal(signal.SIGTERM)
        running.await_line("deaf", 2)
        running.process.send_signal(signal.SIGINT)
        job = running.end()
    assert job.code == 143


def test_sigusr1_is_passed_on_and_the_run_goes_on(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import signal\ngot = []\nsignal.signal(signal.SIGUSR1, lambda *_: got.append(1))\nprint('ready', flush=True)\n"
        "while not got:\n    signal.sigtimedwait([], 0.05)\nprint('told')\n",
    )
    with started(tmp_path, "--nproc", "2", "script.py") as running:
        running.await_out(2)
        running.process.send_signal(signal.SIGUSR1)
        job = running.end()
    assert (job.code, sorted(job.out.splitlines()[2:])) == (0, ["[0] told", "[1] told"])


def test_signals_that_were_ignored_stay_ignored(tmp_path: Path) -> None:
    script(
        tmp_path, "import signal\nprint(signal.getsignal(1) is signal.SIG_IGN, flush=True)\nos.kill(os.getppid(), 1)\n"
    )
    command = f"trap '' HUP; exec {sys.executable} -m allstep run script.py"
    result = run(tmp_path, command=["sh", "-c", command])
    assert (result.code, result.out) == (0, "True\n")


def test_a_reader_that_stops_reading_does_not_stop_the_watch_over_the_workers(tmp_path: Path) -> None:
    script(
        tmp_path,
        "if rank == 1:\n    while not os.path.exists('go'):\n        pass\n    sys.exit(6)\n"
        "print('pid', os.getpid(), flush=True)\nwhile True:\n    print('x' * 1000)\n",
    )
    with started(tmp_path, "--nproc", "2", "script.py", reads=False) as running:
        assert running.process.stdout is not None
        watched = watch(pids([running.process.stdout.readline()]))
        (tmp_path / "go").touch()
        await_end(watched)  # ended as the peer of a failed worker, while nobody reads
        job = running.end()
    assert job.code == 6


def test_the_run_goes_on_when_nobody_reads_standard_output_any_more(tmp_path: Path) -> None:
    script(
        tmp_path,
        "print('first', flush=True)\nfor n in range(5000):\n    print('more', n)\nprint('done')\n",
    )
    with started(tmp_path, "--nproc", "2", "--name", "exp", "script.py", reads=False) as running:
        assert running.process.stdout is not None
        running.process.stdout.readline()
        running.process.stdout.close()
        job = running.end()
    assert job.code == 0
    assert (
        "nobody reads standard output any more, the run goes on; what the ranks write is in runs/exp/attempt_0"
        in job.err
    )
    assert log(tmp_path, 1).endswith("more 4999\ndone\n")


def test_a_log_that_cannot_be_written_any_more_does_not_end_the_run(tmp_path: Path) -> None:
    script(tmp_path, "for _ in range(3):\n    print('x' * 3000, flush=True)\nprint('done')")
    limited = f"ulimit -f 4; exec {sys.executable} -m allstep run script.py"  # of 512 or 1024 bytes
    result = run(tmp_path, command=["sh", "-c", limited], env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert (result.code, result.out.splitlines()[-1]) == (0, "done")
    assert re.search(r"rank_0\.log is no longer written: File too large", result.err)


@pytest.mark.slow
def test_a_plain_torchrun_script_runs_over_two_processes(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import torch\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "x = torch.tensor([dist.get_rank() + 1.0])\ndist.all_reduce(x)\n"
        "print(dist.get_rank(), dist.get_world_size(), x.item(), torch.get_num_threads())\n"
        "dist.destroy_process_group()\n",
    )
    result = run(tmp_path, "--nproc", "2", "script.py")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert result.code == 0, result.err
    assert sorted(result.out.splitlines()) == [f"[{rank}] {rank} 2 3.0 {threads}" for rank in range(2)]


@pytest.mark.slow
def test_the_rank_that_raised_is_reported_and_not_its_peer_in_a_collective(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import torch\nimport torch.distributed as dist\ndist.init_process_group('gloo')\ndist.barrier()\n"
        "if rank == 1:\n    raise ValueError('bad batch')\ndist.all_reduce(torch.ones(1))\n",
    )
    result = run(tmp_path, "--nproc", "2", "script.py")
    assert result.code == 1
    assert "rank 1 of 2 failed first\n  exit code 1\n" in result.err
    assert "    ValueError: bad batch\n" in result.err
