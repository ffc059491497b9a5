"""The ready job scripts in launch/ start what they say."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.jobs.launchers import script
from tests.jobs.running import run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_torchrun_sh_starts_the_processes_it_is_told_to(tmp_path: Path) -> None:
    """With an environment that is there already: making one is launch/environment.sh's part."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/torchrun.sh", tmp_path / "launch")
    ready = f"allstep_environment() {{ PATH={Path(sys.executable).parent}:$PATH; }}\n"
    (tmp_path / "launch/environment.sh").write_text(ready)
    script(tmp_path, "os.write(1, f\"{rank} {os.environ['WORLD_SIZE']} {sys.argv[1:]}\\n\".encode())")
    result = run(tmp_path, "script.py", "--lr", "0.1", command=[tmp_path / "launch/torchrun.sh"], env={"NPROC": "2"})
    assert result.code == 0, result.err
    assert sorted(result.out.splitlines()) == [f"{rank} 2 ['--lr', '0.1']" for rank in range(2)]
