"""C: configuration files, and what else the launcher reads, cost little whatever is in them."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.diagnosis.hang import HangLimits
from allstep.errors import ConfigurationError
from allstep.faults import FaultPlan
from allstep.launch.config_file import DEEPEST, LARGEST, load_settings
from allstep.launch.settings import LaunchSettings
from allstep.monitor.own_stacks import make_stacks_file, read_stacks

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
AT_ONCE = 10.0  # seconds, on a loaded machine; without bounds these take minutes or all memory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, r"run.yaml:2: write the value out; \*a0 is not followed"),
        ("name: &n exp\nruns: *n\n", r"run.yaml:2: write the value out; \*n"),
        ("env: &e\n  A: *e\n", r"run.yaml:2: write the value out; \*e"),
        ("env: " + "[" * 5000, r"run.yaml:1: nested deeper"),
        ("env: " + "{a: " * (DEEPEST + 1), r"run.yaml:1: nested deeper"),
        ("#" * (LARGEST + 1), "has more than 1048576 bytes"),
    ],
    ids=["nine lines", "alias", "itself", "brackets", "mappings", "large"],
)
def test_a_configuration_that_multiplies_is_refused_at_once(path: Path, text: str, words: str) -> None:
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigurationError, match=words):
        load_settings(path)
    assert time.monotonic() - began < AT_ONCE


@given(st.text(st.characters(), max_size=60) | st.text("-:&*[]{}#|>!%@`'\" \n\tab", max_size=60))
def test_any_text_is_settings_or_a_configuration_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, errors="surrogatepass")
    with contextlib.suppress(ConfigurationError):
        LaunchSettings(**load_settings(path))


@given(st.text(max_size=40) | st.text("rank=1,iteration;kill9-epoch attempt0", max_size=40))
def test_any_text_is_a_fault_plan_and_limits_or_a_configuration_error(text: str) -> None:
    for read in (FaultPlan.parse, HangLimits.parse):
        with contextlib.suppress(ConfigurationError):
            read(text)


def test_stacks_are_read_from_a_ranks_own_file_only(tmp_path: Path) -> None:
    """The address comes from a rank: another's path, or a link that somebody planted, is not followed."""
    descriptor, address = make_stacks_file()
    os.write(descriptor, b"frames")
    assert read_stacks(address) == "frames"
    name = address.rpartition("/")[2]
    planted = tmp_path / "planted"
    planted.symlink_to(f"/memfd:{name}")
    for other in (f"{planted}/{name}", "/etc/passwd", f"/etc/passwd/{name}", "", "/", f"/proc/self/../{name}"):
        assert read_stacks(other) == ""
    os.close(descriptor)
