"""What torch's flight recorders of several ranks say together of a hang: pure functions.

Each rank numbers the collectives that it issues in a process group (`collective_seq_id`), and all of them issue the
same ones. So a rank whose last number is below the one that others wait in has not issued that collective. `read_dump`
makes a `GroupRecord` of each group in one rank's dump, `compare` says in a sentence who did not issue what, or who
issued something else under the same number.

A collective is over when it is marked `completed` (nccl) or `retired` (all backends; gloo sets nothing else). Messages
between two ranks are left out: they have numbers of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from allstep.protocol.registration import spans

OWN = "allstep"
"""What the descriptions of allstep's own groups begin with."""

_KEPT = 4  # of a group's last collectives, by name
_MOST_GROUPS = 64
_SHOWN = 3
_SAID = 2  # groups about which something is said
_DEFAULT = "default_pg"


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One rank's collectives in one process group.

    Attributes:
        name: of the group, the same on all of its ranks.
        description: what it is for, where that was given.
        ranks: its members; empty where the recorder does not tell.
        issued: the number of the last collective that was issued.
        waits_in: the number of the first one that is not over; 0 where all are.
        names: some of them by number, with the sizes of what they were given.
    """

    name: str
    description: str
    ranks: tuple[int, ...]
    issued: int
    waits_in: int = 0
    names: Mapping[int, str] = field(default_factory=dict)


def summary(dump: bytes | str) -> str:
    """The last collectives of a dump that are not over, one a line; if all are, the last one."""
    entries = _collectives(dump)
    unfinished = [entry for entry in entries if not _is_over(entry)]
    return "\n".join(_line(entry) for entry in (unfinished or entries[-1:])[-_SHOWN:])


def read_dump(dump: bytes | str) -> list[GroupRecord]:
    """The groups in a dump of torch's flight recorder as JSON; none where it cannot be read."""
    by_group: dict[str, list[dict[str, Any]]] = {}
    for entry in _collectives(dump):
        by_group.setdefault(_group(entry)[0], []).append(entry)
    members = _members(dump)
    return [_record(name, entries, members.get(name, ())) for name, entries in list(by_group.items())[-_MOST_GROUPS:]]


def to_text(records: Sequence[GroupRecord]) -> str:
    """Records as text for a message."""
    return json.dumps([asdict(record) for record in records], separators=(",", ":")) if records else ""


def from_text(text: str) -> list[GroupRecord]:
    """Records from such a text; none where it is no such text."""
    try:
        return [
            GroupRecord(
                name=str(each["name"]),
                description=str(each["description"]),
                ranks=tuple(int(rank) for rank in each["ranks"]),
                issued=int(each["issued"]),
                waits_in=int(each["waits_in"]),
                names={int(number): str(name) for number, name in each["names"].items()},
            )
            for each in (json.loads(text) if text else [])
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def compare(by_rank: Mapping[int, Sequence[GroupRecord]]) -> str:
    """Which collective ranks wait in that others did not issue, in words; empty where the records do not tell.

    Args:
        by_rank: the records of each rank that gave any.
    """
    groups: dict[str, dict[int, GroupRecord]] = {}
    for rank, records in by_rank.items():
        for record in records:
            groups.setdefault(record.name, {})[rank] = record
    said = []
    # A vote waits for a rank that waits elsewhere, so allstep's own groups are looked at last.
    for group in sorted(groups.values(), key=lambda group: next(iter(group.values())).description.startswith(OWN)):
        sentence = _compare_group(group, set(by_rank))
        if sentence:
            said.append(sentence)
    return "; ".join(said[:_SAID])


def _compare_group(group: Mapping[int, GroupRecord], answered: set[int]) -> str:
    number = min((record.waits_in for record in group.values() if record.waits_in), default=0)
    if number == 0:
        return ""
    first = next(record for record in group.values() if record.waits_in == number)
    # A rank that has issued nothing there has no record of the group; all ranks belong to the default one.
    members = answered if first.description == _DEFAULT else answered & {*first.ranks, *group}
    missing = sorted(rank for rank in members if rank not in group or group[rank].issued < number)
    issued = sorted(members.difference(missing))
    what = f"{first.names.get(number, 'collective')} #{number} of group {first.description or first.name}"
    if missing:
        return f"{_ranks(issued)} issued {what}, and {_ranks(missing)} did not{_last_of(group, missing)}"
    by_name: dict[str, list[int]] = {}
    for rank in issued:
        by_name.setdefault(group[rank].names.get(number, ""), []).append(rank)
    by_name.pop("", None)
    if len(by_name) > 1:
        each = ", ".join(f"{_ranks(ranks)} issued {name}" for name, ranks in by_name.items())
        return f"under #{number} of group {first.description or first.name} {each}"
    return ""


def _last_of(group: Mapping[int, GroupRecord], missing: Sequence[int]) -> str:
    if len(missing) > 1 or missing[0] not in group:
        return ""
    last = group[missing[0]]
    return f": its last one there was {last.names.get(last.issued, 'collective')} #{last.issued}"


def _record(name: str, entries: Sequence[Mapping[str, Any]], ranks: tuple[int, ...]) -> GroupRecord:
    numbers = {int(entry["collective_seq_id"]): entry for entry in entries}
    waits = sorted(number for number, entry in numbers.items() if not _is_over(entry))
    kept = {*sorted(numbers)[-_KEPT:], *waits[:1]}
    return GroupRecord(
        name,
        _group(entries[-1])[1],
        ranks,
        issued=max(numbers),
        waits_in=waits[0] if waits else 0,
        names={number: _name(numbers[number]) for number in sorted(kept)},
    )


def _collectives(dump: bytes | str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(dump).get("entries", [])
        found = [entry for entry in entries if not entry.get("is_p2p") and int(entry["collective_seq_id"]) > 0]
        for entry in found:
            _line(entry)  # what cannot be shown cannot be read
        return found
    except (ValueError, AttributeError, TypeError, KeyError):  # the format is torch's own, and may change
        return []


def _members(dump: bytes | str) -> dict[str, tuple[int, ...]]:
    """The ranks of each group, which the recorder has as a text such as "[0, 1]"."""
    try:
        config = json.loads(dump).get("pg_config", {})
        return {str(name): tuple(map(int, json.loads(group["ranks"]))) for name, group in config.items()}
    except (ValueError, AttributeError, TypeError, KeyError):
        return {}


def _is_over(entry: Mapping[str, Any]) -> bool:
    return entry.get("state") == "completed" or bool(entry.get("retired"))


def _group(entry: Mapping[str, Any]) -> tuple[str, str]:
    """The name and the description of an entry's group."""
    group = entry.get("process_group") or ["", ""]
    return str(group[0]), "" if group[-1] == "undefined" else str(group[-1])


def _name(entry: Mapping[str, Any]) -> str:
    sizes = f" of sizes {entry['input_sizes']}" if entry.get("input_sizes") else ""
    return f"{entry.get('profiling_name', 'collective')}{sizes}"


def _line(entry: Mapping[str, Any]) -> str:
    name, description = _group(entry)
    named = f" of group {description or name}" if description or name else ""
    number = entry.get("collective_seq_id", "?")
    sizes = f", sizes {entry['input_sizes']}" if entry.get("input_sizes") else ""
    return f"{entry.get('profiling_name', 'a collective')} #{number}{named}: {entry.get('state', 'unknown')}{sizes}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}"
