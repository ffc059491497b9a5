"""The tutorial's page on SLURM, command by command on a real cluster of four nodes: it prints what the page shows."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, Block, blocks
from tests.docs.test_blocks import shape
from tests.slurm.cluster import Cluster
from tests.slurm.test_submit import ENVIRONMENT

pytestmark = [
    *(pytest.mark.slurm, pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("slurm")),
    pytest.mark.timeout(900),
]

PAGE = DOCS / "tutorial" / "11_slurm.md"
AT_HOME = "/home/me/digits"
"""The folder that the page speaks of."""


def commands() -> list[tuple[Block, str]]:
    """Each block of commands with the output that the page shows behind it."""
    outputs = {block.line: block.text for block in blocks(PAGE, "")}
    ends = [(block, block.line + len(block.text.splitlines()) + 2) for block in blocks(PAGE, "bash")]
    return [(block, outputs.get(end, "")) for block, end in ends]


def as_typed(text: str) -> str:
    """The lines as one command: what is typed into salloc's shell runs in its allocation."""
    lines = text.splitlines()
    return f"{lines[0]} bash -c '{lines[1]}'" if lines[0].startswith("salloc") else text


def printed(cluster: Cluster, folder: Path, command: str) -> str:
    environ = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = cluster.run("bash", "-c", f"cd {folder} && {command}", env=environ, timeout=300)
    return done.stdout.replace(str(folder), AT_HOME)


def test_every_command_of_the_page_prints_what_it_shows(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    (script,) = (block.text for block in blocks(PAGE) if block.is_script)
    (config,) = (block.text for block in blocks(PAGE, "yaml"))
    (folder / "train.py").write_text(script)
    # The virtual nodes have no names that anybody could resolve.
    (folder / "cluster.yaml").write_text(f"{config}  env: [MASTER_ADDR=127.0.0.1]\n")
    with Cluster(tmp_path / "cluster", nodes=4, first_job=4711) as four:
        for block, expected in commands():
            deadline = time.monotonic() + 300
            while True:
                found = printed(four, folder, as_typed(block.text))
                if shape(found) == shape(expected):
                    break
                # A log is read until the job has written what the page shows.
                is_log = block.text.startswith(("grep", "cat"))
                assert is_log, f"{block.name}: {found}"
                assert time.monotonic() < deadline, f"{block.name}: {found}"
                time.sleep(0.2)
