"""World: this process' place among the ranks, and the doors to what they do together.

Contract: `allstep.init` makes one and makes it the current World; `close`, or the end of its `with` block, ends it. In
between, each method that crosses ranks is called by every rank at the same point. With one rank every method has its
single-process meaning and no process group exists. Used after `close`, methods raise WorldError; attributes stay
readable. When an exception leaves the `with` block nothing waits for the other ranks.

It is thin on purpose: devices are chosen in `device`, ranks meet in `rendezvous`, and the doors to the collectives are
`Exchanging`'s.
"""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from allstep.coordination import Alone, Coordinator, GroupCoordinator
from allstep.data import Loader, SampleSeeding, make_loader
from allstep.exit_codes import PREEMPTED
from allstep.faults import RankPosition, strike
from allstep.monitor.client import Client
from allstep.parallel import unwrap, wrap_module
from allstep.placement import Placement
from allstep.protocol.heartbeat import RankActivity
from allstep.protocol.messages import SECTIONS
from allstep.world import current
from allstep.world import early_signals as notices
from allstep.world.collectives import Collectives, Exchanging, Waits
from allstep.world.device import choose_transport, seed_device
from allstep.world.failures import Reporter
from allstep.world.move import to_device
from allstep.world.process_group import Group
from allstep.world.seed import seed_generators
from allstep.world.store import first_then_rest, seconds

T = TypeVar("T")

_TURN = timedelta(hours=12)


