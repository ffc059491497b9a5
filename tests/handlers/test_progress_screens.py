"""The progress bar where people see it: on a real terminal of some width, over ranks, in a log, in a notebook."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allstep.handlers.progress_screens import NotebookScreen
from tests.jobs.launchers import environment
from tests.jobs.programs import ProgramsUnavailable, ensure_programs

SCRIPT = """
import logging, sys, time
import allstep
from allstep import Engine, Events, Mean, Metrics, ProgressBar

logging.basicConfig(level="INFO", format="%(message)s")
with allstep.init() as world:
    def step(engine, batch):
        time.sleep(0.02)
        if engine.state.iteration % 25 == 3:
            print(f"iteration {engine.state.iteration} of rank {world.rank}")
        if engine.state.iteration % 40 == 3:
            logging.info("logged at %d by rank %d", engine.state.iteration, world.rank)
        return float(world.rank)

    trainer = Engine(step)
    Metrics({"mean": Mean()}).attach(trainer)
    ProgressBar(log_seconds=0.5).attach(trainer)
    trainer.run([0] * 60, max_epochs=2)
"""
LINE = re.compile(
    r"(allstep: .*|(\[\d\] )?(iteration \d+ of rank \d|logged at \d+ by rank \d|epoch \d/2: 60/60 \[.*, mean=0(\.5)?\]"
    r"|done: epoch 2, iteration 120, .* it/s, mean=0(\.5)?|done in .*)|Pane is dead .*|)"
)
BAR = re.compile(r"epoch [12]/2: +\d+%\|.*\| \d+/60 \[\d\d:\d\d<\d\d:\d\d, .*\]")


class Pane:
    """A real terminal of a given size, in which one command runs."""

    def __init__(self, columns: int, command: list[str], folder: Path, environ: dict[str, str]) -> None:
        self._server = f"allstep-{uuid.uuid4().hex[:8]}"
        given = " ".join(f"{name}={shlex.quote(value)}" for name, value in environ.items())
        options = ["-f", os.devnull, "new-session", "-d", "-x", str(columns), "-y", "60", "-c", str(folder)]
        # The pane stays when the command has ended, and without a bar of tmux it is as large as asked for.
        options += [f"env -i {given} {shlex.join(command)}; echo ended"]
        kept = [";", "set-option", "-g", "remain-on-exit", "on", ";", "set-option", "-g", "status", "off"]
        self._tmux(*options, *kept, environ=environ)

    def lines(self) -> list[str]:
        """What the terminal shows, and what went off its upper end; wrapped lines as one."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-").rstrip().splitlines()

    def close(self) -> None:
        self._tmux("kill-server")

    def _tmux(self, *arguments: str, environ: dict[str, str] | None = None) -> str:
        command = ["tmux", "-u", "-L", self._server, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environ, timeout=20).stdout


