"""The default process group while a World is open: made and ended by allstep, or the user's own, adopted.

Contract: `open_group` initialises torch.distributed among ranks that have met; `adopt_group` takes the group that is
there already. `Group.leave` undoes what `open_group` did, and for an adopted group nothing. If opening fails, nothing
is left initialised.

Where a collective runs out of time, gloo raises, and nccl ends the process, on each rank that waited. That would speak
before the watch over hangs, which knows who is behind. So nccl's limit stands above every finite one of that watch.

Leaving in order: the group is destroyed, the rank says in the store that it left, and rank 0, which serves the store,
waits until all have said so, since a rank still at work may need it. A store that does not answer is waited for once,
for `store.PATIENCE_S` seconds; then the rank warns and goes. Leaving after an error: nothing is waited for. A gloo
group with a pending collective would wait for it in its destructor, so its C++ object is then kept until the process
ends; nccl's communicators are aborted. Either call into nccl may itself wait for ranks that are gone, or for a device
that hangs, so it is waited for in another thread, and given up after a while.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from allstep.diagnosis.flight_records import OWN
from allstep.diagnosis.hang import HangLimits
from allstep.errors import WorldError
from allstep.placement import Placement
from allstep.world.bounded_store import BoundedStore, poll
from allstep.world.device import backend_of, bound_device
from allstep.world.interface import name_interface
from allstep.world.lifetime import keep_for_ever
from allstep.world.rendezvous import RendezvousInfo
from allstep.world.torch_private import PrefixStore, abort_nccl_groups, default_store, open_groups

_LEFT_MARK_S = 2.0
_GLOO_RELEASE_S = 0.05
_NCCL_LEAVE_S = 30.0  # for all ranks to let go of their communicators
_NCCL_ABORT_S = 10.0
_AFTER_WATCH_S = 120.0  # for the watch to gather stacks, to report and to have ranks leave


@dataclass(slots=True)
class Group:
    """The process group of a World.

    Attributes:
        backend: such as gloo, nccl or cpu:gloo,cuda:nccl.
        rendezvous: the ranks' store, and on rank 0 its server.
        rank, world_size: this rank, among how many.
        owned: whether allstep made the group and ends it.
        timeout: seconds that ranks wait for each other.
    """

    backend: str
    rendezvous: RendezvousInfo
    rank: int
    world_size: int
    owned: bool = True
    timeout: float = 600.0
    _made: list[dist.ProcessGroup] = field(default_factory=list)
    _agreement: dist.ProcessGroup | None = None

    def bound_to(self) -> torch.device | None:
        """The device that the default group is bound to, by `device_id`."""
        group = dist.group.WORLD
        return None if group is None else group.bound_device_id

    def carrier(self) -> torch.device:
        """A device of this process whose tensors the default group takes; the CPU where it does."""
        kinds = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
        if "cpu" in kinds:
            return torch.device("cpu")
        bound = self.bound_to()
        if bound is not None or kinds[0] == "xla":  # torch's accelerator is another one, where there is any
            return bound or torch.device("xla")
        return torch.device(kinds[0], torch.accelerator.current_device_index())

    def for_agreement(self) -> dist.ProcessGroup:
        """A gloo group of all ranks for what engines agree on, so that it never waits behind gradients.

        It is opened when it is first asked for, which all ranks do at the same point, and from the main thread.
        """
        if self._agreement is None:
            limit = timedelta(seconds=self.timeout)
            made = dist.new_group(backend="gloo", timeout=limit, group_desc=f"{OWN} agreement")
            assert isinstance(made, dist.ProcessGroup)
            self._made.append(made)
            self._agreement = made
        return self._agreement

    def on_host(self) -> dist.ProcessGroup | None:
        """The group that carries what is on the host: the default one (None) where it does, else that for agreement."""
        return None if backend_of("cpu", self.backend) is not None else self.for_agreement()

    def split(self, lines: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        """Groups of the ranks of each line, of which this rank is in one: that is returned."""
        limit = timedelta(seconds=collective_limit(self.backend, self.timeout))
        mine, _ = dist.new_subgroups_by_enumeration(lines, timeout=limit)  # type: ignore[no-untyped-call]
        assert isinstance(mine, dist.ProcessGroup)
        self._made.append(mine)
        return mine

    def parts(self) -> list[object]:
        """What has threads, or sockets that other ranks hear from when they are closed."""
        return [*open_groups(self._made), self.rendezvous.store.raw, self.rendezvous.server]

    def leave(self, *, failed: bool, patience: float) -> None:
        """End the group, if it is allstep's.

        Args:
            failed: an exception ends the World: do not wait for other ranks.
            patience: seconds that rank 0 waits for the others otherwise.
        """
        if not self.owned:
            return
        # Held here, so that the server ends with this call, whatever becomes of the World.
        server, self.rendezvous.server = self.rendezvous.server, None
        if failed:
            forget_groups(abort=True, known=self._made)
            self._mark_as_left()
            return
        deadline = time.monotonic() + patience
        try:
            # A rank may be done before a slower peer has completed the connection between them in its own `init`.
            poll(lambda: self.rendezvous.store.add("connected", 0) >= self.world_size, deadline)
        except WorldError as error:
            _warn(f"{error}. This rank closes its World without it")
            forget_groups(abort=False)
            return
        forget_groups(abort=False)
        self._mark_as_left()
        if server is not None and not poll(self._all_left, deadline):
            present = [rank for rank in range(self.world_size) if not self.rendezvous.store.check([f"left/{rank}"])]
            _warn(f"rank 0 waited {patience:g} s for ranks {present} to close their World and now leaves without them")

    def _all_left(self) -> bool:
        return self.rendezvous.store.add("left", 0) >= self.world_size

    def _mark_as_left(self) -> None:
        store = self.rendezvous.store.with_patience(_LEFT_MARK_S)
        with contextlib.suppress(dist.DistError, WorldError):
            store.set(f"left/{self.rank}", "")
            store.add("left", 1)


def open_group(placement: Placement, info: RendezvousInfo, backend: str, device: torch.device, timeout: float) -> Group:
    """Initialise torch.distributed among ranks that have met and fit together.

    Raises:
        WorldError: the backend could not connect them.
    """
    assert placement.rendezvous is not None
    # Every group over several nodes has a gloo group beside it, for what engines agree on.
    remedy = name_interface(placement.rendezvous) if placement.nodes > 1 else ""
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", info.store.raw),
            rank=placement.rank,
            world_size=placement.world_size,
            timeout=timedelta(seconds=collective_limit(backend, timeout)),
            device_id=bound_device(device, backend),
        )
    except Exception as error:
        forget_groups(abort=True)
        raise WorldError(
            f"rank {placement.rank} of {placement.world_size}: {backend} could not connect the ranks, which "
            f"had met at {placement.rendezvous}: {error}" + (f". {remedy[0].upper()}{remedy[1:]}" if remedy else "")
        ) from error
    info.store.add("connected", 1)
    return Group(backend, info, placement.rank, placement.world_size, timeout=timeout)


def open_solitary_group(backend: str, device: torch.device, timeout: float) -> Group:
    """A group of this process alone, so that a mesh means the same in a world of one as in any other."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=0,
        world_size=1,
        device_id=bound_device(device, backend),
    )
    info = RendezvousInfo(BoundedStore(PrefixStore("allstep", store)))
    info.store.add("connected", 1)
    return Group(backend, info, 0, 1, timeout=timeout)


