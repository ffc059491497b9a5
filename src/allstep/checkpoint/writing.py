"""What happens to a save once its state is copied: it is committed, and what is no longer needed is removed.

Contract: a `Store` has one `Writer` and lets one save at a time through it, on every rank, in the thread of that save.
`write` raises nothing: it returns why the save failed, the same fact on every rank, and says so in the log. That an old
checkpoint cannot be removed is said and fails nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from allstep.checkpoint.commit import Order, commit
from allstep.checkpoint.listing import committed
from allstep.checkpoint.removal import remove_checkpoint
from allstep.checkpoint.retention import Retention
from allstep.checkpoint.storage import Storage
from allstep.coordination import Coordinator
from allstep.errors import CheckpointError

log = logging.getLogger("allstep.checkpoint")


class Writer:
    """Commits saves to `storage` with the other ranks, which it meets through `coordinator`."""

    def __init__(self, storage: Storage, coordinator: Coordinator, retention: Retention) -> None:
        self._storage = storage
        self._coordinator = coordinator
        self._retention = retention
        self._lacked_metric = False

    def write(self, order: Order) -> CheckpointError | None:
        """Write this rank's part of a save and commit it with the others; returns why that failed."""
        error: CheckpointError | None = None
        try:
            commit(order, self._storage, self._coordinator)
        except CheckpointError as failure:
            error = failure
        except Exception as failure:
            error = CheckpointError(f"step {order.name.step} was not saved: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
        if error is not None:
            log.error("%s (rank %d)", error, self._coordinator.rank)
        elif self._coordinator.rank == 0:
            self._retire()
        return error

    def check_metric(self, metrics: Mapping[str, float]) -> None:
        """Warn once when the metric that the best are kept by is not among those that are saved."""
        best = self._retention.keep_best
        if best is None or best[1] in metrics or self._lacked_metric or self._coordinator.rank:
            return
        self._lacked_metric = True
        log.warning(
            "metric %r is not among those that are saved (%s): checkpoints without it are never among the best",
            best[1],
            ", ".join(sorted(metrics)) or "none",
        )

    def _retire(self) -> None:
        try:
            for name in self._retention.expendable(committed(self._storage)):
                remove_checkpoint(self._storage, str(name))
        except Exception as error:
            log.warning("old checkpoints in %s could not be removed: %s", self._storage.root, error)
