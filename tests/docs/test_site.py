"""The site has a page for everything: each public name, each file in the navigation, the words that people look for."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import allstep
from tests.docs.pages import DOCS, PAGES, ROOT

PACKAGES = sorted(path.parent.name for path in (ROOT / "src" / "allstep").glob("*/__init__.py"))


def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = hooks()


def documented() -> set[str]:
    pages = (HOOKS.expand(page.read_text()) for page in (DOCS / "reference").glob("*.md"))
    return {name for page in pages for name in re.findall(r"^::: (allstep[\w.]*)$", page, re.MULTILINE)}


def test_every_name_of_allstep_is_in_the_reference() -> None:
    assert {f"allstep.{name}" for name in allstep.__all__ if name != "__version__"} <= documented()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_of_a_package_is_in_the_reference(package: str) -> None:
    inner = {
        "channel",
        "cli",
        "diagnosis",
        "host_checks",
        "launch",
        "monitor",
        "preflight",
        "protocol",
    }  # processes around a script; nothing to import
    try:
        names = HOOKS.public_names(f"allstep.{package}")
    except LookupError:
        names = []
    if package in inner:
        return
    if package == "ignite":  # a bridge, which hands on Ignite's own names too
        bridge = pytest.importorskip("allstep.ignite")
        names = [each for each in names if getattr(bridge, each).__module__.startswith("allstep.")]
    shown = documented()
    assert all(f"allstep.{package}.{name}" in shown or f"allstep.{name}" in shown for name in names)


def test_the_error_table_of_the_site_has_every_error_type() -> None:
    from allstep import errors

    types = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert types == set(re.findall(r"^\| (\w+) \| .* \|$", HOOKS.errors(), re.MULTILINE)[1:])


def test_the_options_of_the_site_are_those_of_the_command_line() -> None:
    assert "| `--max-restarts N` |" in HOOKS.expand((DOCS / "reference" / "command_line.md").read_text())


def test_a_bar_in_the_code_of_a_table_has_no_backslash() -> None:
    assert HOOKS.expand("| `--nproc auto\\|N` | x |") == "| <code>--nproc auto&#124;N</code> | x |"


def test_a_comment_that_asks_for_something_is_replaced() -> None:
    for page in DOCS.rglob("*.md"):
        assert not re.search(
            r"^<!-- (names|run options|submit options|errors)", HOOKS.expand(page.read_text()), re.MULTILINE
        ), page


def in_navigation(part: object) -> list[str]:
    if isinstance(part, str):
        return [part]
    children = part if isinstance(part, list) else part.values()
    return [page for child in children for page in in_navigation(child)]


def test_every_page_is_in_the_navigation_once() -> None:
    text = re.sub(r"!!python\S*.*", "''", (ROOT / "mkdocs.yml").read_text())
    listed = in_navigation(yaml.safe_load(text)["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_to_a_file_finds_it(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["security", "checkpoints"])
def test_the_tests_that_a_table_names_are_there(page: str) -> None:
    """Each is given by its file, or `the same` as in the row before, and by its name or the beginning of it."""
    folder = {"security": "tests/security", "checkpoints": "tests/checkpoint"}[page]
    rows = re.findall(
        r"^\|.*\|.*\|([^|]*test_[^|]*)\|$", (DOCS / "explanation" / f"{page}.md").read_text(), re.MULTILINE
    )
    named, path = 0, None
    for row in rows:
        for word in re.findall(r"`([^`]+)`", row):
            if word.endswith(".py"):
                path = ROOT / word if "/" in word else ROOT / folder / word
                assert path.is_file(), word
            else:
                assert path is not None
                pattern = rf"^def {re.escape(word.removesuffix('...'))}" + ("" if word.endswith("...") else r"\(")
                assert re.search(pattern, path.read_text(), re.MULTILINE), f"{word} is not in {path}"
                named += 1
    assert named > 10


@pytest.mark.parametrize(
    "word",
    [
        "clip_grad_norm_",
        "scheduler.step",
        "tqdm",
        "fully_shard",
        "AveragedModel",
        "autocast",
        "TensorBoard",
        "notebook",
    ],
)
def test_a_word_that_people_look_for_is_found(word: str) -> None:
    assert any(word in page.read_text() for page in (DOCS / "howto").glob("*.md"))


def test_every_command_of_the_peer_table_is_there() -> None:
    commands = re.findall(r"`python (benchmarks/\w+\.py)[^`]*` \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) >= 5
    assert all((ROOT / command).is_file() for command in commands)