@pytest.fixture
def open_pane(tmp_path: Path) -> Iterator[Callable[[int, list[str]], Pane]]:
    try:
        ensure_programs(["tmux"], ["tmux"], os.environ)
    except ProgramsUnavailable as reason:
        pytest.skip(f"a real terminal needs tmux: {reason}")
    environ = environment({"PATH": os.environ["PATH"], "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"})
    panes: list[Pane] = []

    def open_one(columns: int, command: list[str]) -> Pane:
        panes.append(Pane(columns, command, tmp_path, environ))
        return panes[-1]

    yield open_one
    for pane in panes:
        pane.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def watched(pane: Pane, within: float = 90.0) -> tuple[list[str], list[str]]:
    """Each different bar that was at the bottom of the terminal, and what it shows in the end."""
    bars: list[str] = []
    until = time.monotonic() + within
    while time.monotonic() < until:
        lines = pane.lines()
        if "ended" in lines:
            return bars, lines[: lines.index("ended")]
        if lines and BAR.fullmatch(lines[-1]) and lines[-1] not in bars:
            bars.append(lines[-1])
        time.sleep(0.05)  # the next picture; a terminal cannot be waited for
    raise AssertionError(f"the command has not ended: {pane.lines()}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "launcher"),
    [
        pytest.param(80, ["-m", "allstep", "run", "--nproc", "2"], id="two ranks, 80 columns"),
        pytest.param(200, ["-m", "allstep", "run", "--nproc", "2"], id="two ranks, 200", marks=pytest.mark.nightly),
        pytest.param(80, ["-m", "allstep", "run", "--nproc", "1"], id="one rank, 80", marks=pytest.mark.nightly),
        pytest.param(200, [], id="python, 200 columns", marks=pytest.mark.nightly),
        pytest.param(80, [], id="python, 80 columns", marks=pytest.mark.nightly),
    ],
)
def test_on_a_terminal_the_bar_stays_below_all_ranks_lines(
    columns: int, launcher: list[str], script: Path, open_pane: Callable[[int, list[str]], Pane]
) -> None:
    ranks = 2 if "2" in launcher else 1
    bars, lines = watched(open_pane(columns, [sys.executable, *launcher, str(script)]))
    assert len(bars) >= 3
    assert all(columns - 2 <= len(bar) <= columns - 1 for bar in bars)
    # Nothing of a bar is left in a line, and no line is lost.
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert sum("of rank" in line for line in lines) == 5 * ranks
    assert sum("logged at" in line for line in lines) == 3 * ranks
    assert sum("60/60" in line for line in lines) == 2
    assert sum("done: epoch 2" in line for line in lines) == 1


@pytest.mark.slow
def test_in_a_log_there_are_lines_and_no_orders_to_a_terminal(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "allstep", "run", "--nproc", "2", str(script)]
    with open(tmp_path / "job.log", "wb") as log:
        done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log, timeout=90)
    written = (tmp_path / "job.log").read_text()
    assert done.returncode == 0
    assert "\x1b" not in written
    assert "\r" not in written
    bars = re.findall(r"^\[(\d)\] epoch [12]/2: \d+/60 \[\d\d:\d\d<\d\d:\d\d, .*it/s.*\]$", written, re.MULTILINE)
    assert 2 <= len(bars) <= 20
    assert set(bars) == {"0"}
    assert re.search(r"^\[0\] done: epoch 2, iteration 120, .*mean=0\.5$", written, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.nightly
def test_in_a_notebook_the_bar_has_one_place_in_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setattr(os, "environ", environment({"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}))
    code = SCRIPT.replace("logging.info(", "print(").replace("max_epochs=2", "max_epochs=1")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = book.cells[0].outputs
    drawn = [each["data"]["text/plain"] for each in outputs if each["output_type"] == "display_data"]
    printed = "".join(each["text"] for each in outputs if each["output_type"] == "stream")
    assert len(drawn) == 2
    assert drawn[0].startswith("epoch 1/1: 60/60 [00:0")
    assert drawn[1].startswith("done: epoch 1, iteration 60, ")
    assert re.findall(r"iteration (\d+) of rank 0", printed) == ["3", "28", "53"]


def test_in_a_browser_the_bar_is_its_own() -> None:
    shown: list[dict[str, str]] = []

    class Display:
        def update(self, content: dict[str, str], raw: bool) -> None:
            shown.append(content)

    screen = NotebookScreen()
    screen._handle = Display()
    screen.draw("epoch 1/2:  45%|████▌     | 45/100 [00:12<00:15,  3.60it/s, a<b=0.4]")
    screen.draw("done: epoch 2 <all>")
    assert shown[0]["text/html"].count('epoch 1/2: <progress value="45" max="100"></progress> 45% 45/100 [00:12') == 1
    assert "a&lt;b=0.4]" in shown[0]["text/html"]
    assert shown[1] == {"text/plain": "done: epoch 2 <all>", "text/html": "<pre>done: epoch 2 &lt;all&gt;</pre>"}
