"""A machine that is not node 0: it joins the head before each attempt, does its share, and hears how the run ended.

`follow` returns the run's exit status, which the head decides; 84 (peer lost) when the head was lost after the first
attempt began; 128 + N when signal N stopped this machine and the head has not said how the run ended. One line says how
it ended; the report is the head's. What can go wrong before the first attempt is a LaunchError.

`join` connects to the head, sends a `JoinRequest`, and waits for `AttemptStart` or `RunOver`. It tries again where
nothing answers yet, and tries several ports in turn where the head may be at several. Who answers and does not have the
run's key is told nothing, and is not the head; at the only port that can be the head's, that is an error at once.
Signals are looked at all the while.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from allstep.diagnosis.hang import HangLimits
from allstep.errors import ChannelError, LaunchError
from allstep.exit_codes import PEER_LOST
from allstep.launch.attempt import Attempt
from allstep.launch.event_loop import EventLoop
from allstep.launch.folder import AttemptFolder, join_attempt
from allstep.launch.join_protocol import attempt_key, introduce, objection_to_start, run_key, same_key_on_all
from allstep.launch.machine import Machine
from allstep.launch.preflight_agent import AgentProcess
from allstep.launch.topology import Nodes
from allstep.launch.worker_plan import Share
from allstep.monitor.relay import Relay
from allstep.monitor.service import MonitorSettings
from allstep.protocol.address import HERE, join_address, listen
from allstep.protocol.connection import Connection, Connector, connect
from allstep.protocol.foreign_text import one_line
from allstep.protocol.messages import (
    AttemptStart,
    Finish,
    JoinPending,
    NodeResigned,
    Refused,
    RunOver,
    decode,
    encode,
)
from allstep.protocol.preflight_messages import PreflightOrder

SILENCE_S = 15.0
"""Seconds without a word from the head after which the connection is given up."""

_ANSWER_S = 2.0  # that an address of the head has to answer
_PROOF_S = 8.0  # that what answers has to prove that it is the head


def follow(machine: Machine) -> int:
    """Take part in a run that another machine leads."""
    nodes = machine.launch.nodes
    assert nodes is not None
    limit = machine.launch.settings.rdzv_timeout
    key = run_key(machine.launch)
    begun = False
    finished: Finish | None = None
    while True:
        try:
            answer = join(machine, key, limit)
        except LaunchError as error:
            if not begun:  # nothing ran here, so this machine's own error is the whole story
                raise
            machine.say(f"node 0 was lost after the attempt: {error}")
            return PEER_LOST
        if answer is None:
            return _stopped(machine, key, finished)
        if isinstance(answer, RunOver):
            machine.say(one_line(answer.text))
            return answer.status & 0xFF
        # Between attempts the head is there or has been lost; it is not about to be started.
        begun = True
        limit = SILENCE_S
        attempt = _take_part(machine, nodes, key, answer)
        if attempt.diagnosis is not None and attempt.finished is None:
            machine.say(f"run {answer.run_id}: {attempt.diagnosis.cause.what}; this node's workers were ended")
            return PEER_LOST
        finished = attempt.finished


def _stopped(machine: Machine, key: str, finished: Finish | None) -> int:
    """Leave after a signal to stop; return the run's exit status where the head has said it, else the signal's."""
    assert machine.stopped_by is not None
    # The head waits for this machine before the next attempt, so it is told even where the run is over.
    text, status = f"stopped by {machine.stopped_by.name}", 128 + machine.stopped_by
    nodes = machine.launch.nodes
    assert nodes is not None
    resign(nodes, key, NodeResigned(nodes.rank, text))
    if finished is not None and finished.text:
        text, status = one_line(finished.text), finished.code & 0xFF
    machine.say(text)
    return status


def _take_part(machine: Machine, nodes: Nodes, run: str, start: AttemptStart) -> Attempt:
    """Do this machine's share of an attempt, with a key made of that of the `run`."""
    launch = machine.launch
    key = attempt_key(run, start.salt)
    listener = listen(HERE)
    folder = _folder(machine, start)
    ranks = range(start.first_rank, start.first_rank + launch.workers)
    limits = HangLimits.parse(launch.settings.limits or launch.environ.get("ALLSTEP_LIMITS", ""))
    share = Share(
        run_id=start.run_id,
        attempt=start.attempt,
        key=key,
        channel=join_address(HERE, listener.getsockname()[1]),
        master_addr=nodes.host,
        master_port=start.master_port,
        workers=launch.workers,
        first_rank=start.first_rank,
        world_size=start.world_size,
        node_rank=nodes.rank if start.node_rank < 0 else start.node_rank,
        nodes=start.nodes or nodes.count,
        max_restarts=start.max_restarts,
        folder=folder.path if folder is not None else None,
    )
    relay = Relay(
        machine.loop.selector,
        listener,
        MonitorSettings(key, start.attempt, start.world_size, limits),
        upstream=(nodes.host, start.channel_port),
        node_rank=share.node_rank,
        ranks=tuple(ranks),
    )
    with contextlib.closing(relay):
        return machine.attempt(share, relay, folder, relayed=True)


