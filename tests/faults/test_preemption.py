"""Rows 11, 12 and 14 of the fault matrix: signals lead to one stop, a checkpoint, exit code 85, and an equal run."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from allstep.exit_codes import PREEMPTED
from allstep.testing import run_ranks
from tests.checkpoint.training import go_on
from tests.jobs.launchers import ROOT, script
from tests.jobs.running import run, started
from tests.regression import same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def job(folder, *arguments, ranks=2):
    return ["--nproc", str(ranks), "-m", "tests.checkpoint.job", folder / "run", folder / "run.pt", *arguments]


def unbroken(folder):
    return run_ranks(go_on, 2, str(folder / "unbroken"))[0]


def iterations(text):
    return [int(each) for each in re.findall(r"iteration (\d+)$", text, re.M)]


def preempted(folder, send, at="iteration 3", workers="0"):
    with started(folder, *job(folder, "100 iterations", "0.2", workers), env=ENV) as running:
        running.await_line(at)
        send(running.process)
        done = running.end()
    assert done.code == PREEMPTED, done.text
    return done.out


def assert_goes_on_as_if_unbroken(folder, after):
    weights, left = run_ranks(go_on, 2, str(folder / "run"))[0]
    expected, whole = unbroken(folder)
    assert left == range(after + 1, whole.stop)
    assert same(weights, expected)


def test_a_run_resumed_after_sigterm_to_all_equals_an_unbroken_one(tmp_path):
    out = preempted(tmp_path, lambda process: process.send_signal(signal.SIGTERM))
    last = max(iterations(out))
    assert iterations(out).count(last) == 2  # each rank says it
    resumed = run(tmp_path, *job(tmp_path, "100 iterations"), env=ENV)
    assert resumed.code == 0, resumed.err
    assert min(iterations(resumed.out)) == last + 1
    weights, iteration = torch.load(tmp_path / "run.pt")
    expected, whole = unbroken(tmp_path)
    assert iteration == whole[-1]
    assert same(weights, expected)


def test_sigterm_to_one_rank_stops_all_together(tmp_path):
    def send(process):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)

    out = preempted(tmp_path, send)
    assert_goes_on_as_if_unbroken(tmp_path, after=max(iterations(out)))


@pytest.mark.nightly
def test_sigterm_to_a_rank_and_its_data_loader_workers_stops_all_together(tmp_path):
    def send(process):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.killpg(int(children[-1]), signal.SIGTERM)  # each rank leads its group

    out = preempted(tmp_path, send, workers="2")
    assert_goes_on_as_if_unbroken(tmp_path, after=max(iterations(out)))


@pytest.mark.nightly
def test_a_finished_run_that_is_started_again_says_so_and_trains_nothing(tmp_path):
    run_ranks(go_on, 2, str(tmp_path / "run"))
    done = run(tmp_path, *job(tmp_path), env=ENV)
    assert done.code == 0, done.err
    assert "nothing to run: all that was asked is done" in done.err
    assert "iteration 1" not in done.out


@pytest.mark.nightly
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
