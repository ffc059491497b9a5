"""A machine that is not node 0: it comes to the head before each attempt and does its share.

Contract: `follow` returns the run's exit status, which the head decides; 84 (peer lost) when the head was lost after
the first attempt began; 128 + N when signal N stopped this machine and the head has not said how the run ended. One
line says how it ended; the report is the head's.
What can go wrong before that is a LaunchError.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from allstep.channel.address import join_address
from allstep.channel.events import Finished
from allstep.channel.limits import Limits
from allstep.channel.listening import HERE, listen
from allstep.channel.relay import Relay
from allstep.errors import LaunchError
from allstep.exit_codes import PEER_LOST
from allstep.launch.attempt import Attempt
from allstep.launch.folder import AttemptFolder, join_attempt
from allstep.launch.introduction import introduce
from allstep.launch.joiner import SILENCE, join, leave
from allstep.launch.joining import Over, Resigned, Start
from allstep.launch.machine import Machine
from allstep.launch.nodes import Nodes
from allstep.launch.plan import Share


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
        if attempt.case is not None and attempt.finished is None:
            machine.say(f"run {answer.run_id}: {attempt.case.cause.what}; this node's workers were ended")
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
