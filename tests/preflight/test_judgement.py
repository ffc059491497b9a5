"""Which machine, pair or device is ill, from what all of them answered."""

from __future__ import annotations

from itertools import combinations

import pytest

from allstep.launch.preflight_rounds import rounds_of_pairs
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
from allstep.protocol.preflight_messages import DeviceSums, LinkMeasured, NodeFinding

USUAL = LinkMeasured(1, latency=1e-4, sent=1e8, received=1e8, mtu=1500)


def run_of(count: int) -> dict[int, NodeAnswers]:
    return {node: NodeAnswers(f"node {node} (h{node})") for node in range(count)}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 64])
def test_every_pair_has_one_round_and_there_are_log_n_of_them(count: int) -> None:
    rounds = rounds_of_pairs(count)
    pairs = [(node, peer) for each in rounds for node, peers in each.items() for peer in peers if node < peer]
    assert sorted(pairs) == list(combinations(range(count), 2))
    backwards = {(peer, node) for each in rounds for node, peers in each.items() for peer in peers if node > peer}
    assert backwards == set(pairs)
    assert 2 ** len(rounds) < 2 * count or count == 1


def test_nodes_that_keep_pace_are_in_one_pair_at_a_time() -> None:
    for each in rounds_of_pairs(8):
        for turn in range(max(map(len, each.values()))):
            assert all(each[peers[turn]][turn] == node for node, peers in each.items())


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (USUAL, ""),
        (LinkMeasured(1, problem="10.0.0.7 does not answer"), "10.0.0.7 does not answer"),
        (LinkMeasured(1, latency=1e-4, sent=1e7, received=1e8), "9.54 MiB/s, where the others have 95.4 MiB/s"),
        (LinkMeasured(1, latency=1e-4, sent=1e8, received=1e8, lost=0.07), "7% of the packets are lost"),
        (LinkMeasured(1, problem="10.0.0.7 is so slow", lost=0.3), "30% of the packets are lost"),
        (
            LinkMeasured(1, latency=0.03, sent=1e8, received=1e8),
            "a round trip takes 30.0 ms, where the others take 0.1",
        ),
        (LinkMeasured(1, latency=0.03), ""),  # only greeted
    ],
)
def test_a_link_stands_out_beside_all_others(link: LinkMeasured, words: str) -> None:
    said = is_suspect(link, [USUAL, USUAL, USUAL, link])
    assert words in said
    assert bool(said) == bool(words)


@pytest.mark.parametrize("count", range(3, 10))
def test_one_node_behind_a_slow_link_stands_out_among_any_number(count: int) -> None:
    def between(*pair: int) -> LinkMeasured:
        slow = count - 1 in pair
        return LinkMeasured(max(pair), latency=0.1 if slow else 1e-4, sent=1e7 if slow else 1e8, received=1e8)

    links = {pair: between(*pair) for pair in combinations(range(count), 2)}
    suspects = {pair for pair, link in links.items() if is_suspect(link, list(links.values()))}
    assert suspects == {pair for pair in links if count - 1 in pair}
    late = {pair: LinkMeasured(each.peer, latency=each.latency, sent=1e8, received=1e8) for pair, each in links.items()}
    assert {pair for pair, link in late.items() if is_suspect(link, list(late.values()))} == suspects


def test_links_that_are_ill_on_one_side_are_one_nodes_illness() -> None:
    (ill,) = judge_links(run_of(4), {(0, 2): "slow", (1, 2): "slow", (2, 3): "slow"})
    assert ill.nodes == (2,)
    assert ill.text == "node 2 (h2): its links to nodes 0, 1, 3 are ill: slow"


def test_a_pair_is_named_with_both_nodes() -> None:
    (ill,) = judge_links(run_of(8), {(2, 6): "7% lost"})
    assert (ill.nodes, ill.text) == ((2, 6), "between node 2 (h2) and node 6 (h6): 7% lost")


