"""A second witness for ranks whose heartbeats stopped: what the kernel says that their processes do.

A heartbeat takes the rank's interpreter. One long call that holds the interpreter's lock therefore looks, from outside,
like a process that is frozen. The service of the rank's own node can tell them apart, and `look` does, about once a
second and only for ranks that are silent: a run in which all ranks beat costs nothing. The hub judges by the answers
(`diagnosis.hang`); a relay sends them to it.

A rank says itself which process it is, and is believed where the kernel confirms it; see `process_witness`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from allstep.diagnosis.record import ProcessActivity, RankRecord
from allstep.monitor.process_witness import ProcessWitness
from allstep.protocol.connection import Connection

QUIET_S = 1.5
"""Seconds without a heartbeat, of which one comes in each, after which a rank's process is looked at."""


class SilentRanks:
    """Looks at the processes of silent ranks that report to one service.

    Args:
        connection: a rank's connection to the service; None where there is none.
        age: seconds since a time on the records' clock.
    """

    def __init__(self, connection: Callable[[int], Connection | None], age: Callable[[float], float]) -> None:
        self._connection = connection
        self._age = age
        self._witnesses: dict[int, ProcessWitness | None] = {}  # None: the kernel does not confirm the process

    def look(self, records: Iterable[RankRecord], *, everyone: bool = False) -> list[tuple[int, ProcessActivity]]:
        """What the processes of ranks do, as far as that is known.

        Args:
            records: of the ranks.
            everyone: look at ranks too that are not silent.
        """
        found = []
        for record in records:
            registration = record.registration if record.present else None
            connection = self._connection(record.rank) if registration is not None else None
            if registration is None or connection is None or not (everyone or self._age(record.heard) > QUIET_S):
                self._forget(record.rank)
                continue
            if record.rank not in self._witnesses:
                self._witnesses[record.rank] = ProcessWitness.of_peer(registration.pid, connection.sock)
            witness = self._witnesses[record.rank]
            activity = None if witness is None else witness.activity(time.monotonic())
            if activity is not None:
                found.append((record.rank, activity))
        return found

    def close(self) -> None:
        """Let go of all processes."""
        for rank in list(self._witnesses):
            self._forget(rank)

    def _forget(self, rank: int) -> None:
        witness = self._witnesses.pop(rank, None)
        if witness is not None:
            witness.close()
