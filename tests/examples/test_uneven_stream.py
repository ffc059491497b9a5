"""The uneven stream over three real ranks: every policy's exact counts, and what a plain loop does instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.examples.launching import EXAMPLES, THREE_RANKS, job_of
from tests.jobs.job import Job


def stream(folder: Path, *arguments: str) -> Job:
    return job_of(THREE_RANKS, EXAMPLES / "uneven_stream.py", "--epochs", 2, *arguments, folder=folder)


def counts(folder: Path, policy: str) -> dict[str, Any]:
    out = folder / "counts.json"
    job = stream(folder, "--uneven", policy, "--out", str(out))
    assert job.code == 0, job.text
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
@pytest.mark.nightly
def test_longest_trains_every_sample_of_every_shard(tmp_path: Path) -> None:
    found = counts(tmp_path, "longest")
    assert (found["epochs"], found["iterations"]) == (2, 34)
    assert [rank["samples"] for rank in found["ranks"]] == [2 * 90, 2 * 190, 2 * 270]
    assert [rank["iterations without a batch"] for rank in found["ranks"]] == [2 * 11, 2 * 5, 0]
    assert found["unread"] == {}


@pytest.mark.slow
@pytest.mark.nightly
def test_error_names_the_count_of_each_rank(tmp_path: Path) -> None:
    job = stream(tmp_path, "--uneven", "error")
    assert job.code != 0
    assert "UnevenDataError" in job.text
    assert "rank 0 has 6, rank 1 has" in job.text


@pytest.mark.slow
@pytest.mark.nightly
def test_a_plain_loop_over_the_same_data_does_not_finish(tmp_path: Path) -> None:
    job = stream(tmp_path, "--plain", "--timeout", "10")
    assert job.code != 0
    assert "epoch 2, batch 1\n" in job.out
    assert "rank 2: done with its data" not in job.out
