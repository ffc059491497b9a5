"""Kubernetes' own schemas, as kubernetes-validate has them, take `launch/kubernetes.yaml`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.compat.over_this_environment import installed
from tests.launch.kubernetes_job import FILE

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]

CHECK = """
import sys, yaml, kubernetes_validate
for each in yaml.safe_load_all(open(sys.argv[1])):
    print(each["kind"], *[kubernetes_validate.validate(each, version, strict=True) for version in ("1.31", "1.37")])
"""


def test_the_schemas_of_kubernetes_take_the_file(tmp_path: Path) -> None:
    python = installed(tmp_path, "kubernetes-validate>=1.37") / "python"
    done = subprocess.run([python, "-c", CHECK, FILE], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["Service 1.31 1.37", "Job 1.31 1.37"], done.stderr