class World(Exchanging):
    """This process' rank, device and peers; made by `allstep.init`.

    Attributes:
        placement: where the launcher put this process.
        device: this rank's device.
        backend: of the process group; None in a world of one, which has none.
        seed: what `seed_everything` was given last, or None.
        coordinator: how engines of this world agree.
        pulse: where this rank is; what a service that watches over the ranks is told.
        reporter: how exceptions are told to that service; None where there is none.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        group: Group | None,
        timeout: float,
        pulse: RankActivity | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.placement = placement
        self.device = device
        self.backend: str | None = group.backend if group is not None else None
        self.seed: int | None = None
        self.pulse = RankActivity() if pulse is None else pulse
        self.reporter = reporter
        self._group = group
        self._timeout = timeout
        self._turns = 0
        self._wrapped: list[weakref.ref[nn.Module]] = []
        transport = choose_transport(device, group.backend) if group is not None else device
        self.coordinator: Coordinator = (
            Alone()
            if group is None
            else GroupCoordinator(group.for_agreement(timeout), self.pulse, carries=transport.type)
        )
        collectives = Collectives(self.rank, self.world_size, device, transport)
        super().__init__(collectives, None if group is None or reporter is None else Waits(self.pulse))

    @staticmethod
    def current() -> World | None:
        """The World that is open in this process, or None."""
        return current.current()

    @property
    def client(self) -> Client | None:
        """The connection to the service that watches over the ranks, if there is one."""
        return None if self.reporter is None else self.reporter.client

    @property
    def rank(self) -> int:
        """This process among all, from 0."""
        return self.placement.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.placement.world_size

    @property
    def local_rank(self) -> int:
        """This process among those of its node, from 0."""
        return self.placement.local_rank

    @property
    def local_world_size(self) -> int:
        """Number of ranks on this node."""
        return self.placement.local_world_size

    @property
    def node_rank(self) -> int:
        """This node among all, from 0."""
        return self.placement.node_rank

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    def wrap(self, module: nn.Module, *, sync_batchnorm: bool = False, **options: Any) -> nn.Module:
        """Move a module to this rank's device and, when there are peers, wrap it in DDP.

        Args and errors as in `allstep.parallel.wrap_module`.
        """
        self._check_open("wrap")
        pulse = None if self.reporter is None else self.pulse
        with self._waits("wrap"):
            wrapped = wrap_module(
                module, self.device, self.world_size, sync_batchnorm=sync_batchnorm, pulse=pulse, **options
            )
        self._wrapped.append(weakref.ref(wrapped))
        return wrapped

    @property
    def wrapped(self) -> list[nn.Module]:
        """What `wrap` gave, in order, as far as it is still in use."""
        return [module for ref in self._wrapped if (module := ref()) is not None]

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The user's own module inside DDP and torch.compile; what to save and to evaluate on one rank."""
        self._check_open("unwrap")
        return unwrap(module)

    def to_device(self, value: T) -> T:
        """Move all tensors of a nested structure to this rank's device; see `allstep.world.move.to_device`."""
        self._check_open("to_device")
        return to_device(value, self.device)

    def loader(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        max_batch_per_rank: int | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        sample_seeding: SampleSeeding = "sample",
        seed: int | None = None,
        **dataloader_options: Any,
    ) -> Loader:
        """This rank's part of a dataset, as a torch DataLoader.

        Args:
            seed: of order and augmentation; by default this World's `seed`, or 0.
            dataset, batch_size, global_batch_size, max_batch_per_rank, shuffle, drop_last, sample_seeding,
                dataloader_options: see `allstep.data.make_loader`, which raises DataError.
        """
        self._check_open("loader")
        return make_loader(
            dataset,
            rank=self.rank,
            world_size=self.world_size,
            seed=seed if seed is not None else self.seed or 0,
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            max_batch_per_rank=max_batch_per_rank,
            shuffle=shuffle,
            drop_last=drop_last,
            sample_seeding=sample_seeding,
            device_type=self.device.type,
            **dataloader_options,
        )

    @contextmanager
    def main_first(self, *, local: bool = False, timeout: float | timedelta = _TURN) -> Iterator[None]:
        """Run the body on the main rank, then on all others: a download, a preprocessing step that leaves a cache.

        If the body raises on the main rank, the others run theirs all the same and the exception goes on there.

        Args:
            local: each node's local rank 0 goes first on its node, for what lies on a disk of the node.
            timeout: seconds, or a timedelta, that the others wait; 12 hours by default.

        Raises:
            WorldError: the first rank did not finish in time or is gone, on the others.
        """
        self._check_open("main_first")
        limit = seconds("timeout", timeout)
        self._turns += 1
        if self._group is None:
            yield
            return
        key = f"turn/{self._turns}/{self.node_rank if local else 'all'}"
        first = self.local_rank == 0 if local else self.is_main
        waits = nullcontext() if first else self._waits("main_first", depth=2)
        turn = first_then_rest(self._group.meeting.store, key, first=first, timeout=limit, waits=waits)
        with self.pulse.section("idle"), turn:  # `timeout` is its limit, and not a section's
            yield

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Say that the body is work of another kind than a step, so that it is measured and limited as such.

        The watchdog learns how long each kind of work takes and ends a run in which one takes far too long. A handler
        that writes a checkpoint itself does it in `with world.section("checkpoint"):`.

        Args:
            name: "data", "step", "evaluation", "checkpoint" or "handler".

        Raises:
            ValueError: there is no such section.
        """
        self._check_open("section")
        if name not in SECTIONS:
            raise ValueError(f"section is {name!r}; it must be one of {', '.join(map(repr, SECTIONS))}")
        with self.pulse.section(name):
            yield

    def print(self, *values: object, **options: Any) -> None:
        """`print` on the main rank, flushed; nothing on the others."""
        self._check_open("print")
        if self.is_main:
            print(*values, **{"flush": True, **options})

    def seed_everything(self, seed: int, *, per_rank: bool = False) -> int:
        """Seed Python's, numpy's and torch's generators, on all devices, and this World's loaders.

        Args:
            seed: 0 to 2^63 - 1, the same on all ranks.
            per_rank: give each rank a stream of its own, derived from (seed, rank). Without it all ranks draw the same
                numbers: right while a model is built and wherever ranks must decide alike. With it ranks draw
                different dropout masks and noise: right for training. Call it once each way, in this order.

        Returns:
            The seed.

        Raises:
            ValueError, TypeError: the seed is out of range or no integer.
        """
        self._check_open("seed_everything")
        used = seed_generators(seed, self.rank if per_rank else None)
        if self.device.type == "xla":
            seed_device(used)
        self.seed = seed
        return seed

    def close(self) -> None:
        """End the World and its process group (an adopted group stays). Rank 0 waits for the others; twice is once."""
        self._leave(failed=False, patience=self._timeout)

    def __enter__(self) -> World:
        self._check_open("with")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self.reporter is not None:
            self.reporter.leaving(error)
        failed = error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0, PREEMPTED))
        self._leave(failed=failed, patience=self._timeout)

    def leave_at_exit(self) -> None:
        """What `init` registers for a World that nobody closed before the interpreter ends."""
        failed = getattr(sys, "last_value", None) is not None
        self._leave(failed=failed, patience=min(self._timeout, 5.0), in_order=False)

    def _leave(self, *, failed: bool, patience: float, in_order: bool = True) -> None:
        if self._closed:
            return
        self._closed = True
        current.remove(self)
        atexit.unregister(self.leave_at_exit)
        try:
            if not in_order and self.reporter is not None:
                self.reporter.left_open()
            strike(RankPosition("exit", self.rank, self.placement.attempt))
            if self._group is not None:
                with self._waits("close", depth=2):
                    self._group.leave(failed=failed, patience=patience)
            if self.reporter is not None:
                self.reporter.end(failed=failed)
        finally:
            notices.give_back()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        place = f"rank={self.rank}, world_size={self.world_size}"
        return f"World({place}, device={self.device}, backend={self.backend}{state})"
