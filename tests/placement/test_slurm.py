from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allstep.errors import ArgumentError
from allstep.placement.slurm import expand_hosts, expand_tasks_per_node


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("gpu9", ["gpu9"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[5]", ["n5"]),
        ("n[1,3-4,007]", ["n1", "n3", "n4", "n007"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("n[1-2].cluster.org,head-1", ["n1.cluster.org", "n2.cluster.org", "head-1"]),
        ("[1-2]", ["1", "2"]),
        ("r[1-2][3-4]", ["r13", "r14", "r23", "r24"]),
        (
            "rack[1-2]-n[03-05,7],gpu9",
            [*(f"rack{rack}-n{node}" for rack in (1, 2) for node in ("03", "04", "05", "7")), "gpu9"],
        ),
    ],
)
def test_host_list(hosts: str, expected: list[str]) -> None:
    assert list(expand_hosts(hosts)) == expected


@pytest.mark.parametrize(
    "hosts",
    [
        *("", ",", "a,", ",a", "a,,b", "n[1-2", "n1-2]", "n[[1]]", "n[]", "n[,]", "n[1,]", "n[1-]", "n[-1]", "n[a]"),
        *("n[2-1]", "n[1-2-3]", "n 1", "n[1 2]", "n[1-2]]", "n[1-99999999999]", "n[1-9999][1-9999]", "n[\u0661]"),
    ],
)
def test_malformed_host_list(hosts: str) -> None:
    with pytest.raises(ArgumentError):
        expand_hosts(hosts)


@given(st.integers(0, 10**6), st.integers(0, 200), st.integers(1, 9))
def test_a_range_counts_every_number_once_at_its_width(first: int, more: int, width: int) -> None:
    hosts = expand_hosts(f"n[{first:0{width}}-{first + more:0{width}}]")
    assert hosts == tuple(f"n{number:0{width}}" for number in range(first, first + more + 1))


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [("4", (4,)), ("2,1", (2, 1)), ("4(x2),1", (4, 4, 1)), ("1,8(x3),2(x1)", (1, 8, 8, 8, 2))],
)
def test_tasks_per_node(tasks: str, expected: tuple[int, ...]) -> None:
    assert expand_tasks_per_node(tasks) == expected


@pytest.mark.parametrize(
    "tasks", ["", ",", "4,", "x", "4(x)", "4(x2", "4x2", "(x2)", "0", "4(x0)", "-1", "4(x99999999)"]
)
def test_malformed_tasks_per_node(tasks: str) -> None:
    with pytest.raises(ArgumentError):
        expand_tasks_per_node(tasks)
