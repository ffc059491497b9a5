"""`init`: from an environment to an open World.

Contract: every rank calls it once for each World. The steps, in order:

1. find the placement; a broken environment fails here, before anything is connected;
2. choose device and backend;
3. find the other ranks, if there are any (`rendezvous`);
4. register at the monitoring service, which compares the ranks and raises the same error on all that do not fit
   together (`monitor_link`);
5. open the process group (`process_group`), and make the World current.

Under `allstep run` step 4 comes before step 3, because the supervisor's service is known beforehand. If any step fails,
no World is current and no process group is left. A process group that the user's own code initialised before is
adopted: used, and left alone on close.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from allstep.cuda import device_uuid, use_device
from allstep.errors import WorldError
from allstep.faults import RankPosition, strike
from allstep.placement import Placement, Rendezvous, detect
from allstep.placement.mesh import in_words
from allstep.protocol.heartbeat import RankActivity
from allstep.protocol.registration import RankRegistration
from allstep.suggestions import suggests_keywords
from allstep.version import __version__
from allstep.world import early_signals
from allstep.world.collectives import Collectives
from allstep.world.current import is_interactive
from allstep.world.device import choose_backend, choose_device, unused_devices, visible_hardware
from allstep.world.device_mesh import choose_mesh, mesh_shape
from allstep.world.duration import seconds
from allstep.world.facts import facts_of
from allstep.world.failures import Reporter
from allstep.world.lifetime import make_current
from allstep.world.log_output import show_log
from allstep.world.monitor_link import MonitorService, join, sidecar_service, supervised_service
from allstep.world.process_group import Group, adopt_group, open_group, open_solitary_group
from allstep.world.rendezvous import rendezvous
from allstep.world.world import World, internals
from allstep.world.xla_private import open_device

log = logging.getLogger("allstep.world")

_TIMEOUT = timedelta(minutes=10)
_DEBUGGED_S = 86400.0


@suggests_keywords
def init(
    backend: str | None = None,
    device: str | torch.device | None = None,
    timeout: float | timedelta = _TIMEOUT,
    seed: int | None = None,
    *,
    facts: Mapping[str, object] | None = None,
    mesh: Mapping[str, int] | None = None,
) -> World:
    """Open the World: find this process' place, its device, and the other ranks.

    Args:
        backend: of the process group; by default nccl for CUDA, xccl for XPU, xla for XLA, gloo for the CPU, and for
            any other device what is registered for it.
        device: by default what `allstep run --device` says, which is ALLSTEP_DEVICE; else XLA where PJRT_DEVICE names
            an accelerator, or CUDA or torch's accelerator of another kind by local rank, or MPS in a world of one, or
            the CPU; see `allstep.world.device`.
        timeout: seconds, or a timedelta, that ranks wait for each other, here and in each collective. Where nccl
            carries the collective its limit is above those of the watch over hangs, since it ends the process.
        seed: if given, what `World.seed_everything` is called with.
        facts: what must be the same on all ranks, by name, such as `{"config": settings}`. Before ranks connect, values
            are compared as text and nested mappings key by key.
        mesh: which ranks share a model or a batch, as sizes by name: `{"replicate": 2, "shard": 4}`, `{"shard": -1}`,
            `{"data": 4, "tensor": 2}`. `allstep run --mesh`, which is ALLSTEP_MESH, comes before it. See the guide on
            meshes.

    Returns:
        The World, to be used as a context manager or closed with `close`. In an interactive session of one process,
        such as a notebook, a World that an earlier cell has left open is closed first.

    Raises:
        ArgumentError, ArgumentTypeError: timeout, seed or facts cannot be meant.
        MeshError: a mesh's names or sizes cannot be meant, or do not make up the world.
        PlacementError: the environment does not say which rank this is.
        WorldError: a World is open already, device or backend do not fit, the ranks did not meet, or they differ in
            what must be the same.
    """
    present = World.current()
    if present is not None:
        present._membership.check_open("init")  # in a process that was forked from a rank, it says so
        if present.world_size == 1 and is_interactive():  # a cell that is run again
            present.close()
        else:
            raise WorldError(
                "init was called while a World is open; close it first, or use allstep.World.current() to get at it"
            )
    early_signals.note_early_signals()
    try:
        limit = seconds("timeout", timeout)
        if timeout is _TIMEOUT and "ALLSTEP_DEBUG_RANK" in os.environ:
            limit = _DEBUGGED_S  # the others wait for a person
        same = facts_of(facts, os.environ, {"torch": torch.__version__, "allstep": __version__})
        chosen = choose_mesh(mesh, os.environ)
        if chosen is not None:
            same["mesh"] = in_words(chosen)
        placement = detect(os.environ)
        if device is None:
            device = os.environ.get("ALLSTEP_DEVICE")
        for text in placement.warnings:
            warnings.warn(text, stacklevel=3)  # who called `init`
        strike(RankPosition("start", placement.rank, placement.attempt))
        if dist.is_available() and dist.is_initialized():
            world = _adopt(placement, backend, device, limit, same, chosen)
        else:
            world = _open(placement, backend, device, limit, same, chosen)
    except BaseException:
        early_signals.restore_default_action()
        raise
    try:
        if seed is not None:
            world.seed_everything(seed)
    except BaseException:
        world.close()
        raise
    make_current(world)
    internals(world).hide_log = show_log(is_main=world.is_main)
    if unused := unused_devices(world.device, visible_hardware()):
        log.info("%s", unused)
    return world


def _open(
    placement: Placement,
    backend: str | None,
    asked: str | torch.device | None,
    timeout: float,
    facts: Mapping[str, str],
    mesh: Mapping[str, int] | None,
) -> World:
    activity, shape = RankActivity(), mesh_shape(mesh, placement)
    device = _prepared(choose_device(placement, visible_hardware(), asked), placement)
    chosen = choose_backend(device, backend)
    supervised = supervised_service(placement)
    if supervised is None and placement.world_size == 1 and shape is None:
        return World(placement, device, None, timeout, activity)
    registration = _registration(placement, device, chosen, facts)
    # The supervisor's service is known from the environment; a sidecar's address is in the ranks' store.
    reporter = None if supervised is None else _join(supervised, placement, registration, activity, timeout)
    group = None
    try:
        if placement.world_size > 1:
            info = rendezvous(placement, registration.process, timeout, starts_service=supervised is None)
            try:
                if info.service is not None:
                    reporter = _join(info.service, placement, registration, activity, timeout)
                group = open_group(placement, info, chosen, device, timeout)
            except BaseException:
                info.abandon(placement.world_size)
                raise
        elif shape is not None:
            group = open_solitary_group(chosen, device, timeout)
        return World(placement, device, group, timeout, activity, reporter, shape)
    except BaseException as error:
        if reporter is not None:
            reporter.abandon(error)
        if group is not None:
            group.leave(failed=True, patience=0)
        raise


def _adopt(
    detected: Placement,
    backend: str | None,
    asked: str | torch.device | None,
    timeout: float,
    facts: Mapping[str, str],
    mesh: Mapping[str, int] | None,
) -> World:
    activity = RankActivity()
    group = adopt_group(timeout)
    if backend is not None and backend.lower() != group.backend:
        raise WorldError(
            f"backend is {backend!r}, but torch.distributed is initialised already, with {group.backend}; leave "
            "backend unset to use that group, or do not call init_process_group"
        )
    bound = group.bound_to()
    if asked is not None and bound is not None and not _is_same(torch.device(asked), bound):
        raise WorldError(
            f"device is {asked!r}, but torch.distributed is initialised already, bound to {bound}; leave device unset "
            "to use that, or call init_process_group with another device_id"
        )
    # The device is chosen by local rank, which is only known once the ranks have told each other their hosts.
    carrier = group.carrier()
    collectives = Collectives(group.rank, group.world_size, carrier, carrier, group.on_host)
    places = collectives.gather_objects((socket.gethostname(), detected))
    placement = _adopted_placement(group, places)
    shape = mesh_shape(mesh, placement)
    device = _prepared(choose_device(placement, visible_hardware(), asked if bound is None else bound), placement)
    # The supervisor knows the ranks that it started, and not those of a group that counts them in another way.
    service = supervised_service(placement) if placement == detected else None
    if service is None and placement.world_size > 1:
        service = sidecar_service(group.rendezvous.store, placement, timeout, time.monotonic() + timeout)
    if service is None:
        return World(placement, device, group, timeout, activity, mesh=shape)
    registration = _registration(placement, device, group.backend, facts)
    try:
        reporter = _join(service, placement, registration, activity, timeout)
    except BaseException:
        service.release()
        raise
    return World(placement, device, group, timeout, activity, reporter, shape)


def _registration(
    placement: Placement, device: torch.device, backend: str, facts: Mapping[str, str]
) -> RankRegistration:
    return RankRegistration(
        rank=placement.rank,
        world_size=placement.world_size,
        host=socket.gethostname(),
        pid=os.getpid(),
        device_type=device.type,
        backend=backend,
        accelerator=device_uuid(device) if device.type == "cuda" else None,
        local_rank=placement.local_rank,
        node_rank=placement.node_rank,
        facts=facts,
    )


def _join(
    service: MonitorService,
    placement: Placement,
    registration: RankRegistration,
    activity: RankActivity,
    timeout: float,
) -> Reporter:
    """Register, wait for all other ranks, and begin to send heartbeats and reports."""
    client = join(service, placement, registration, timeout)
    client.start(activity)
    uuid = registration.accelerator
    device = registration.device_type if uuid is None else f"cuda {uuid}"
    reporter = Reporter(client, service, activity, placement.rank, placement.attempt, device)
    reporter.install()
    return reporter


def _adopted_placement(group: Group, places: list[tuple[str, Placement]]) -> Placement:
    """The place of a rank in an adopted group: as the environment says, or else by comparing host names."""
    rank, world_size = group.rank, group.world_size
    if all(place.rank == each and place.world_size == world_size for each, (_, place) in enumerate(places)):
        return places[rank][1]
    hosts = [host for host, _ in places]
    nodes = list(dict.fromkeys(hosts))
    on_this_host = [each for each, host in enumerate(hosts) if host == hosts[rank]]
    return replace(
        places[rank][1],
        rank=rank,
        world_size=world_size,
        local_rank=on_this_host.index(rank),
        local_world_size=len(on_this_host),
        node_rank=nodes.index(hosts[rank]),
        nodes=len(nodes),
        rendezvous=Rendezvous(host=hosts[0], ports=()),
    )


def _is_same(asked: torch.device, bound: torch.device) -> bool:
    return asked.type == bound.type and asked.index in (None, bound.index)


def _prepared(device: torch.device, placement: Placement) -> torch.device:
    """The device, made the one that this process uses by default."""
    if device.type == "xla":
        return open_device(placement.local_rank, placement.local_world_size, placement.world_size)
    if device.type == "cuda":
        use_device(device)
    elif device.index is not None and device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    return device
