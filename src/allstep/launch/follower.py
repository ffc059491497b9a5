"""A machine that is not node 0: it comes to the head before each attempt and does its share.

Contract: `follow` returns the run's exit status, which the head decides; 84 (peer lost) when the head was lost after
the first attempt began; 128 + N when signal N stopped this machine and the head has not said how the run ended. One
line says how it ended; the report is the head's.
What can go wrong before that is a LaunchError.

A node that is not the head, on its way to it: before each attempt, and until it hears that the run is over.

Contract: `join` connects to the head, says `Join`, and returns its `Start` or `Over`; it tries again where nothing
answers yet, and tries several ports in turn where the place has several. Signals are looked at all the while. What can
go wrong: the head is not reached within the limit, or is silent for `SILENCE` seconds for so long, or refuses this
node; each is a LaunchError that says so.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path

from allstep.diagnosis.hang import Limits
from allstep.errors import ChannelError, LaunchError
from allstep.exit_codes import PEER_LOST
from allstep.launch.attempt import Attempt
from allstep.launch.event_loop import EventLoop
from allstep.launch.folder import AttemptFolder, join_attempt
from allstep.launch.join_protocol import CODEC, Join, Over, Resigned, Start, Waiting, introduce
from allstep.launch.machine import Machine
from allstep.launch.topology import Nodes
from allstep.launch.worker_plan import Share
from allstep.monitor.relay import Relay
from allstep.monitor.service import Finished
from allstep.protocol.address import HERE, join_address, listen
from allstep.protocol.connection import Connection
from allstep.protocol.messages import Refused


def follow(machine: Machine) -> int:
    """Take part in a run that another machine leads."""
    nodes = machine.launch.nodes
    assert nodes is not None
    limit = machine.launch.settings.rdzv_timeout
    begun = False
    finished: Finished | None = None
    while True:
        try:
            answer = join(machine.loop, nodes, introduce(machine.launch), limit, machine.stopped)
        except LaunchError as error:
            if not begun:
                raise
            machine.say(f"node 0 was lost after the attempt: {error}")
            return PEER_LOST
        if answer is None:
            return _resign(machine, nodes, finished)
        if isinstance(answer, Over):
            machine.say(answer.text)
            return answer.status
        begun = True
        limit = SILENCE
        attempt = _take_part(machine, nodes, answer)
        if attempt.diagnosis is not None and attempt.finished is None:
            machine.say(f"run {answer.run_id}: {attempt.diagnosis.cause.what}; this node's workers were ended")
            return PEER_LOST
        finished = attempt.finished


def _resign(machine: Machine, nodes: Nodes, finished: Finished | None) -> int:
    """Leave after a signal to stop; return the run's exit status where the head has said it, else the signal's."""
    assert machine.stopped_by is not None
    text, status = f"stopped by {machine.stopped_by.name}", 128 + machine.stopped_by
    leave(nodes, Resigned(introduce(machine.launch).token, nodes.rank, text))
    if finished is not None and finished.text:
        text, status = finished.text, finished.code
    machine.say(text)
    return status


def _take_part(machine: Machine, nodes: Nodes, start: Start) -> Attempt:
    """Do this machine's share of an attempt."""
    launch = machine.launch
    listener = listen(HERE)
    folder = _folder(machine, start)
    ranks = range(start.first_rank, start.first_rank + launch.workers)
    limits = Limits.parse(launch.settings.limits or launch.environ.get("ALLSTEP_LIMITS", ""))
    share = Share(
        run_id=start.run_id,
        attempt=start.attempt,
        nonce=start.nonce,
        channel=join_address(HERE, listener.getsockname()[1]),
        master_addr=nodes.host,
        master_port=start.master_port,
        workers=launch.workers,
        first_rank=start.first_rank,
        world_size=start.world_size,
        node_rank=nodes.rank,
        nodes=nodes.count,
        max_restarts=start.max_restarts,
        folder=folder.path if folder is not None else None,
    )
    relay = Relay(
        machine.loop.selector,
        listener,
        (nodes.host, start.channel_port),
        nonce=start.nonce,
        attempt=start.attempt,
        node_rank=nodes.rank,
        ranks=tuple(ranks),
        world_size=start.world_size,
        limits=limits,
    )
    with contextlib.closing(relay):
        return machine.attempt(share, relay, folder, relayed=True)


