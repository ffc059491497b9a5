"""DTensors are told from other tensors without importing them."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.nightly
def test_ranks_without_a_divided_model_do_not_import_dtensor() -> None:
    packages = "checkpoint, allstep.engine, allstep.handlers, allstep.metrics, allstep.tracking, allstep.world"
    program = (
        "import sys, torch\n"
        f"import allstep.{packages}\n"
        "from allstep.parallel import is_dtensor\n"
        "with allstep.init() as world:\n"
        "    model = world.wrap(torch.nn.Linear(2, 2))\n"
        "    print(is_dtensor(model.weight), sorted({'sympy', 'torch.distributed.tensor'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False []\n", done.stderr
