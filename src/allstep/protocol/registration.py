"""How a rank introduces itself, and whether the ranks that came can work together: pure functions.

Every rank sends one `RankRegistration` when it connects. The monitor asks `objection` whenever another one came, and
`absent` when it has waited long enough. So either all ranks go on or all are refused with the same text, before any of
them opens a process group that could hang.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_NAMED = 16  # spans of ranks in one message, so that a world of thousands is still named in one line


@dataclass(frozen=True, slots=True)
class RankRegistration:
    """One rank, as it introduces itself.

    `accelerator` identifies the physical CUDA device it will use (its UUID); None on other devices. `facts` are what
    all ranks must agree on, by name: the digest of a configuration file, the value of a setting.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    device_type: str
    backend: str
    accelerator: str | None = None
    local_rank: int = 0
    node_rank: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def process(self) -> str:
        """Which process it is, for comparing and for errors."""
        return f"process {self.pid} on {self.host}"


def objection(registrations: Sequence[RankRegistration], world_size: int | None = None) -> str:
    """Why these ranks cannot form a process group, or not with each other; empty where nothing speaks against it.

    Args:
        registrations: those that have come so far, in the order they came.
        world_size: the number of ranks that was started, where the caller knows it.
    """
    # The checks that explain others come first: two worlds that meet differ in nearly everything.
    first = registrations[0]
    return (
        _world_sizes(registrations, first.world_size if world_size is None else world_size)
        or _strangers(registrations)
        or _duplicates(registrations)
        or _backends(registrations)
        or _facts(registrations)
        or _accelerators(registrations)
    )


def absent(registrations: Iterable[RankRegistration], world_size: int, waited: float) -> str:
    """Who did not come in `waited` seconds; empty where all are there."""
    missing = sorted(set(range(world_size)) - {each.rank for each in registrations})
    if not missing:
        return ""
    return (
        f"{len(missing)} of {world_size} ranks did not arrive within {waited:g} s: {spans(missing)}; check that their "
        "processes started, can reach rank 0's host, and call init; or give init a longer timeout"
    )


def two_processes(rank: int, first: str, second: str) -> str:
    """Two processes are one rank."""
    return (
        f"two processes are rank {rank}: {first} and {second}; give each process its own RANK, or each job its own "
        "MASTER_PORT"
    )


def spans(ranks: Iterable[int]) -> str:
    """Ranks as text: `0, 2-5`; at most a line of them."""
    runs: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return ", ".join(texts[:_NAMED]) + (", ..." if len(texts) > _NAMED else "")


def _world_sizes(registrations: Sequence[RankRegistration], expected: int) -> str:
    first = registrations[0]
    for each in registrations:
        if each.world_size != first.world_size:
            return (
                f"ranks {first.rank} and {each.rank} disagree about world_size: {first.world_size} in "
                f"{first.process}, {each.world_size} in {each.process}; start all ranks with the same number "
                "of processes"
            )
        if each.world_size != expected:
            return (
                f"rank {each.rank} ({each.process}) takes the world to have {each.world_size} ranks, and "
                f"{expected} were started; do not change WORLD_SIZE in the script"
            )
    return ""


def _strangers(registrations: Sequence[RankRegistration]) -> str:
    for each in registrations:
        if not 0 <= each.rank < each.world_size:
            return (
                f"{each.process} says it is rank {each.rank} of a world of {each.world_size}, which has no "
                "such rank; check RANK and WORLD_SIZE"
            )
    return ""


def _duplicates(registrations: Sequence[RankRegistration]) -> str:
    owners: dict[int, RankRegistration] = {}
    for each in registrations:
        owner = owners.setdefault(each.rank, each)
        if owner is not each:
            return two_processes(each.rank, owner.process, each.process)
    return ""


def _backends(registrations: Sequence[RankRegistration]) -> str:
    first = registrations[0]
    for each in registrations:
        if each.backend != first.backend:
            return (
                f"ranks {first.rank} and {each.rank} disagree about backend: {first.backend!r} in {first.process}, "
                f"{each.backend!r} in {each.process}; give all ranks the same environment and arguments of init"
            )
    return ""


def _facts(registrations: Sequence[RankRegistration]) -> str:
    first = registrations[0].facts
    differing: str | None = None
    for each in registrations:
        if each.facts != first:
            # One setting is enough to name, but with all of its values and who has them.
            keys = sorted(first.keys() | each.facts.keys())
            differing = next(key for key in keys if first.get(key) != each.facts.get(key))
            break
    if differing is None:
        return ""
    values: dict[str | None, list[int]] = {}
    for each in sorted(registrations, key=lambda one: one.rank):
        values.setdefault(each.facts.get(differing), []).append(each.rank)
    shown = "; ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}: {'not set' if value is None else repr(value)}"
        for value, ranks in values.items()
    )
    return f"ranks disagree about {differing} ({shown}); give all ranks the same"


def _accelerators(registrations: Sequence[RankRegistration]) -> str:
    owners: dict[str, RankRegistration] = {}
    for each in registrations:
        # gloo copies through the host, so its ranks may share a device.
        if each.backend != "nccl" or each.accelerator is None:
            continue
        owner = owners.setdefault(each.accelerator, each)
        if owner is not each:
            return (
                f"ranks {owner.rank} and {each.rank} ({each.process}) use the same CUDA device, "
                f"{each.accelerator}, and NCCL takes one rank per device; start one process per device, have "
                'the scheduler show each task its own, or share it with backend="gloo"'
            )
    return ""
