"""docs/howto/testing.md: its examples run, and its tables of faults are those that there are."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from allstep.faults.fault import KINDS, WHENS
from allstep.testing import FaultPlan
from tests.testing.test_plugin import run_pytest

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "testing.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_examples_of_real_ranks_pass(tmp_path: Path) -> None:
    function, fixture = EXAMPLES[:2]
    ended = run_pytest(tmp_path, tests=f"{function}\n{fixture.replace('test_mean', 'test_mean_again')}")
    assert "2 passed" in ended.stdout, ended.stdout


def test_the_example_of_simulated_ranks_holds() -> None:
    exec(EXAMPLES[2], {"__name__": "example"})


def test_every_kind_of_fault_is_in_the_table_and_text_and_method_are_the_same() -> None:
    told = set()
    for text, method in re.findall(r"^\| (`.+?`) \| (`\..+?`) \|", PAGE, re.MULTILINE):
        texts, methods = (re.findall(r"`(.+?)`", cell) for cell in (text, method))
        if len(methods) < len(texts):
            methods = [part for cell in methods for part in cell.split(", ")]
        for one, call in zip(texts, methods, strict=True):
            built = eval(f"FaultPlan.at(){call}", {"FaultPlan": FaultPlan, "signal": signal})
            assert FaultPlan.parse(one) == built
            told.add(one.partition("=")[0])
    assert told == set(KINDS)


def test_every_place_of_a_fault_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`(?:rank|iteration|epoch|attempt|when)=.+?) \| (.+?) \|", PAGE, re.MULTILINE)
    for text, arguments in rows:
        for one, argument in zip(
            re.findall(r"`(.+?)`", text), re.findall(r"`(.+?)`", arguments.replace("`, `", "` `")), strict=True
        ):
            built = eval(f"FaultPlan.at({argument}).abort()", {"FaultPlan": FaultPlan})
            assert FaultPlan.parse(f"{one},abort") == built
    whens = {one for text, _ in rows for one in re.findall(r"when=(\w+)", text)}
    assert whens == set(WHENS)