def adopt_group(timeout: float) -> Group:
    """The process group that the user's own code initialised."""
    rank, size = dist.get_rank(), dist.get_world_size()
    base = BoundedStore(PrefixStore("allstep", default_store()))
    # The group may outlive several Worlds: each has keys of its own, by how often this rank has been here.
    store = base.with_prefix(f"generation/{base.add(f'generation/{rank}', 1)}")
    return Group(_named_backend(), RendezvousInfo(store), rank, size, owned=False, timeout=timeout)


def _named_backend() -> str:
    """The default group's backend, or what torch took for each device where the script named none."""
    backend = dist.get_backend()
    if backend != dist.Backend.UNDEFINED:
        return backend
    by_device = dist.get_backend_config()
    names = {part.partition(":")[2] for part in by_device.split(",")}
    return names.pop() if len(names) == 1 else by_device


def collective_limit(backend: str, timeout: float) -> float:
    """Seconds that a collective may last in a group, of a World whose ranks wait `timeout` seconds for each other."""
    if "nccl" not in backend:
        return timeout
    limits = HangLimits.parse(os.environ.get("ALLSTEP_LIMITS", ""))
    every = [*(most for _, most in limits.bounds.values()), limits.silence, limits.apart]
    watched = max((limit for limit in every if math.isfinite(limit)), default=0.0)
    return max(timeout, watched + _AFTER_WATCH_S)


def forget_groups(*, abort: bool, known: Sequence[dist.ProcessGroup] = ()) -> None:
    """Take torch.distributed's groups down.

    Args:
        abort: wait for no rank and for no pending work.
        known: groups that allstep made beside the default one.
    """
    if not dist.is_initialized():
        return
    if not abort:
        # Gloo's threads let go of a collective's tensors some milliseconds after it returned, for which they need
        # Python's lock. A model that `World.wrap` made may be freed under that very lock (`parallel.wrap.hold_group`).
        # One that a user put in DDP may be the group's last owner, so give the threads the time before that.
        time.sleep(_GLOO_RELEASE_S)
        if not _has_nccl(open_groups(known)):
            dist.destroy_process_group()
        elif not _within(_NCCL_LEAVE_S, dist.destroy_process_group):
            _warn(f"nccl did not let go of its groups within {_NCCL_LEAVE_S:g} s; this rank leaves them as they are")
            _within(_NCCL_ABORT_S, lambda: abort_nccl_groups(list(open_groups(known))))
        return
    backends = open_groups(known)
    for group, backend in backends.items():
        # With one reference too many the destructor of a gloo group, which waits for pending collectives, never runs.
        if "gloo" in backend:
            keep_for_ever([group])
    with contextlib.suppress(RuntimeError):
        if _has_nccl(backends):
            _within(_NCCL_ABORT_S, lambda: abort_nccl_groups(list(backends)))
        else:
            dist.destroy_process_group()


def _has_nccl(backends: Mapping[dist.ProcessGroup, str]) -> bool:
    return any("nccl" in backend for backend in backends.values())


def _within(seconds: float, call: Callable[[], object]) -> bool:
    """Make a call in another thread and wait for so long; whether it came back. What it raises is raised here."""
    raised: list[BaseException] = []
    device = None if dist.group.WORLD is None else dist.group.WORLD.bound_device_id

    def run() -> None:
        try:
            if device is not None:
                torch.accelerator.set_device_index(device.index)  # each thread has a current device of its own
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="allstep leaves nccl")
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    return not thread.is_alive()


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=5)
