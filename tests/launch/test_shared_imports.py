"""What workers can import together, by the text of their script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from allstep.launch.shared_imports import imports_of, shared_imports
from allstep.launch.worker_plan import Command

DYNAMO = "torch._dynamo"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch", ["torch"]),
        ("import torch.distributed as dist, json\nx = 1", ["torch.distributed"]),
        ('"""Words."""\nfrom __future__ import annotations\nimport os, sys\nfrom torch import nn', ["torch"]),
        ("import numpy as np\nimport torch", ["numpy", "torch"]),
        ("import torch\nimport torch\nfrom torch.utils.data import Dataset", ["torch", "torch.utils.data"]),
        # up to the first other statement, and the first other package
        ("import os\nos.environ['OMP_NUM_THREADS'] = '1'\nimport torch", []),
        ("try:\n    import torch\nexcept ImportError:\n    pass", []),
        ("import torch\nx = 1\nimport numpy", ["torch"]),
        ("import pandas\nimport torch", []),
        ("import torch\nimport pandas\nimport numpy", ["torch"]),
        ("from . import model\nimport torch", []),
        ("from .model import Model\nimport torch", []),
        # what is used of allstep, with torch
        (
            "import allstep\nwith allstep.init() as world:\n    allstep.Engine",
            ["allstep", "allstep:Engine", "allstep:init"],
        ),
        ("import allstep as a\na.init()", ["allstep", "allstep:init"]),
        ("import allstep\nworld.init()", ["allstep"]),
        ("from allstep import Engine\nimport json", ["allstep", "allstep:Engine"]),
        ("import allstep.handlers", ["allstep.handlers"]),
        ("import allstep, sklearn\nallstep.init()", ["allstep"]),
        ("import allstep, torch, sklearn\nallstep.init()", ["allstep", "torch", "allstep:init"]),
        ("import allstep\nfrom .model import Model\nallstep.init()", ["allstep"]),
        # what brings torch._dynamo
        ("import torch\ntorch.optim.SGD", ["torch", DYNAMO]),
        ("from torch import optim", ["torch", DYNAMO]),
        ("import torch.optim", ["torch.optim", DYNAMO]),
        ("from torch.nn.parallel import DistributedDataParallel", ["torch.nn.parallel", DYNAMO]),
        ("import allstep\nallstep.init().wrap(model)", ["allstep", "allstep:init", DYNAMO]),
        ("import json\nx.optim", []),
        ("import numpy\nx.optim", ["numpy"]),
        # nothing that can be read
        ("import torch\nprint('a", []),
        ("import torch\n\0", []),
        ("", []),
        ('"""Words."""', []),
    ],
)
def test_they_are_the_imports_that_a_script_begins_with(text: str, expected: list[str]) -> None:
    assert imports_of(text.encode()) == tuple(expected)


def test_a_script_in_another_encoding_is_read_as_python_reads_it() -> None:
    assert imports_of("# coding: latin-1\nimport torch\nname = 'é'".encode("latin-1")) == ("torch",)


def test_a_folder_or_absent_file_has_none(tmp_path: Path) -> None:
    (tmp_path / "__main__.py").write_text("import torch")
    assert shared_imports(Command(str(tmp_path))) == ()
    assert shared_imports(Command(str(tmp_path / "absent.py"))) == ()
    assert shared_imports(Command(str(tmp_path / "__main__.py"))) == ("torch",)


@pytest.mark.parametrize(
    "text",
    [
        "os.environ['A'] = '1'",
        "os.environ |= {'A': '1'}",
        "del os.environ['A']",
        "os.environ.update(A='1')",
        "os.environ.setdefault('A', '1')",
        "os.environ.pop('A')",
        "prepare(os.environ)",
        "variables = environ",
        "os.putenv('A', '1')",
        "from dotenv import load_dotenv",
    ],
)
def test_nothing_comes_earlier_in_a_script_that_sets_variables(text: str) -> None:
    script = f"import os, torch, allstep\nallstep.init()\ntorch.optim.SGD\n{text}"
    assert imports_of(script.encode()) == ("torch", "allstep")


@pytest.mark.parametrize(
    "text",
    [
        "os.environ['A']",
        "os.environ.get('A')",
        "environ.get('A')",
        "'A' in os.environ",
        "'A' not in os.environ",
        "dict(os.environ.items())",
        "os.getenv('A')",
    ],
)
def test_a_script_may_look_at_variables(text: str) -> None:
    script = f"import os, torch, allstep\nallstep.init()\ntorch.optim.SGD\n{text}"
    assert imports_of(script.encode()) == ("torch", "allstep", "allstep:init", DYNAMO)


@pytest.mark.parametrize(
    ("files", "module", "expected"),
    [
        ({"train.py": "import torch"}, "train", ("torch",)),
        ({"pkg/__init__.py": "", "pkg/train.py": "import torch"}, "pkg.train", ("torch",)),
        ({"pkg/__init__.py": "'Words.'", "pkg/__main__.py": "import torch"}, "pkg", ("torch",)),
        ({"pkg/train.py": "import torch"}, "pkg.train", ()),  # a folder without __init__.py
        ({"pkg/__init__.py": "import os", "pkg/train.py": "import torch"}, "pkg.train", ()),
        ({"pkg/__init__.py": "(", "pkg/train.py": "import torch"}, "pkg.train", ("torch",)),  # each worker says why
        ({"pkg/__init__.py": "import torch", "pkg/train.py": ""}, "pkg.train", ()),
        ({"pkg/__init__.py": "import torch"}, "pkg", ()),
        ({"train.py": "import torch"}, "train.absent", ()),
        ({}, "absent", ()),
        ({}, "", ()),
    ],
)
def test_those_of_a_module_are_its_own_where_its_packages_do_nothing(
    files: dict[str, str], module: str, expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert shared_imports(Command(module, module=True)) == expected
    assert shared_imports(Command(module, module=True), {"PYTHONPATH": "elsewhere"}) == ()
    assert not {"pkg", "train"} & set(sys.modules)
