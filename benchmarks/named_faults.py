"""How often `allstep doctor` and a preflight name a fault that was put in, and anything on machines that are well.

    python benchmarks/named_faults.py                                 # 5 times each, 50 healthy: about half an hour
    python benchmarks/named_faults.py --only doctor --times 2 --healthy 5

Prints a table for each: a row a fault, with how often it was named right, and the seconds that a run took, the median
and the longest. A run of a preflight is from the command to its end, with eight hosts on this machine, each a network
namespace; what a preflight of healthy hosts took is what it says itself. All faults of the doctor are there at once.
They are those of `tests/host_checks/ill_machine.py` and `tests/hosts/preflight_faults.py`. Root, iproute2 and nftables
are needed.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from machine import machine_line

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests put the faults in


def doctor_rows(folder: Path, times: int, healthy: int) -> list[str]:
    from tests.host_checks.ill_machine import FAULTS, look_at_healthy, look_at_ill

    ill = [look_at_ill(_new(folder / f"ill{index}")) for index in range(times)]
    well = [look_at_healthy(_new(folder / f"well{index}")) for index in range(healthy)]
    taken = [seen.seconds for seen in ill]
    rows = [_row(fault.what, sum(seen.names(fault) for seen in ill), taken) for fault in FAULTS]
    _complain(str(seen.ill) for seen in well if seen.ill)
    return [*rows, _row("none", sum(bool(seen.ill) for seen in well), [seen.seconds for seen in well])]


def preflight_rows(folder: Path, times: int, healthy: int) -> list[str]:
    from tests.hosts.preflight_faults import (
        FAULTS,
        is_named,
        is_well,
        limit_all,
        opened_hosts_of_a_preflight,
        rehearse,
        run_preflight,
    )

    rows = []
    for number, (name, fault) in enumerate(FAULTS.items()):
        seen = [rehearse(fault, folder / f"fault{number}-{index}") for index in range(times)]
        _complain(each.jobs[0].text for each in seen if not is_named(fault, each))
        rows.append(_row(name, sum(is_named(fault, each) for each in seen), [each.seconds for each in seen]))
    with opened_hosts_of_a_preflight(folder / "healthy") as hosts:
        limit_all(hosts, "1gbit")
        well = [run_preflight(hosts, folder / "healthy" / f"run{index}") for index in range(healthy)]
    _complain(each.jobs[0].text for each in well if not is_well(each))
    said = [re.search(r"all fit \(([\d.]+) s\)", each.jobs[0].err) for each in well]
    taken = [float(found[1]) if found else each.seconds for found, each in zip(said, well, strict=True)]
    return [*rows, _row("none", sum(not is_well(each) for each in well), taken)]


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _row(what: str, named: int, taken: list[float]) -> str:
    seconds = f"{statistics.median(taken):.1f} | {max(taken):.1f}" if taken else "- | -"
    return f"| {what} | {named} of {len(taken)} | {seconds} |"


def _complain(texts: Iterable[str]) -> None:
    for text in texts:
        print(f"not as it should be:\n{text}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["doctor", "preflight"], help="one of the two tables")
    parser.add_argument("--times", type=int, default=5, help="how often each fault is put in (default: 5)")
    parser.add_argument(
        "--healthy", type=int, default=50, help="how often healthy machines are looked at (default: 50)"
    )
    options = parser.parse_args()
    print(machine_line(), "\n", sep="")
    for name, rows in (("doctor", doctor_rows), ("preflight", preflight_rows)):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                table = rows(Path(folder), options.times, options.healthy)
            print(
                f"| fault, `{name}` | named | s | at most |", "|---|---:|---:|---:|", *table, "", sep="\n", flush=True
            )


if __name__ == "__main__":
    main()
