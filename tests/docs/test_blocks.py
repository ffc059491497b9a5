"""Every python block of the documentation and the README runs, or says in its first line why it cannot run here."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from allstep.testing import run_ranks
from tests.docs.around import run_fragments, run_script
from tests.docs.pages import DOCS, PAGES, ROOT, Block, blocks, output_after
from tests.examples.launching import job_of

ALL = [block for page in PAGES for block in blocks(page)]
SCRIPTS = [block for block in ALL if block.is_script]
OWN_TEST = {"docs/howto/testing.md"}  # its blocks are test files; see test_testing_page.py
WITH_FRAGMENTS = [
    page
    for page in PAGES
    if str(page.relative_to(ROOT)) not in OWN_TEST
    and any(not block.is_script and not block.reason for block in blocks(page))
]


def name(value: Block | Path) -> str:
    return value.name if isinstance(value, Block) else str(value.relative_to(ROOT))


def fragments(page: Path) -> list[tuple[str, str]]:
    return [(block.name, block.text) for block in blocks(page) if not block.is_script and not block.reason]


def shape(printed: str) -> list[str]:
    """Lines with each number replaced by one sign, since numbers differ between machines."""
    return [re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", line.rstrip()) for line in printed.splitlines()]


@pytest.mark.parametrize("block", ALL, ids=name)
def test_a_python_block_is_python(block: Block) -> None:
    ast.parse(block.text, block.name)
    if "# not run" in block.text:
        assert re.match(r"# not run: needs \S", block.text), f"{block.name} does not say what it needs"


@pytest.mark.parametrize("page", WITH_FRAGMENTS, ids=name)
def test_the_fragments_of_a_page_run(page: Path) -> None:
    run_ranks(run_fragments, 1, fragments(page))


def test_collectives_on_two_ranks_give_what_the_page_says() -> None:
    page = DOCS / "howto" / "ranks.md"
    ended = run_ranks(run_fragments, 2, fragments(page))
    said = dict(re.findall(r"^(\w+) = world\..*  # (.+)$", page.read_text(), re.MULTILINE))
    assert set(said) == {"total", "mean", "summed", "parts", "names"}
    for left in ended:
        assert {key: left[key] for key in said} == said


@pytest.mark.parametrize("block", SCRIPTS, ids=name)
def test_a_script_runs_and_prints_what_the_page_says(block: Block) -> None:
    printed = run_ranks(run_script, 1, block.name, block.text)[0]
    expected = output_after(block)
    if expected is not None:
        assert shape(printed) == shape(expected), printed


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("launcher", [[], ["-m", "allstep", "run", "--nproc", "2"]], ids=["python", "allstep run"])
@pytest.mark.parametrize("block", SCRIPTS, ids=name)
def test_a_script_runs_under_a_launcher(block: Block, launcher: list[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(block.text)
    job = job_of([sys.executable, *launcher], script, folder=tmp_path)
    assert job.code == 0, job.text
