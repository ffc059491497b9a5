"""Rows 11, 12 and 14 of the fault matrix: signals lead to one stop, a checkpoint, exit code 85, and an equal run."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from allstep.exit_codes import PREEMPTED
from tests.checkpoint.training import equal
from tests.jobs.launchers import ROOT, script
from tests.jobs.running import run, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def job(folder, name, *arguments, ranks=2):
    return ["--nproc", str(ranks), "-m", "tests.checkpoint.job", folder / name, folder / f"{name}.pt", *arguments]


def unbroken(folder):
    done = run(folder, *job(folder, "unbroken", "100 iterations"), env=ENV)
    assert done.code == 0, done.err
    return torch.load(folder / "unbroken.pt")


def iterations(text):
    return [int(each) for each in re.findall(r"iteration (\d+)$", text, re.M)]


def preempted(folder, send, at="iteration 3", workers="0"):
    with started(folder, *job(folder, "preempted", "100 iterations", "0.2", workers), env=ENV) as running:
        running.await_line(at)
        send(running.process)
        done = running.end()
    assert done.code == PREEMPTED, done.text
    return done.out


def assert_goes_on_as_if_unbroken(folder):
    resumed = run(folder, *job(folder, "preempted", "100 iterations"), env=ENV)
    assert resumed.code == 0, resumed.err
    weights, iteration = torch.load(folder / "preempted.pt")
    expected, last = unbroken(folder)
    assert iteration == last
    assert equal(weights, expected)
    return resumed


def test_sigterm_to_all_stops_all_at_one_iteration_and_the_resumed_run_equals_an_unbroken_one(tmp_path):
    out = preempted(tmp_path, lambda process: process.send_signal(signal.SIGTERM))
    last = max(iterations(out))
    assert iterations(out).count(last) == 2  # each rank says it
    resumed = assert_goes_on_as_if_unbroken(tmp_path)
    assert min(iterations(resumed.out)) == last + 1


def test_sigterm_to_one_rank_stops_all_together(tmp_path):
    def send(process):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)

    preempted(tmp_path, send)
    assert_goes_on_as_if_unbroken(tmp_path)


def test_sigterm_to_every_process_of_a_rank_its_data_loaders_workers_too_stops_all_together(tmp_path):
    def send(process):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.killpg(int(children[-1]), signal.SIGTERM)  # each rank leads its group

    preempted(tmp_path, send, workers="2")
    assert_goes_on_as_if_unbroken(tmp_path)


def test_a_finished_run_that_is_started_again_says_so_and_trains_nothing(tmp_path):
    for _ in range(2):
        done = run(tmp_path, *job(tmp_path, "run"), env=ENV)
        assert done.code == 0, done.err
    assert "nothing to run: all that was asked is done" in done.err
    assert "iteration 1" not in done.out


def test_usr1_before_torch_is_imported_is_remembered(tmp_path):
    text = """
print("up", flush=True)
import time, signal, pathlib
while not pathlib.Path("sent").exists():
    time.sleep(0.01)  # the file is the only sign
import runpy
sys.argv = ["job", sys.argv[1], sys.argv[2], "100 iterations"]
runpy.run_module("tests.checkpoint.job", run_name="__main__")
"""
    path = script(tmp_path, text)
    with started(tmp_path, "--nproc", "2", path, tmp_path / "run", tmp_path / "run.pt", env=ENV) as running:
        running.await_out(2)
        running.process.send_signal(signal.SIGUSR1)
        (tmp_path / "sent").touch()
        done = running.end()
    assert done.code == PREEMPTED, done.text
    assert max(iterations(done.out), default=0) < 15
