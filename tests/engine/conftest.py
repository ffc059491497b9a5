"""Fixtures of the engine's tests."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's logger says nothing."""
    monkeypatch.setattr(logging.getLogger("allstep.engine"), "disabled", True)
