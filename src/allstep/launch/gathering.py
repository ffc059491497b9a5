"""The head's side of several machines: wait until all are there, hand out their shares, and say the last word.

Contract: made before anything is started, on the rendezvous port, which it holds for the whole run. `complete` waits
until every node has come and returns "", or why they cannot start, after telling those that wait. `start` lets them
begin; `over` waits a moment for those that have not come back.
"""

from __future__ import annotations

import time

from allstep.channel.hub import Hub
from allstep.channel.messages import Refused
from allstep.errors import ConfigurationError
from allstep.launch.introduction import introduce
from allstep.launch.joining import Over, Start
from allstep.launch.machine import Machine
from allstep.launch.plan import Share
from allstep.launch.post import Post, open_door
from allstep.launch.settings import shown_ranks


class Gathering:
    """All machines of a run, as the head sees them."""

    def __init__(self, machine: Machine) -> None:
        nodes = machine.launch.nodes
        assert nodes is not None
        self._machine = machine
        self._nodes = nodes
        self._limit = machine.launch.settings.rdzv_timeout
        self._post = Post(machine.loop, open_door(nodes.ports), introduce(machine.launch), machine.say)

    def complete(self) -> str:
        """Wait for all machines; return why they cannot start, or "" (also where a signal to stop came)."""
        self._post.gather()
        until = time.monotonic() + self._limit
        while self._post.missing() and not self._post.objection and not self._machine.stopped():
            if time.monotonic() >= until:
                break
            self._machine.turn(until)
        refusal = self._refusal()
        if refusal or self._machine.stopped():
            self._post.over(Refused(refusal or "node 0 was stopped"))
        return "" if self._machine.stopped() else refusal

    def world_size(self) -> int:
        """The workers of all machines together."""
        return self._post.roster().world_size()

    def start(self, share: Share, channel_port: int, hub: Hub) -> None:
        """Let the other machines begin an attempt of which the head's share is this, and the hub expect them."""
        roster = self._post.roster()
        firsts = roster.first_ranks()
        for node, first in firsts.items():
            if node != 0:
                hub.expect_node(node, range(first, first + roster.joined[node].workers))
        self._post.start(
            {
                node: Start(
                    run_id=share.run_id,
                    attempt=share.attempt,
                    nonce=share.nonce,
                    channel_port=channel_port,
                    master_port=share.master_port,
                    first_rank=first,
                    world_size=share.world_size,
                    max_restarts=share.max_restarts,
                )
                for node, first in firsts.items()
                if node != 0
            }
        )

    def over(self, status: int, text: str, *, until: float) -> None:
        """Tell every machine that the run has ended, waiting for those that are on their way."""
        while self._post.away() and time.monotonic() < until:
            self._machine.turn(until)
        self._post.over(Over(status, text))

    def close(self) -> None:
        """Give the port back."""
        self._post.close()

    def _refusal(self) -> str:
        if self._post.objection:
            return self._post.objection
        if missing := self._post.missing():
            one = len(missing) == 1
            named = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
            return (
                f"node{'' if one else 's'} {named} of {self._nodes.count} did not come within {self._limit:g} s; check "
                f"that allstep run was started there and reaches {self._nodes.host}, port "
                f"{', '.join(map(str, self._nodes.ports))}, or give --rdzv-timeout more seconds"
            )
        try:
            shown_ranks(self._machine.launch.settings.show, self.world_size())
        except ConfigurationError as error:
            return str(error)
        return ""
