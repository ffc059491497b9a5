"""PyTorch-Ignite's own tests with its engine replaced by `allstep.ignite`: how many of those that pass there pass here.

    git clone --branch v0.5.5 https://github.com/pytorch/ignite
    python benchmarks/ignite_suites.py ignite [engine handlers metrics]

The checkout is read and not changed, and nothing of it is kept here. Each suite runs twice, in processes of their own:
as it is, and with this file as a plugin of pytest, which puts this package's names into `ignite.engine` before a test
imports it. Ignite itself is the one that is installed; it has to be of the checkout's version. A line for each suite is
printed, and every test that passes on Ignite alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SUITES = {
    "engine": ("tests/ignite/engine", "tests/ignite/base"),
    "handlers": ("tests/ignite/handlers", "tests/ignite/contrib"),
    "metrics": ("tests/ignite/metrics",),
}
NAMES = ("Engine", "State", "DeterministicEngine", "create_supervised_trainer", "create_supervised_evaluator")
TEST_TAKES_AT_MOST_S = 120
SUITE_TAKES_AT_MOST_S = 3600


def replace_names() -> None:
    """Put this package's names where tests import Ignite's from; its handlers have imported theirs before."""
    import ignite.contrib.engines
    import ignite.engine
    import ignite.engine.deterministic
    import ignite.engine.engine
    import ignite.engine.events

    import allstep.ignite as ours

    for module in (ignite.engine, ignite.engine.engine, ignite.engine.deterministic, ignite.engine.events):
        for name in NAMES:
            if hasattr(module, name):
                setattr(module, name, getattr(ours, name))


if os.environ.get("ALLSTEP_IGNITE_SUITES") == "1":  # this file is the plugin
    replace_names()


def passed(checkout: Path, places: tuple[str, ...], *, replaced: bool) -> tuple[set[str], set[str]]:
    """The tests that pass, and all that ran, by name."""
    with tempfile.TemporaryDirectory() as folder:
        # The checkout's own package would hide the one that is installed, so its tests are reached by a link.
        (Path(folder) / "tests").symlink_to(checkout.resolve() / "tests")
        report = Path(folder) / "report.xml"
        here = str(Path(__file__).parent)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += [f"--timeout={TEST_TAKES_AT_MOST_S}", f"--junitxml={report}", *places]
        command += ["-p", "ignite_suites"] if replaced else []
        environment = os.environ | {"ALLSTEP_IGNITE_SUITES": str(int(replaced)), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, timeout=SUITE_TAKES_AT_MOST_S, check=False
        )
        cases = list(ElementTree.parse(report).iter("testcase"))
    ran, well = set(), set()
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("skipped") is None:
            ran.add(name)
        if not any(case.find(kind) is not None for kind in ("failure", "error", "skipped")):
            well.add(name)
    return well, ran


def main() -> int:
    """Run the suites and print the score; 1 where it is below 95 of 100."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of pytorch/ignite")
    parser.add_argument("suites", nargs="*", default=[*SUITES], help=f"of {', '.join(SUITES)}")
    arguments = parser.parse_args()
    is_low = False
    for suite in arguments.suites:
        original, _ = passed(arguments.checkout, SUITES[suite], replaced=False)
        ours, _ = passed(arguments.checkout, SUITES[suite], replaced=True)
        kept = original & ours
        share = len(kept) / max(1, len(original))
        is_low |= share < 0.95
        print(f"{suite}: {len(kept)} of {len(original)} pass, {share:.1%}")
        for name in sorted(original - ours):
            print(f"    {name}")
    return int(is_low)


if __name__ == "__main__":
    sys.exit(main())
