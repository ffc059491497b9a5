"""`init`: from an environment to an open World.

Contract: called once per process and World, by every rank of a start. It finds the placement (a broken environment
fails here, before anything is connected), chooses device and backend, meets the other ranks if there are any, and makes
the World current. If any of it fails, no World is current and no process group is left. A process group that the user's
own code initialised before is adopted: used, and left alone on close.
"""

from __future__ import annotations

import atexit
import os
import socket
import warnings
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from allstep.errors import WorldError
from allstep.faults import Here, strike
from allstep.placement import Placement, Rendezvous, detect
from allstep.world import current, xla
from allstep.world.collectives import Collectives
from allstep.world.device import choose_backend, choose_device, look
from allstep.world.duration import seconds
from allstep.world.group import Group, adopt_group, open_group
from allstep.world.roll_call import Arrival
from allstep.world.world import World

_TIMEOUT = timedelta(minutes=10)


def init(
    backend: str | None = None,
    device: str | torch.device | None = None,
    timeout: float | timedelta = _TIMEOUT,
    seed: int | None = None,
) -> World:
    """Open the World: find this process' place, its device, and the other ranks.

    Args:
        backend: of the process group; by default nccl for CUDA and gloo for the CPU.
        device: by default CUDA by local rank, or MPS in a world of one, or the CPU; see `allstep.world.device`.
        timeout: seconds, or a timedelta, that ranks wait for each other, here and in each collective.
        seed: if given, what `World.seed_everything` is called with.

    Returns:
        The World, to be used as a context manager or closed with `close`.

    Raises:
        PlacementError: the environment does not say which rank this is.
        WorldError: a World is open already, device or backend do not fit, or the ranks did not meet.
    """
    if current.current() is not None:
        raise WorldError(
            "init was called while a World is open; close it first, or use allstep.World.current() to get at it"
        )
    limit = seconds("timeout", timeout)
    placement = detect(os.environ)
    for text in placement.warnings:
        warnings.warn(text, stacklevel=2)
    strike(Here("start", placement.rank, placement.attempt))
    if dist.is_available() and dist.is_initialized():
        world = _adopt(placement, backend, device, limit)
    else:
        world = _open(placement, backend, device, limit)
    try:
        if seed is not None:
            world.seed_everything(seed)
    except BaseException:
        world.close()
        raise
    current.install(world)
    atexit.register(world.leave_at_exit)
    return world


def _open(placement: Placement, backend: str | None, asked: str | torch.device | None, timeout: float) -> World:
    device = _ready(choose_device(placement, look(), asked))
    chosen = choose_backend(device, backend)
    if placement.world_size == 1:
        return World(placement, device, None, timeout)
    arrival = Arrival(
        rank=placement.rank,
        world_size=placement.world_size,
        host=socket.gethostname(),
        pid=os.getpid(),
        device_type=device.type,
        backend=chosen,
        accelerator=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None,
    )
    return World(placement, device, open_group(placement, arrival, device, timeout), timeout)


def _adopt(detected: Placement, backend: str | None, asked: str | torch.device | None, timeout: float) -> World:
    group = adopt_group()
    if backend is not None and backend.lower() != group.backend:
        raise WorldError(
            f"backend is {backend!r}, but torch.distributed is initialised already, with {group.backend}; leave "
            "backend unset to use that group, or do not call init_process_group"
        )
    meanwhile = torch.device("cuda", torch.cuda.current_device()) if group.backend == "nccl" else torch.device("cpu")
    collectives = Collectives(group.rank, group.world_size, meanwhile, meanwhile)
    places = collectives.gather_objects((socket.gethostname(), detected))
    placement = _adopted_placement(group, places)
    device = _ready(choose_device(placement, look(), asked))
    return World(placement, device, group, timeout)


def _adopted_placement(group: Group, places: list[tuple[str, Placement]]) -> Placement:
    """The place of a rank in an adopted group: as the environment says, or else by comparing host names."""
    rank, world_size = group.rank, group.world_size
    if all(place.rank == each and place.world_size == world_size for each, (_, place) in enumerate(places)):
        return places[rank][1]
    hosts = [host for host, _ in places]
    names = list(dict.fromkeys(hosts))
    mine = [each for each, host in enumerate(hosts) if host == hosts[rank]]
    return replace(
        places[rank][1],
        rank=rank,
        world_size=world_size,
        local_rank=mine.index(rank),
        local_world_size=len(mine),
        node_rank=names.index(hosts[rank]),
        nodes=len(names),
        rendezvous=Rendezvous(host=hosts[0], ports=()),
    )


def _ready(device: torch.device) -> torch.device:
    """The device, made this process' own."""
    if device.type == "xla":
        return xla.open_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
