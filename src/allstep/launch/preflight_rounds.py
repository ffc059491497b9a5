"""A preflight as node 0 leads it: steps that all machines take together, and what follows from their answers.

Contract: `preflight` is called when all machines have come and before the first attempt. It says what is not good, a
line for each, and returns the nodes that are to be left out; LaunchError where the run cannot do without one that is
ill. In order:
1. look: host checks on every machine, and a computation on every device;
2. clock: the time of every machine;
3. links: every pair of machines is measured, in about log2(N) rounds. In round k node i turns to the nodes i XOR m for
   m from 2^k to 2^(k+1) - 1, one after the other. So each pair has its turn once, and nodes that keep pace are in one
   pair at a time. The lower of a pair measures, and the higher only connects: a firewall may let through one of the
   two. Links that stand out are measured once more;
4. reduce: a small all-reduce of all devices of the machines that are well so far.
A node that does not answer in time is ill itself. Nothing is added to a run without `--preflight`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from allstep.errors import ChannelError, LaunchError
from allstep.launch.machine import Machine
from allstep.launch.preflight_agent import AgentProcess
from allstep.preflight.judgement import (
    Illness,
    NodeAnswers,
    choose_left_out,
    in_lines,
    is_suspect,
    judge_clocks,
    judge_links,
    judge_nodes,
    judge_reduction,
    judge_sums,
)
from allstep.protocol.address import HERE, new_key
from allstep.protocol.messages import decode
from allstep.protocol.preflight_messages import DeviceSums, LinkMeasured, NodeFinding, PreflightOrder, StepDone

if TYPE_CHECKING:
    from allstep.launch.join_server import NodeAssembly

LOOK_S = 55.0
CLOCK_S = 5.0
PAIR_S = 7.0
REDUCE_S = 25.0
"""Seconds that a step may take, beyond what the agents' own limits are; a healthy one takes a tenth of that."""


def preflight(machine: Machine, assembly: NodeAssembly | None) -> frozenset[int]:
    """Find out who is fit; returns the nodes to leave out.

    Args:
        machine: this one, node 0.
        assembly: the others; None where there are none.

    Raises:
        LaunchError: a machine is ill that cannot be left out.
    """
    began = time.monotonic()
    with contextlib.closing(_Rounds(machine, assembly)) as rounds:
        illnesses = rounds.run()
    if machine.stopped():
        return frozenset()
    for line in in_lines(illnesses):
        machine.say(f"preflight: {line}")
    left_out = choose_left_out(illnesses)
    seconds = time.monotonic() - began
    allowed = machine.launch.settings.exclude_ill
    named = f"node{'s' if len(left_out) > 1 else ''} {', '.join(map(str, sorted(left_out)))}"
    if not left_out:
        machine.say(f"preflight: {rounds.summary()}, all fit ({seconds:.1f} s)")
    elif 0 in left_out or len(left_out) > allowed or len(left_out) >= len(rounds.answers):
        first = next(illness.text for illness in illnesses if illness.serious)
        more = "node 0 cannot be left out" if 0 in left_out else f"--exclude-ill {len(left_out)} would go on without"
        raise LaunchError(f"the preflight found {named} ill ({first}), so nothing was started; {more}")
    else:
        machine.say(f"preflight: going on without {named} ({seconds:.1f} s)")
    return left_out


def rounds_of_pairs(count: int) -> list[dict[int, tuple[int, ...]]]:
    """For each round, whom each node turns to, in order; each pair of `count` nodes is in one, from both sides."""
    rounds = []
    for k in range(max(0, count - 1).bit_length()):
        peers = {
            node: tuple(node ^ m for m in range(1 << k, 1 << (k + 1)) if node ^ m < count) for node in range(count)
        }
        rounds.append({node: chosen for node, chosen in peers.items() if chosen})
    return rounds


