"""Ranks that a cell of a notebook starts: in a real notebook, and from a script."""

from __future__ import annotations

from typing import Any

import pytest

from allstep.errors import RanksError
from allstep.notebook import run

CELL = """
import torch
import allstep.notebook

factor = 3

def main(world, base):
    print("hello", world.world_size)
    print("a half line", end="")
    return base + factor * world.all_reduce(world.rank)

print(allstep.notebook.run(main, 10, nproc=2, timeout=60))
"""

SHOWS = """
import time

def shows(world):
    trainer = allstep.Engine(lambda engine, batch: time.sleep(0.02))
    allstep.ProgressBar().attach(trainer)
    trainer.run(range(40), max_epochs=2)

allstep.notebook.run(shows, nproc=2, timeout=60) and None
"""

FAILS = """
def fails(world):
    if world.rank == 1:
        raise ValueError("no such luck")
    world.barrier()

allstep.notebook.run(fails, nproc=2, timeout=60)
"""


def text_of(cell: Any) -> str:
    return "".join(each.get("text", "") for each in cell["outputs"])


TRAINS = """
import torch
import allstep

world = allstep.init(seed=0)
model = world.wrap(torch.nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

def step(engine, batch):
    optimizer.zero_grad()
    loss = model(batch[0]).square().mean()
    loss.backward()
    optimizer.step()

data = torch.utils.data.TensorDataset(torch.randn(8, 1))
trainer = allstep.Engine(step)
checkpoint = allstep.Checkpoint("saved", {"model": model, "optimizer": optimizer, "trainer": trainer}).attach(trainer)
checkpoint.resume()
trainer.run(world.loader(data, batch_size=2), max_epochs=2)
print(trainer.state.iteration)
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The cells of one notebook that has been run."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    texts = (CELL, CELL, FAILS, SHOWS, TRAINS, TRAINS, "allstep.World.current().close()")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in texts])
    place = {"metadata": {"path": tmp_path_factory.mktemp("notebook")}}
    nbclient.NotebookClient(book, timeout=200, allow_errors=True, resources=place).execute()
    return list(book["cells"])


@pytest.mark.slow
def test_a_cell_starts_ranks_again_and_again_and_shows_what_they_print(cells: list[Any]) -> None:
    for cell in cells[:2]:
        printed = text_of(cell)
        lines = printed.splitlines()
        assert sorted(lines[:-1]) == ["[0] a half line", "[0] hello 2", "[1] a half line", "[1] hello 2"]
        assert lines[-1] == "[13, 13]"
    [error] = [each for each in cells[2]["outputs"] if each["output_type"] == "error"]
    assert error["ename"] == "RanksError"
    assert "rank 1 of 2 raised" in error["evalue"]
    assert "no such luck" in error["evalue"]
    shown = [each for each in cells[3]["outputs"] if each["output_type"] == "display_data"]
    assert shown, cells[3]["outputs"]
    assert any("40/40" in each["data"]["text/plain"] or "epoch" in each["data"]["text/plain"] for each in shown)


@pytest.mark.slow
def test_cells_that_open_a_world_and_save_can_be_run_twice(cells: list[Any]) -> None:
    assert not [each for cell in cells[4:] for each in cell["outputs"] if each["output_type"] == "error"]
    printed = [text_of(cell) for cell in cells[4:]]
    assert printed[0].splitlines()[-1] == "8"
    assert "resumed from" in printed[1]
    assert "nothing to run" in printed[1]
    assert "done in" in printed[2]


def test_a_function_that_nobody_can_import_runs_on_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda world, base: base + world.rank, 5, nproc=2) == [5, 6]


def test_ranks_that_do_not_finish_are_named() -> None:
    def waits(world: Any) -> None:
        import time

        time.sleep(60)

    with pytest.raises(RanksError, match="did not finish in"):
        run(waits, nproc=1, timeout=2.0)
