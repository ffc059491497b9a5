"""The cells of docs/howto/notebooks.md run in a notebook, one after the other."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS, blocks
from tests.jobs.launchers import environment


@pytest.mark.slow
@pytest.mark.nightly
def test_the_cells_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setattr(os, "environ", environment({"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}))
    cells = [nbformat.v4.new_code_cell(block.text) for block in blocks(DOCS / "howto" / "notebooks.md", "ipython")]
    assert len(cells) == 4
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [_text_by_stream(cell.outputs) for cell in book.cells]
    assert shown[0]["stdout"] == "1 3\n"
    assert shown[1]["stdout"].splitlines()[-1] == "[21, 21]"
    assert "rank 1 of 2" in "".join(shown[3].values())


def _text_by_stream(outputs: list[Any]) -> dict[str, str]:
    return {
        name: "".join(each["text"] for each in outputs if each.get("name") == name) for name in ("stdout", "stderr")
    }
