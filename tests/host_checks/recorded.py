"""What machines of other kinds were recorded to show, as files below a folder, and the one finding that is expected."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from allstep.host_checks import HostFinding


def only(findings: Iterable[HostFinding]) -> HostFinding:
    """The one finding; it has a remedy where it is not good, and none where it is."""
    (finding,) = findings
    assert (finding.verdict == "good") == (finding.remedy == ""), finding
    return finding


def files(root: Path, texts: dict[str, str]) -> Path:
    """Write files below a folder."""
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