class _Rounds:
    """The steps of one preflight, and what has been heard."""

    def __init__(self, machine: Machine, assembly: NodeAssembly | None) -> None:
        self._machine = machine
        self._assembly = assembly
        nodes = machine.launch.nodes
        self._addresses: Mapping[int, str] = {0: nodes.host if nodes is not None else HERE}
        self._first_ranks: Mapping[int, int] = {0: 0}
        self._workers: Mapping[int, int] = {0: machine.launch.workers}
        names = {0: "node 0"}
        if assembly is not None:
            assembly.hear(self._hear)
            self._addresses = {**self._addresses, **assembly.addresses()}
            self._first_ranks, self._workers = assembly.first_ranks(), assembly.workers()
            names = {node: f"node {node} ({host})" for node, host in assembly.hosts().items()}
        self.answers = {node: NodeAnswers(name) for node, name in sorted(names.items())}
        self._done: dict[int, StepDone] = {}
        self._number = 0
        self._step = ""
        self._gone: set[int] = set()
        self._pairs = 0
        self._agent = AgentProcess(machine, lambda line: self._hear(0, line))

    def run(self) -> list[Illness]:
        """Take all steps; return what is wrong."""
        illnesses: list[Illness] = []
        nodes = sorted(self.answers)
        base = PreflightOrder(
            0,
            "",
            nodes=len(nodes),
            salt=new_key(),
            addresses={str(node): address for node, address in self._addresses.items()},
        )
        looked = self._take("look", {node: replace(base, first_rank=self._first_ranks[node]) for node in nodes}, LOOK_S)
        base = replace(base, ports={str(node): str(done.port) for node, done in looked.items()})
        store = looked[0].store if 0 in looked else 0
        self._ask_clocks(base)
        confirmed = self._measure(base)
        illnesses += [*judge_nodes(self.answers), *judge_clocks(self.answers), *judge_sums(self.answers)]
        illnesses += judge_links(self.answers, confirmed)
        fit = [node for node in nodes if node not in choose_left_out(illnesses)]
        if 0 in fit and store and not self._machine.stopped():
            self._reduce(replace(base, store=store), fit)
            illnesses += judge_reduction(self.answers)
            illnesses += [each for each in judge_nodes(self.answers) if each.nodes[0] in fit and each not in illnesses]
        return illnesses

    def summary(self) -> str:
        """What was looked at, in words."""
        devices = sum(len(each.sums) for each in self.answers.values())
        words = [f"{len(self.answers)} node", f"{self._pairs} pair", f"{devices} device"]
        return ", ".join(each if each.startswith("1 ") else f"{each}s" for each in words)

    def close(self) -> None:
        """End this machine's agent, and have the others end theirs."""
        for node in self.answers:
            if node != 0 and node not in self._gone:
                self._send(node, PreflightOrder(self._number + 1, "end"))
        if self._assembly is not None:
            self._assembly.hear(None)
        self._agent.close()

    def _take(self, step: str, orders: Mapping[int, PreflightOrder], seconds: float) -> dict[int, StepDone]:
        """Have some nodes take a step, and wait until they have, or the time is over."""
        asked = [node for node in orders if node not in self._gone]
        self._number, self._step, self._done = self._number + 1, step, {}
        for node in asked:
            self._send(node, replace(orders[node], number=self._number, step=step, node=node))
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._machine.stopped():
            if all(node in self._done or node in self._gone for node in asked):
                break
            self._machine.turn(until)
        for node in asked:
            if node not in self._done and not self._machine.stopped():
                self._lose(node)
        return dict(self._done)

    def _ask_clocks(self, base: PreflightOrder) -> None:
        """Ask one after the other, so that what lies between is the way there and back."""
        for node in self.answers:
            if node not in self._gone:
                before = time.time()
                done = self._take("clock", {node: base}, CLOCK_S)
                after = time.time()
                if node in done:
                    self.answers[node].ahead = done[node].time - (before + after) / 2

    def _measure(self, base: PreflightOrder) -> dict[tuple[int, int], str]:
        """Measure all pairs, and those that stand out once more; return what is wrong with which."""
        for peers in rounds_of_pairs(max(self.answers) + 1):
            asked = {node: self._reachable(chosen) for node, chosen in peers.items() if node in self.answers}
            asked = {node: chosen for node, chosen in asked.items() if chosen}
            if asked and not self._machine.stopped():
                self._take_links("links", base, asked)
        links = {(node, each.peer): each for node, known in self.answers.items() for each in known.links}
        self._pairs = sum(node < peer for node, peer in links)
        suspects: dict[int, tuple[int, ...]] = {}
        for (node, peer), link in links.items():
            if is_suspect(link, list(links.values())):
                suspects[node] = (*suspects.get(node, ()), peer)
        if not suspects or self._machine.stopped():
            return {}
        before = {node: len(known.links) for node, known in self.answers.items()}
        self._take_links("measure", base, suspects)
        again = {(node, each.peer): each for node in suspects for each in self.answers[node].links[before[node] :]}
        found = {pair: is_suspect(link, list(links.values())) for pair, link in again.items()}
        # Where both sides have something to say, the one that measured has the last word.
        return {(min(pair), max(pair)): what for pair, what in sorted(found.items(), reverse=True) if what}

    def _take_links(self, step: str, base: PreflightOrder, peers: Mapping[int, tuple[int, ...]]) -> None:
        orders = {node: replace(base, peers=chosen) for node, chosen in peers.items()}
        self._take(step, orders, PAIR_S * max(map(len, peers.values())))

    def _reachable(self, nodes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(node for node in nodes if node in self.answers and node not in self._gone)

    def _reduce(self, base: PreflightOrder, fit: list[int]) -> None:
        """Have the devices of some nodes reduce, with ranks that leave out nobody among them."""
        size = sum(self._workers[node] for node in fit)
        firsts = {node: sum(self._workers[each] for each in fit[:index]) for index, node in enumerate(fit)}
        orders = {node: replace(base, first_rank=first, world_size=size) for node, first in firsts.items()}
        self._take("reduce", orders, REDUCE_S)

    def _send(self, node: int, order: PreflightOrder) -> None:
        if node == 0:
            key = self._assembly.preflight_key(order.salt) if self._assembly is not None else order.salt
            self._agent.order(replace(order, key=key))
        elif self._assembly is not None and not self._assembly.order(node, order):
            self._lose(node)

    def _lose(self, node: int) -> None:
        self._gone.add(node)
        self.answers[node].missing = self.answers[node].missing or self._step

    def _hear(self, node: int, line: bytes) -> None:
        """Note what a node's agent says."""
        if not line:
            self._lose(node)
            return
        try:
            message = decode(line.rstrip(b"\n"))
        except ChannelError:
            self._lose(node)
            return
        known = self.answers[node]
        match message:
            case NodeFinding():
                known.findings.append(message)
            case DeviceSums():
                (known.reduced if self._step == "reduce" else known.sums).append(message)
            case LinkMeasured() if message.peer in self.answers:
                known.links.append(message)
            case StepDone() if message.number == self._number:
                self._done[node] = message
