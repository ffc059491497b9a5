"""The uneven stream over three real ranks: every policy's exact counts, and what a plain loop does instead."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.examples.launching import EXAMPLES, environment

EXAMPLE = EXAMPLES / "uneven_stream.py"


def stream(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "allstep", "run", "--nproc", "3", str(EXAMPLE), "--epochs", "2", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def counts(folder: Path, policy: str) -> dict[str, Any]:
    out = folder / "counts.json"
    done = stream(folder, "--uneven", policy, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
@pytest.mark.nightly
def test_shortest_ends_each_epoch_with_the_shortest_shard(tmp_path: Path) -> None:
    found = counts(tmp_path, "shortest")
    assert (found["epochs"], found["iterations"]) == (2, 12)
    assert [rank["samples"] for rank in found["ranks"]] == [2 * 90, 2 * 96, 2 * 96]
    assert [rank["iterations without a batch"] for rank in found["ranks"]] == [0, 0, 0]
    assert list(found["unread"]) == ["1", "2"]


@pytest.mark.slow
def test_longest_trains_every_sample_of_every_shard(tmp_path: Path) -> None:
    found = counts(tmp_path, "longest")
    assert (found["epochs"], found["iterations"]) == (2, 34)
    assert [rank["samples"] for rank in found["ranks"]] == [2 * 90, 2 * 190, 2 * 270]
    assert [rank["iterations without a batch"] for rank in found["ranks"]] == [2 * 11, 2 * 5, 0]
    assert found["unread"] == {}


@pytest.mark.slow
@pytest.mark.nightly
def test_error_names_the_count_of_each_rank(tmp_path: Path) -> None:
    done = stream(tmp_path, "--uneven", "error")
    assert done.returncode != 0
    assert "UnevenDataError" in done.stdout + done.stderr
    assert "rank 0 has 6, rank 1 has" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.nightly
def test_a_plain_loop_over_the_same_data_does_not_finish(tmp_path: Path) -> None:
    done = stream(tmp_path, "--plain", "--timeout", "10")
    assert done.returncode != 0
    assert "epoch 2, batch 1\n" in done.stdout
    assert "rank 2: done with its data" not in done.stdout
