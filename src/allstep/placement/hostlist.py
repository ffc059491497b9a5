"""SLURM's two short forms, expanded without calling out: host lists and counts per node.

A host list is names separated by commas; a bracket group in a name stands for several: numbers and ranges separated
by commas, with the width of a zero-padded number kept. A name may have several groups, the first one turning slowest.
The grammar is that of SLURM's `scontrol show hostnames`.
"""

from __future__ import annotations

import itertools
import re

MOST_HOSTS = 1_000_000
_NAME = re.compile(r"(?:[^\[\],\s]|\[[0-9,-]+\])+\Z")
_GROUP = re.compile(r"\[([0-9,-]+)\]")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?\Z")
_REPEATED = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?\Z")


class MalformedList(ValueError):
    """The text is not a host list or not a list of counts; the caller knows which variable held it."""


def expand_hosts(hosts: str) -> tuple[str, ...]:
    """Expand such as `rack[1-2]-n[03-05,7],gpu9` to its names, in order. Raises MalformedList."""
    expanded: list[str] = []
    for name in _split_outside_brackets(hosts):
        if not _NAME.match(name):
            raise MalformedList(f"{name!r} in the host list {hosts!r} is not a host name with bracket groups")
        parts = [
            (part,) if position % 2 == 0 else _expand_group(part, hosts, MOST_HOSTS - len(expanded))
            for position, part in enumerate(_GROUP.split(name))
        ]
        total = 1
        for part in parts:
            total *= len(part)
        if len(expanded) + total > MOST_HOSTS:
            raise MalformedList(f"the host list {hosts!r} names more than {MOST_HOSTS} hosts")
        expanded += map("".join, itertools.product(*parts))
    return tuple(expanded)


def expand_tasks_per_node(tasks: str) -> tuple[int, ...]:
    """Expand such as `4(x2),1` to (4, 4, 1). Raises MalformedList."""
    expanded: list[int] = []
    for item in tasks.split(","):
        match = _REPEATED.match(item)
        if match is None:
            raise MalformedList(f"{item!r} in {tasks!r} is not a count such as 4 or 4(x2)")
        count, times = int(match[1]), int(match[2] or 1)
        if count < 1 or times < 1:
            raise MalformedList(f"{item!r} in {tasks!r} counts nothing")
        if len(expanded) + times > MOST_HOSTS:
            raise MalformedList(f"{tasks!r} counts more than {MOST_HOSTS} nodes")
        expanded += [count] * times
    return tuple(expanded)


def _split_outside_brackets(hosts: str) -> list[str]:
    names, depth, start = [], 0, 0
    for position, character in enumerate(hosts):
        if character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
        elif character == "," and depth == 0:
            names.append(hosts[start:position])
            start = position + 1
        if depth not in (0, 1):
            raise MalformedList(f"the brackets of the host list {hosts!r} do not pair")
    if depth:
        raise MalformedList(f"the brackets of the host list {hosts!r} do not pair")
    return [*names, hosts[start:]]


def _expand_group(group: str, hosts: str, most: int) -> tuple[str, ...]:
    numbers: list[str] = []
    for item in group.split(","):
        match = _RANGE.match(item)
        if match is None:
            raise MalformedList(f"{item!r} in the host list {hosts!r} is not a number or a range such as 03-05")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise MalformedList(f"the range {item!r} in the host list {hosts!r} runs backwards")
        if len(numbers) + int(last) - int(first) >= most:
            raise MalformedList(f"the host list {hosts!r} names more than {MOST_HOSTS} hosts")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return tuple(numbers)
