"""What runs over torch_xla in an environment of its own (`./launch/test-xla`); its runtime on the CPU is the device."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are for the night, and skipped where there is no torch_xla."""
    is_there = importlib.util.find_spec("torch_xla") is not None
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.nightly)
            item.add_marker(pytest.mark.timeout(900))  # a graph is compiled for many seconds on a busy CPU
            if not is_there:
                item.add_marker(pytest.mark.skip(reason="torch_xla is not installed here; run ./launch/test-xla"))


os.environ.setdefault("PJRT_DEVICE", "CPU")
