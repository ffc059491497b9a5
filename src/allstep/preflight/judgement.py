"""From what all machines answered to which of them is ill: pure.

Contract: the `judge_` functions each look at one kind of answer and return `Illness`es. An `Illness` names one node, or
the pair of nodes between which something is wrong, in one line, with a remedy. Where most of a node's links are ill, it
is that node's illness and not so many pairs'. `choose_left_out` says which nodes a run can do without so that no
illness is left.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from allstep.host_checks.finding import in_bytes
from allstep.protocol.foreign_text import one_line
from allstep.protocol.preflight_messages import DeviceSums, LinkMeasured, NodeFinding

SLOW = 1 / 4
"""Of what is usual among all pairs: below it a link is slow."""
SLOW_ALONE = 12 << 20
"""Bytes a second: what 100 Mbit/s are, below which a single link is told of."""
FAR = 10
"""Times what is usual among all pairs, and `FAR_S`: a round trip that takes longer is slow."""
FAR_S = 0.005
LOSSY = 0.02
"""The part of packets that may have to be sent again: a filled queue on the way drops some, too."""
CLOCKS_APART_S = 5.0
ENDED = "it ended with"
"""How the problem of a device begins whose process is gone."""


@dataclass(frozen=True, slots=True)
class Illness:
    """What is wrong with a node, or between two.

    Args:
        nodes: one node rank, or two.
        who: their names.
        what: what was seen, in one line.
        remedy: what to do.
        serious: whether training on it is out of the question; else it is a warning.
    """

    nodes: tuple[int, ...]
    who: str
    what: str
    remedy: str
    serious: bool = True

    @property
    def text(self) -> str:
        """Who and what, in one line."""
        return f"{self.who}: {self.what}"


@dataclass
class NodeAnswers:
    """What one node said.

    Args:
        name: its node rank and host, in words.
        findings: of its host checks, those that are not good.
        sums: of its devices.
        reduced: what its devices have to say of the all-reduce.
        links: what it measured.
        ahead: by how many seconds its clock is ahead of node 0's, as near as can be known.
        missing: the step that it did not answer; empty where it answered all.
    """

    name: str
    findings: list[NodeFinding] = field(default_factory=list)
    sums: list[DeviceSums] = field(default_factory=list)
    reduced: list[DeviceSums] = field(default_factory=list)
    links: list[LinkMeasured] = field(default_factory=list)
    ahead: float = 0.0
    missing: str = ""


Answers = Mapping[int, NodeAnswers]
"""What all nodes said, by node rank."""


def judge_nodes(answers: Answers) -> Iterator[Illness]:
    """What each machine's own checks found, and which did not answer."""
    for node, each in answers.items():
        if each.missing:
            what = f"it did not come to the end of the step {each.missing!r}"
            yield Illness((node,), each.name, what, "Run `allstep doctor` there")
        bad: dict[str, list[NodeFinding]] = {}
        for finding in each.findings:
            if finding.verdict == "bad":
                bad.setdefault(finding.subject, []).append(finding)
            else:
                what = f"{one_line(finding.subject)}: {one_line(finding.text)}"
                yield Illness((node,), each.name, what, one_line(finding.remedy), serious=False)
        # A full disk is found in several ways, which are one illness.
        for subject, findings in bad.items():
            what = f"{one_line(subject)}: {'; '.join(one_line(finding.text) for finding in findings)}"
            yield Illness((node,), each.name, what, one_line(findings[0].remedy))


def judge_clocks(answers: Answers) -> Iterator[Illness]:
    """Clocks that are apart from most others'."""
    middle = statistics.median_low(each.ahead for each in answers.values())
    for node, each in answers.items():
        apart = each.ahead - middle
        if abs(apart) > CLOCKS_APART_S:
            way = "ahead of" if apart > 0 else "behind"
            what = f"its clock is {abs(apart):.0f} s {way} the others'"
            yield Illness((node,), each.name, what, "Start chrony or systemd-timesyncd there")


def judge_sums(answers: Answers) -> Iterator[Illness]:
    """Devices that cannot compute, or compute something else than most, or are a processor beside GPUs."""
    all_sums = [sums for each in answers.values() for sums in each.sums]
    gpus = {one_line(sums.device) for sums in all_sums if sums.device not in ("", "cpu")}
    # A processor computes in fewer formats than a GPU.
    alike = [sums for sums in all_sums if not gpus or sums.device != "cpu"]
    digests = Counter(sums.digest for sums in alike if sums.exact and sums.digest)
    right = digests.most_common(1)[0][0] if digests else ""
    for node, each in answers.items():
        for sums in each.sums:
            which = f"{each.name}: device {sums.local_rank}" + (f" ({one_line(sums.device)})" if sums.device else "")
            if sums.problem:
                yield Illness((node,), which, one_line(sums.problem), "Run `allstep doctor` there")
            elif gpus and sums.device == "cpu":
                what = f"torch finds no GPU there, while others compute on {', '.join(sorted(gpus))}"
                yield Illness((node,), which, what, "Run `allstep doctor` there: it says why torch cannot use it")
            elif not sums.exact or sums.digest != right or not sums.digest:
                what = "it computes wrong sums: its products of integer matrices differ from the other devices'"
                yield Illness((node,), which, what, "Take the device out of use, and have its memory and cores tested")