def test_packets_of_other_sizes_are_a_warning() -> None:
    answers = run_of(3)
    answers[0].links = [LinkMeasured(1, sent=1e8, received=1e8, mtu=9000), LinkMeasured(2, sent=1e8, mtu=9000)]
    answers[1].links = [LinkMeasured(2, sent=1e8, received=1e8, mtu=1500)]
    (ill,) = judge_links(answers, {})
    assert not ill.serious
    assert "packets of 1500 bytes, where the others have 9000" in ill.text


def test_clocks_are_compared_with_most() -> None:
    answers = run_of(4)
    answers[2].ahead = -60.0
    (ill,) = judge_clocks(answers)
    assert ill.text == "node 2 (h2): its clock is 60 s behind the others'"
    for node in (1, 2, 3):  # it is node 0's then
        answers[node].ahead = 60.0
    (ill,) = judge_clocks(answers)
    assert ill.nodes == (0,)


def test_of_two_devices_that_differ_the_processor_says_which_is_wrong() -> None:
    answers = run_of(2)
    answers[0].sums = [DeviceSums(0, "cpu", "bad", exact=False)]
    answers[1].sums = [DeviceSums(0, "cpu", "good")]
    (ill,) = judge_sums(answers)
    assert ill.nodes == (0,)
    assert "device 0 (cpu): it computes wrong sums" in ill.text


def test_devices_of_a_kind_are_compared_bit_by_bit() -> None:
    answers = run_of(4)
    for node, digest in enumerate(("gpu", "gpu", "other", "gpu")):
        answers[node].sums = [DeviceSums(0, "H100", digest)]
    assert [ill.nodes for ill in judge_sums(answers)] == [(2,)]


def test_a_processor_beside_gpus_is_ill_however_well_it_computes() -> None:
    answers = run_of(3)
    for node, (device, digest) in enumerate((("H100", "gpu"), ("cpu", "right"), ("H100", "gpu"))):
        answers[node].sums = [DeviceSums(0, device, digest)]
    (ill,) = judge_sums(answers)
    assert ill.nodes == (1,)
    assert ill.text == "node 1 (h1): device 0 (cpu): torch finds no GPU there, while others compute on H100"


def test_a_device_that_says_nothing_of_its_sums_is_ill() -> None:
    answers = run_of(1)
    answers[0].sums = [DeviceSums(0, "cpu", "")]
    assert [ill.nodes for ill in judge_sums(answers)] == [(0,)]


def test_who_only_waited_in_the_all_reduce_is_not_named() -> None:
    answers = run_of(3)
    answers[0].reduced = [DeviceSums(0, "", problem="RuntimeError: Connection closed by peer")]
    answers[1].reduced = [DeviceSums(0, "", problem="it ended with signal 9")]
    assert [ill.nodes for ill in judge_reduction(answers)] == [(1,)]


def test_findings_of_one_subject_are_one_illness_and_alike_nodes_share_a_line() -> None:
    answers = run_of(2)
    for each in answers.values():
        each.findings = [NodeFinding("folder", "bad", "1 MiB free", "Remove"), NodeFinding("folder", "bad", "full", "")]
    assert in_lines(list(judge_nodes(answers))) == ["ill: node 0 (h0), node 1 (h1): folder: 1 MiB free; full -> Remove"]
    answers[1].missing = "look"
    assert "it did not come to the end of the step 'look'" in in_lines(list(judge_nodes(answers)))[-1]


def illness(*nodes: int, serious: bool = True) -> Illness:
    return Illness(nodes, "", "", "", serious)


@pytest.mark.parametrize(
    ("illnesses", "left_out"),
    [
        ([], set()),
        ([illness(3, serious=False)], set()),
        ([illness(3), illness(2, 3)], {3}),  # without node 3 nothing is wrong between the two
        ([illness(1, 2), illness(2, 3)], {2}),
        ([illness(0, 1)], {1}),  # node 0 decides, so the other leaves
        ([illness(0)], {0}),
    ],
)
def test_as_few_nodes_as_can_be_are_left_out(illnesses: list[Illness], left_out: set[int]) -> None:
    assert choose_left_out(illnesses) == left_out
