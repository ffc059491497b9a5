"""`import allstep`: which names it has, where they come from, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import allstep


def _type_checking_imports() -> dict[str, str]:
    tree = ast.parse(inspect.getsource(allstep))
    (block,) = (each for each in tree.body if isinstance(each, ast.If))
    imports = [each for each in block.body if isinstance(each, ast.ImportFrom)]
    return {name.asname: each.module for each in imports for name in each.names if name.name == name.asname}


def test_type_checkers_see_the_names_that_exist_at_run_time() -> None:
    assert sorted([*_type_checking_imports(), "__version__"]) == sorted(allstep.__all__)


@pytest.mark.parametrize("name", sorted(set(allstep.__all__) - {"__version__"}))
def test_a_name_is_the_one_of_its_package(name: str) -> None:
    home = importlib.import_module(_type_checking_imports()[name])
    assert getattr(allstep, name) is getattr(home, name)
    assert name in getattr(home, "__all__", [name])


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Coordinator'"):
        allstep.Coordinator  # noqa: B018


def test_dir_lists_the_public_names() -> None:
    assert dir(allstep) == sorted(allstep.__all__)


def test_importing_allstep_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, allstep; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
