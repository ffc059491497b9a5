"""What ranks find imported already."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from allstep.testing import run_ranks

def imported(world):
    return [name in sys.modules for name in ("torch", "torchmetrics")]

if __name__ == "__main__":
    {imports}
    print(run_ranks(imported, 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("uses_metrics", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_ranks_have_torchmetrics_where_their_caller_has_imported_it(tmp_path: Path, uses_metrics: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(imports="import torchmetrics" if uses_metrics else "pass"))
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=150, check=True)
    assert ended.stdout.strip() == str([[True, uses_metrics]] * 2)
