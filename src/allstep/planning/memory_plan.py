"""A plan: bytes of one rank by what they hold, messages of a step, and whether it fits. Pure.

Contract: `planned_step.planned` makes a `Plan`, nobody changes it. All numbers are bytes of the fullest rank, which is
the first: where a dimension does not divide, torch gives earlier ranks the larger parts. `Plan.held` has each kind of
memory at its own most, `Plan.peak` all of them at the one moment at which their sum is largest, so that its rows add up
to what a device must have. `str` gives a table for a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from allstep.errors import ArgumentError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes on one rank's device by what they hold.

    Attributes:
        parameters: this rank's parts of them.
        gradients: this rank's parts of them; in DDP, its buckets, and beside these what is accumulated.
        optimizer: the optimizer's states.
        activations: what operations gave that is kept for the backward pass, and what they give meanwhile.
        communication: gathered units, their gradients until they are reduced, and what collectives read and write.
        inputs: batches and the model's buffers.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    communication: int = 0
    inputs: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, each.name) for each in fields(self))


KINDS = tuple(each.name for each in fields(MemoryUse))


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one kind of collective carries in an optimizer step, along one dimension of the mesh.

    Attributes:
        collective: "all-gather", "reduce-scatter", "all-reduce", "broadcast" or "all-to-all".
        dimension: of the mesh; "all" for all ranks.
        ranks: how many take part.
        calls: how many there are in a step.
        bytes: of the whole tensors: what an all-gather gives, what the others take, in all calls.
    """

    collective: str
    dimension: str
    ranks: int
    calls: int
    bytes: int

    @property
    def sent(self) -> int:
        """Bytes that a rank sends where the collective goes around a ring (Patarasuk and Yuan 2009)."""
        if self.collective == "broadcast":
            return self.bytes
        rounds = 2 if self.collective == "all-reduce" else 1
        return rounds * self.bytes * (self.ranks - 1) // self.ranks


@dataclass(frozen=True, slots=True)
class Plan:
    """What training a model takes on each rank.

    Attributes:
        ranks: how many there are.
        mesh: their dimensions, such as `{"shard": 8}`; empty for DDP without a mesh.
        held: each kind of memory at its most. Parameters, gradients and optimizer are exact.
        peak: all kinds at the moment at which they are most together.
        moment: when that is: "forward", "backward" or "optimizer".
        host: bytes in the host's memory, with `cpu_offload`.
        traffic: what an optimizer step sends.
        memory: bytes of a device, where it was said.
        changes: what differs from what was asked for; empty for the plan itself.
        fitting: where this does not fit `memory`, the first change that was found to fit; None where none was.
    """

    ranks: int
    mesh: Mapping[str, int]
    held: MemoryUse
    peak: MemoryUse
    moment: str
    host: int = 0
    traffic: tuple[Traffic, ...] = ()
    memory: int | None = None
    changes: tuple[str, ...] = ()
    fitting: Plan | None = None

    def fits(self, memory: int | str) -> bool:
        """Whether a device with this memory has room for the peak.

        Args:
            memory: bytes, or a text such as "80GB" or "24GiB". What a driver and fragments take is to be left out.

        Raises:
            ArgumentError: it is neither.
        """
        return self.peak.total <= bytes_of(memory)

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, for JSON; `fits` where `memory` was said."""
        found: dict[str, Any] = asdict(self)
        for use in ("held", "peak"):
            found[use]["total"] = getattr(self, use).total
        for each, traffic in zip(found["traffic"], self.traffic, strict=True):
            each["sent"] = traffic.sent
        found["fits"] = None if self.memory is None else self.fits(self.memory)
        found["fitting"] = None if self.fitting is None else self.fitting.as_dict()
        return found

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "at its most", "at the peak")]
        held, peak = asdict(self.held), asdict(self.peak)
        rows += [(kind, in_words(held[kind]), in_words(peak[kind])) for kind in KINDS]
        rows.append(("all", "", f"{in_words(self.peak.total)}, in {_MOMENTS[self.moment]}"))
        if self.host:
            rows.append(("on the host", in_words(self.host), ""))
        said = [f"a rank of {self.ranks}, mesh {mesh_in_words(self.mesh)}", *_table(rows)]
        if self.traffic:
            heading = ("each step", "over", "calls", "tensors", "a rank sends")
            said += ["", *_table([heading, *map(_row, self.traffic)])]
        if self.memory is not None:
            said += ["", self._verdict()]
        return "\n".join(said)

    def _verdict(self) -> str:
        assert self.memory is not None
        if self.fits(self.memory):
            return f"fits {in_words(self.memory)}"
        text = f"does not fit {in_words(self.memory)}"
        if self.fitting is None:
            return f"{text}, nor with anything that was tried"
        return f"{text}; with {', '.join(self.fitting.changes)} it takes {in_words(self.fitting.peak.total)}"


_MOMENTS = {"forward": "the forward pass", "backward": "the backward pass", "optimizer": "the optimizer's step"}


def _row(traffic: Traffic) -> tuple[str, ...]:
    over = f"{traffic.dimension} ({traffic.ranks} ranks)"
    return (traffic.collective, over, str(traffic.calls), in_words(traffic.bytes), in_words(traffic.sent))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def in_words(count: float) -> str:
    """Bytes with a unit, such as "312.0 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def bytes_of(memory: int | str) -> int:
    """A size in bytes: a number, or a text such as "80GB" or "24GiB". Raises ArgumentError."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]I?|)B?\s*", str(memory).upper())
    if match is None or isinstance(memory, bool) or not float(match[1]):
        raise ArgumentError(f"memory is {memory!r}; give a number of bytes, or a text such as 80GB or 24GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def mesh_in_words(sizes: Mapping[str, int]) -> str:
    """A mesh as `allstep run --mesh` reads it, "none" without one."""
    return ",".join(f"{name}={size}" for name, size in sizes.items()) if sizes else "none"
