"""Ignite's own examples and suites on this package's engine, where a checkout of Ignite is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("IGNITE_CHECKOUT")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(CHECKOUT is None, reason="IGNITE_CHECKOUT names no clone of pytorch/ignite"),
]


def benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), str(CHECKOUT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("example", ["mnist", "cifar10", "gan", "transformers"])
def test_an_example_runs_with_one_import_changed(example: str, ranks: int) -> None:
    done = benchmark("ignite_examples.py", example, "--nproc", str(ranks))
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suite", ["engine", "handlers", "metrics"])
def test_of_a_suite_at_least_95_in_100_pass(suite: str) -> None:
    done = benchmark("ignite_suites.py", suite)
    assert done.returncode == 0, done.stdout