def _folder(machine: Machine, start: Start) -> AttemptFolder | None:
    runs = Path(machine.launch.settings.runs or "runs")
    try:
        return join_attempt(runs, start.run_id, start.attempt)
    except OSError as error:
        machine.say(f"warning: no log can be written to {runs}/{start.run_id}: {error.strerror}; going on without logs")
        return None


SILENCE = 15.0
"""Seconds without a sign of life from the head after which the connection is given up."""

_CONNECT = 2.0
_PAUSE = 0.25


def join(
    loop: EventLoop, nodes: Nodes, introduction: Join, limit: float, stopped: Callable[[], bool]
) -> Start | Over | None:
    """Come to the head and wait there.

    Args:
        loop: the run's loop.
        nodes: where the head is.
        introduction: what to say.
        limit: seconds in which the head has to be reached; when it was lost, again.
        stopped: asked between waits; true ends this with None.

    Raises:
        LaunchError: the head was not reached, or refused this node.
    """
    deadline = time.monotonic() + limit
    seen: dict[int, str] = {}
    for port in itertools.cycle(nodes.ports):
        if stopped():
            return None
        if time.monotonic() >= deadline:
            tried = "; ".join(f"port {each}: {what}" for each, what in seen.items())
            raise LaunchError(
                f"node {nodes.rank} did not reach node 0 at {nodes.host} within {limit:g} s ({tried}); check that it "
                "runs, that host and port are right, and that no firewall is between"
            )
        try:
            with (
                contextlib.closing(_connect(nodes.host, port)) as connection,
                contextlib.closing(_messages(loop, connection, stopped)) as messages,
            ):
                connection.send(CODEC.encode(introduction))
                for message in messages:
                    if isinstance(message, Start | Over):
                        return message
                    if isinstance(message, Refused):
                        if not message.stranger or len(nodes.ports) == 1:
                            raise LaunchError(f"node 0 at {nodes.host}, port {port}, refused: {message.reason}")
                        raise ConnectionError("another run's node 0")
                    deadline = time.monotonic() + limit
        except OSError as error:
            seen[port] = error.strerror or str(error)
            _pause(loop, stopped)
    raise AssertionError("a place has a port")


def leave(nodes: Nodes, message: Resigned) -> None:
    """Tell the head that this node will not come again, if the head is there to hear it."""
    for port in nodes.ports:
        with contextlib.suppress(OSError), contextlib.closing(_connect(nodes.host, port)) as connection:
            connection.send(CODEC.encode(message))


def _connect(host: str, port: int) -> Connection:
    return Connection(socket.create_connection((host, port), timeout=_CONNECT))


def _messages(
    loop: EventLoop, connection: Connection, stopped: Callable[[], bool]
) -> Generator[Start | Over | Refused | Waiting, None, None]:
    """What the head says, as it comes; ends when `stopped`; raises ConnectionError when it is silent or gone."""
    ready: list[bool] = []
    loop.watch(connection.sock.fileno(), lambda: ready.append(True))
    try:
        until = time.monotonic() + SILENCE
        while not stopped():
            if time.monotonic() >= until:
                raise ConnectionError(f"silent for {SILENCE:g} s")
            loop.turn(until)
            if not ready:
                continue
            ready.clear()
            for line in connection.receive():
                until = time.monotonic() + SILENCE
                try:
                    message = CODEC.decode(line)
                except ChannelError as error:
                    raise ConnectionError(str(error)) from error
                if isinstance(message, Start | Over | Refused | Waiting):
                    yield message
            if connection.ended:
                raise ConnectionError(connection.ended)
    finally:
        loop.forget(connection.sock.fileno())


def _pause(loop: EventLoop, stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + _PAUSE
    while time.monotonic() < until and not stopped():
        loop.turn(until)
