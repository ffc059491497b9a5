"""The language model learns, goes on after a kill as if nothing had been, and runs under the scripts of launch/."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.examples.launching import ALLSTEP, EXAMPLES, TWO_RANKS, job_of, run
from tests.jobs.launchers import ROOT
from tests.jobs.running import start

EXAMPLE = "language_model.py"
TINY = ["--modules", "b*.py", "--width", 32, "--layers", 2, "--heads", 2, "--length", 32, "--rate", 0.01]
SHORT = [*TINY, "--steps", 24, "--accumulate", 2, "--evaluate", 12]
BOUND = 2.2  # nats a byte, as the example says
UNTRAINED = 5.55  # log(256): each byte as likely as any other


def losses(printed: str) -> dict[int, float]:
    """By optimizer step."""
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss (\d+\.\d+)", printed)}


def same(one: Path, other: Path) -> bool:
    """Whether two files of weights are equal to the last bit."""
    weights = torch.load(one, weights_only=True), torch.load(other, weights_only=True)
    return weights[0].keys() == weights[1].keys() and all(
        torch.equal(each, weights[1][name]) for name, each in weights[0].items()
    )


def example() -> ModuleType:
    """The example's own module."""
    spec = importlib.util.spec_from_file_location("language_model", EXAMPLES / EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_learns_and_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken.pt", tmp_path / "killed.pt"
    printed = run(TWO_RANKS, EXAMPLE, *SHORT, "--save", unbroken, folder=tmp_path)
    found = losses(printed)
    assert list(found) == [12, 24]
    assert found[24] < found[12] < UNTRAINED - 1

    saving = ["--checkpoints", tmp_path / "checkpoints", "--checkpoint-every", "16 iterations", "--save", killed]
    command = [
        *ALLSTEP,
        "run",
        "--nproc",
        "2",
        "--max-restarts",
        "1",
        "--fault",
        "rank=1,iteration=39,attempt=0,kill=9",
    ]
    again = run(command, EXAMPLE, *SHORT, *saving, folder=tmp_path)
    assert losses(again) == found
    assert same(unbroken, killed)


def test_packed_rows_predict_each_byte_once_and_padding_counts_nothing() -> None:
    language_model = example()
    rows = language_model.packed(["abc", "defgh", "ij"], 4)  # 13 bytes with the zero behind each string
    assert bytes(rows[:, 1:].flatten().tolist()) == b"bc\0defgh\0ij\0"
    assert [row[-1] for row in rows.tolist()[:-1]] == [row[0] for row in rows.tolist()[1:]]
    padded = language_model.packed(["abc", "defgh", "ijk"], 4)
    assert padded.shape == (4, 5)
    assert language_model.tokens_in(padded) == 13


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("mesh", ["shard=2", "tensor=2"])
def test_a_model_in_parts_learns_what_a_whole_one_does_and_resumes(mesh: str, tmp_path: Path) -> None:
    whole = losses(run(TWO_RANKS, EXAMPLE, *SHORT, folder=tmp_path))
    sharded = [*TWO_RANKS, "--mesh", mesh]
    parts = losses(run(sharded, EXAMPLE, *SHORT, "--save", tmp_path / "parts.pt", folder=tmp_path))
    assert parts == pytest.approx(whole, rel=1e-3)

    saving = ["--checkpoints", tmp_path / "checkpoints", "--checkpoint-every", "16 iterations"]
    fault = "rank=1,iteration=39,attempt=0,kill=9"
    command = [*sharded, "--max-restarts", "1", "--fault", fault]
    run(command, EXAMPLE, *SHORT, *saving, "--save", tmp_path / "killed.pt", folder=tmp_path)
    assert same(tmp_path / "parts.pt", tmp_path / "killed.pt")


@pytest.mark.slow
@pytest.mark.nightly
def test_torchrun_sh_trains_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    ready = f"allstep_environment() {{ PATH={Path(sys.executable).parent}:$PATH; }}\n"
    (tmp_path / "launch/environment.sh").write_text(ready)
    job = job_of([str(tmp_path / "launch/torchrun.sh")], Path("examples", EXAMPLE), *SHORT, folder=tmp_path)
    assert job.code == 0, job.text
    assert losses(job.out)[24] < UNTRAINED - 1


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_loss_falls_below_its_bound_within_three_minutes(tmp_path: Path) -> None:
    with start(tmp_path, [*TWO_RANKS, EXAMPLES / EXAMPLE], env={"OMP_NUM_THREADS": "1"}) as running:
        job = running.end(limit=500)
    assert job.code == 0, job.text
    found = {float(loss): int(took) for loss, took in re.findall(r"loss (\d+\.\d+), .*?, (\d+) s:", job.out)}
    assert min(took for loss, took in found.items() if loss < BOUND) <= 180