def _folder(machine: Machine, start: AttemptStart) -> AttemptFolder | None:
    runs = Path(machine.launch.settings.runs or "runs")
    try:
        return join_attempt(runs, start.run_id, start.attempt)
    except OSError as error:
        machine.say(f"warning: no log can be written to {runs}/{start.run_id}: {error.strerror}; going on without logs")
        return None


def join(machine: Machine, key: str, limit: float) -> AttemptStart | RunOver | None:
    """Come to the head and wait there; None where a signal to stop came.

    Args:
        machine: this one.
        key: the run's, which the head has to have.
        limit: seconds in which the head has to be reached; when it was lost, again.

    Raises:
        LaunchError: the head was not reached, or was silent for `SILENCE_S` for so long, or refused this machine, or
            what answers is not the head.
    """
    nodes, loop, stopped = machine.launch.nodes, machine.loop, machine.stopped
    assert nodes is not None
    request = introduce(machine.launch)
    targets = [(nodes.host, port) for port in nodes.ports]
    with (
        contextlib.ExitStack() as stack,
        contextlib.closing(Connector(targets, key=key, within=limit, answer=_ANSWER_S, proof=_PROOF_S)) as connector,
    ):
        while (connection := _connect(loop, connector, stopped)) is not None:
            try:
                connection.send(encode(request))
                agent: AgentProcess | None = None
                for message in _messages(loop, connection, stopped):
                    host, port = connector.target
                    if isinstance(message, PreflightOrder):
                        if agent is None:
                            agent = AgentProcess(machine, connection.send)
                            stack.callback(agent.close)
                        agent.order(replace(message, key=attempt_key(key, message.salt)))
                    if isinstance(message, Refused):
                        raise LaunchError(f"node 0 at {host}, port {port}, refused: {one_line(message.reason)}")
                    if isinstance(message, RunOver):
                        return message
                    if isinstance(message, AttemptStart):
                        if objection := objection_to_start(message, machine.launch.workers):
                            raise LaunchError(f"node 0 at {host}, port {port}, is not to be trusted: {objection}")
                        return message
                    connector.until = time.monotonic() + limit  # the head is there; should it be lost, begin to count
            except ConnectionError as error:
                connector.reject(error.strerror or str(error))
            finally:
                connection.close()
        if stopped():
            return None
        tried = "; ".join(f"port {port}: {what}" for (_, port), what in connector.problems.items())
    if connector.others:
        raise LaunchError(
            f"node {nodes.rank} found no node 0 of this run at {nodes.host} ({tried}). Another run may be there, or "
            f"somebody who wants to be taken for this one; {same_key_on_all(machine.launch)}"
        )
    raise LaunchError(
        f"node {nodes.rank} did not reach node 0 at {nodes.host} within {limit:g} s ({tried}); check that it "
        "runs, that host and port are right, and that no firewall is between"
    )


def resign(nodes: Nodes, key: str, message: NodeResigned) -> None:
    """Tell the head that this machine will not come again, if the head is there to hear it."""
    # To all ports: at which of them this run's head is, only an answer would tell.
    for port in nodes.ports:
        with (
            contextlib.suppress(ConnectionError),
            contextlib.closing(
                connect([(nodes.host, port)], key=key, within=_ANSWER_S, answer=_ANSWER_S, retry=False)
            ) as connection,
        ):
            connection.send(encode(message))


def _connect(loop: EventLoop, connector: Connector, stopped: Callable[[], bool]) -> Connection | None:
    """Turn the loop until there is a connection; None where there will be none, or `stopped`."""
    while connector.connection is None and not connector.failed and not stopped():
        descriptor = -1 if connector.sock is None else connector.sock.fileno()
        if descriptor != -1:
            loop.watch(descriptor, lambda: None, connector.events)
        try:
            loop.turn(connector.deadline())
        finally:
            if descriptor != -1:
                loop.forget(descriptor)
        connector.advance()
    return None if stopped() else connector.connection


def _messages(
    loop: EventLoop, connection: Connection, stopped: Callable[[], bool]
) -> Iterator[AttemptStart | RunOver | Refused | JoinPending | PreflightOrder]:
    """What the head says, as it comes; ends when `stopped`; raises ConnectionError when it is silent or gone."""
    until = time.monotonic() + SILENCE_S
    while not stopped():
        if time.monotonic() >= until:
            raise ConnectionError(f"silent for {SILENCE_S:g} s")
        lines = _receive(loop, connection, until)
        if lines:
            until = time.monotonic() + SILENCE_S
        for line in lines:
            try:
                message = decode(line)
            except ChannelError as error:
                raise ConnectionError(str(error)) from error
            if isinstance(message, AttemptStart | RunOver | Refused | JoinPending | PreflightOrder):
                yield message
        if connection.ended:
            raise ConnectionError(connection.ended)


def _receive(loop: EventLoop, connection: Connection, until: float) -> list[bytes]:
    """Turn the loop once, and return the lines that came from the head."""
    descriptor = connection.sock.fileno()
    loop.watch(descriptor, lambda: None)
    try:
        loop.turn(until)
    finally:
        loop.forget(descriptor)
    return list(connection.receive())
