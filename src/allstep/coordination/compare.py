"""What of a metric is reduced over ranks, as lines that ranks compare before anything is reduced.

Contract: a `Schema` lists every state in the order in which it is packed, and then, in lines without a state, what else
has to be the same: how metrics were made and when they are fed. Two ranks may reduce together exactly when
their schemas are equal; `fingerprint` is that comparison in 63 bits, and `first_difference` the words for people. Both
are pure functions, so that all ranks, given what all said, raise the same error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from allstep.errors import MetricMismatchError


class StateLine(NamedTuple):
    """One state: at which event and in which metric, by what name, and how it is reduced, with type and shape.

    A line whose state is "" is about the metric itself.
    """

    event: str
    metric: str
    state: str
    form: str


Schema: TypeAlias = tuple[StateLine, ...]


def fingerprint(schema: Schema) -> int:
    """A number below 2^63 that differs where schemas do."""
    digest = hashlib.blake2b(repr([tuple(line) for line in schema]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def first_difference(schemas: Sequence[Schema]) -> str | None:
    """The first place at which ranks differ, named by metric, state and ranks; None where all are equal.

    Args:
        schemas: of each rank, in rank order.
    """
    for at in range(max(map(len, schemas), default=0)):
        lines = [schema[at] if at < len(schema) else None for schema in schemas]
        if any(line != lines[0] for line in lines):
            return _difference(at, lines)
    return None


def check_schemas(schemas: Sequence[Schema]) -> None:
    """Raise a MetricMismatchError when ranks' schemas differ; the same on every rank that has been given the same."""
    difference = first_difference(schemas)
    if difference is not None:
        raise MetricMismatchError(
            f"ranks reduce different metrics: {difference}. Attach the same metrics, made with the same arguments, in "
            "the same order on every rank"
        )


def _difference(at: int, lines: Sequence[StateLine | None]) -> str:
    known = [line for line in lines if line is not None]
    if len(known) == len(lines) and len({line[:3] for line in known}) == 1:
        said = _by_ranks([line.form for line in known])
        state = f", state {known[0].state!r}" if known[0].state else ""
        return f"metric {known[0].metric!r}{state}, at {known[0].event}, is {said}"
    if any(line.state for line in known):
        return f"state number {at + 1} is {_by_ranks([_state(line) for line in lines])}"
    return f"there is {_by_ranks([_metric(line) for line in lines])}"


def _state(line: StateLine | None) -> str:
    if line is None or not line.state:
        return "no further state"
    return f"metric {line.metric!r}, state {line.state!r}, at {line.event}"


def _metric(line: StateLine | None) -> str:
    return "no further metric" if line is None else f"metric {line.metric!r}, {line.form}, at {line.event},"


def _by_ranks(said: Sequence[str]) -> str:
    groups: dict[str, list[int]] = {}
    for rank, text in enumerate(said):
        groups.setdefault(text, []).append(rank)
    return "; ".join(
        f"{text} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" for text, ranks in groups.items()
    )
