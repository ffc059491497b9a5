"""The failure report: a `Case` as text for somebody who was not watching, and as JSON. Pure but for `write_report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from allstep.channel.causes import Case


def failure_text(
    case: Case, *, name: str = "", tails: Mapping[int, str] | None = None, logs: Mapping[int, Path] | None = None
) -> str:
    """The block that ends a failed run: first cause first, then each further cause, then the others, one line each.

    Args:
        case: what happened.
        name: the run's name.
        tails: the last text of ranks' output, where the caller has it.
        logs: where each rank's whole output is.
    """
    raise NotImplementedError


def failure_json(
    case: Case, *, name: str = "", tails: Mapping[int, str] | None = None, logs: Mapping[int, Path] | None = None
) -> dict[str, object]:
    """The same as values that JSON can carry."""
    raise NotImplementedError


def write_report(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON so that a reader finds the whole of it or nothing.

    Raises:
        OSError: the folder cannot be written to.
    """
    raise NotImplementedError
