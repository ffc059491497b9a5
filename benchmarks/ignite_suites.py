"""PyTorch-Ignite's own tests with its engine replaced by `allstep.ignite`: how many of those that pass there pass here.

    git clone --branch v0.5.5 https://github.com/pytorch/ignite
    python benchmarks/ignite_suites.py ignite [engine handlers metrics]

The checkout is read and not changed, and nothing of it is kept here. Each suite runs twice, in processes of their own:
as it is, and with this file as a plugin of pytest, which puts this package's names into `ignite.engine` before a test
imports it. Ignite itself is the one that is installed; it has to be of the checkout's version. pytest-timeout and
pytest-xdist are needed. What else Ignite's tests need is in its requirements-dev.txt: a test that lacks a package, a
download or a GPU passes on Ignite neither, and does not count. A line for each suite is printed, and every test that
passes on Ignite alone. All three take about an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
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
TESTS_RAN = (0, 1)  # pytest's exit codes: all passed, some failed


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


def passed(checkout: Path, places: tuple[str, ...], *, replaced: bool) -> set[str]:
    """The names of the tests that pass. Ends the program where pytest could not run them."""
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
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=SUITE_TAKES_AT_MOST_S, check=False
            )
        except subprocess.TimeoutExpired:
            sys.exit(f"{' '.join(places)} took more than {SUITE_TAKES_AT_MOST_S} s")
        if done.returncode not in TESTS_RAN:
            shown = (done.stdout + done.stderr).decode(errors="replace")[-4000:]
            sys.exit(f"{shown}\npytest ended with {done.returncode} over {' '.join(places)}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    unwell = ("failure", "error", "skipped")
    return {
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if not any(case.find(kind) is not None for kind in unwell)
    }


def check(checkout: Path, suites: list[str]) -> None:
    """End the program where it cannot compare anything."""
    import ignite

    unknown = [suite for suite in suites if suite not in SUITES]
    if unknown:
        sys.exit(f"there is no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    source = checkout / "ignite" / "__init__.py"
    if not source.is_file() or not (checkout / "tests").is_dir():
        sys.exit(f"{checkout} is no clone of pytorch/ignite")
    if f'"{ignite.__version__}"' not in source.read_text():
        sys.exit(f"PyTorch-Ignite {ignite.__version__} is installed, and {checkout} is of another version")


def main() -> int:
    """Run the suites and print the score; 1 where it is below 95 of 100."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of pytorch/ignite")
    parser.add_argument("suites", nargs="*", default=[*SUITES], help=f"of {', '.join(SUITES)}")
    arguments = parser.parse_args()
    check(arguments.checkout, arguments.suites)
    is_low = False
    for suite in arguments.suites:
        began = time.monotonic()
        original = passed(arguments.checkout, SUITES[suite], replaced=False)
        ours = passed(arguments.checkout, SUITES[suite], replaced=True)
        kept = original & ours
        share = len(kept) / max(1, len(original))
        is_low |= share < 0.95
        minutes = (time.monotonic() - began) / 60
        print(f"{suite}: {len(kept)} of {len(original)} pass, {share:.1%}, in {minutes:.0f} min", flush=True)
        for name in sorted(original - ours):
            print(f"    {name}", flush=True)
    return int(is_low)


if __name__ == "__main__":
    sys.exit(main())