def is_suspect(link: LinkMeasured, links: Sequence[LinkMeasured]) -> str:
    """What is wrong with a link beside all links of the run, or ""."""
    if link.lost > LOSSY:
        return f"{link.lost:.0%} of the packets are lost on the way"
    if link.problem:
        return one_line(link.problem)
    if not link.sent:  # its other side measures
        return ""
    whole = [each for each in links if each.sent]
    usual = _usual(sorted((min(each.sent, each.received) for each in whole), reverse=True))
    slow = min(link.sent, link.received)
    if slow < SLOW * usual:
        return f"{in_bytes(slow)}/s, where the others have {in_bytes(usual)}/s"
    usual_latency = _usual(sorted(each.latency for each in whole))
    if link.latency > max(FAR * usual_latency, FAR_S):
        return f"a round trip takes {link.latency * 1000:.1f} ms, where the others take {usual_latency * 1000:.1f} ms"
    return ""


def _usual(values: Sequence[float]) -> float:
    """What half of the pairs reach, or all pairs without one node, of which there are fewer among three or four nodes.

    Args:
        values: of all pairs, the best first.
    """
    pairs = len(values)
    nodes = (1 + math.isqrt(1 + 8 * pairs)) // 2
    return values[max(0, min(pairs // 2, pairs - nodes))]


def judge_links(answers: Answers, confirmed: Mapping[tuple[int, int], str]) -> Iterator[Illness]:
    """Say which nodes and pairs the links are about that were wrong twice.

    Args:
        answers: for the nodes' names, and for the MTU of each link.
        confirmed: what is wrong, by pair.
    """
    remedy = "Look at cables, switch ports and firewalls between them"
    count = len(answers)
    left = dict(confirmed)
    while left:
        touched = Counter(node for pair in left for node in pair)
        node, times = max(touched.items(), key=lambda item: (item[1], item[0]))
        if times < 2 or times * 2 < count - 1:
            break
        others = sorted(other for pair in left if node in pair for other in pair if other != node)
        example = left[min(node, others[0]), max(node, others[0])]
        name = answers[node].name
        what = f"its links to nodes {', '.join(map(str, others))} are ill: {example}"
        yield Illness((node,), name, what, f"Look at the cable, switch port and firewall of {name}")
        left = {pair: what for pair, what in left.items() if node not in pair}
    for (first, second), what in left.items():
        yield Illness((first, second), _between(answers, first, second), what, remedy)
    rates = [(node, link) for node, each in answers.items() for link in each.links if link.sent]
    if count == 2 and rates and (slowest := min(min(link.sent, link.received) for _, link in rates)) < SLOW_ALONE:
        what = f"{in_bytes(slowest)}/s, which is slow for gradients; with two machines there is nothing to compare with"
        yield Illness((0, 1), _between(answers, 0, 1), what, remedy, serious=False)
    sizes = Counter(link.mtu for each in answers.values() for link in each.links if link.mtu)
    if len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        for node, each in answers.items():
            for link in each.links:
                if link.mtu not in (0, usual):
                    what = f"packets of {link.mtu} bytes, where the others have {usual}"
                    who = _between(answers, node, link.peer)
                    yield Illness((node, link.peer), who, what, "Give all interfaces the same MTU", serious=False)


def judge_reduction(answers: Answers) -> Iterator[Illness]:
    """Devices for which the all-reduce failed; where processes ended, the others only waited for them."""
    failed = [(node, each, one) for node, each in answers.items() for one in each.reduced if one.problem]
    ended = [(node, each, one) for node, each, one in failed if one.problem.startswith(ENDED)]
    for node, each, one in ended or failed:
        what = f"a small all-reduce failed: {one_line(one.problem)}"
        remedy = "Run `allstep doctor` there; NCCL_DEBUG=INFO says more"
        yield Illness((node,), f"{each.name}: device {one.local_rank}", what, remedy)


def choose_left_out(illnesses: Sequence[Illness]) -> frozenset[int]:
    """The nodes without which no serious illness is left; node 0, which decides, only where it is ill itself."""
    serious = [illness for illness in illnesses if illness.serious]
    chosen = {illness.nodes[0] for illness in serious if len(illness.nodes) == 1}
    pairs = {illness.nodes for illness in serious if len(illness.nodes) == 2}
    while pairs := {pair for pair in pairs if not chosen & set(pair)}:
        touched = Counter(node for pair in pairs for node in pair)
        chosen.add(max(touched, key=lambda node: (node != 0, touched[node], node)))
    return frozenset(chosen)


def in_lines(illnesses: Sequence[Illness]) -> list[str]:
    """What to tell a person: a line for each illness, and one where several nodes have the same."""
    same: dict[tuple[str, str, bool], list[str]] = {}
    for each in illnesses:
        same.setdefault((each.what, each.remedy, each.serious), []).append(each.who)
    return [
        f"{'ill' if serious else 'warning'}: {', '.join(who)}: {what} -> {remedy}"
        for (what, remedy, serious), who in same.items()
    ]


def _between(answers: Answers, first: int, second: int) -> str:
    return f"between {answers[first].name} and {answers[second].name}"
