"""Agreement by messages: over the group of the votes, from another thread, in whatever order ranks come to it."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from allstep.coordination import Coordinator
from allstep.testing import run_ranks
from allstep.world import World, internals

pytestmark = pytest.mark.slow

ROUNDS = 40


def agree(coordinator: Coordinator, rank: int) -> list[object]:
    """Everything that a coordinator can be asked."""
    return [
        coordinator.gather({"rank": rank, "text": "x" * rank * 1000}),
        coordinator.broadcast(["from", rank], 1),
        coordinator.vote([1, rank]).wait(),
        coordinator.gather_bytes(torch.tensor([rank], dtype=torch.uint8)).tolist(),
        coordinator.reduce_tensor(torch.tensor([rank, -rank]), "max").tolist(),
    ]


EXPECTED = [
    [{"rank": rank, "text": "x" * rank * 1000} for rank in range(3)],
    ["from", 1],
    [3, 3],
    [[0], [1], [2]],
    [2, 0],
]


def meets(world: World) -> tuple[bool, int, int]:
    coordinator = internals(world).coordinator
    opened = len(dist.distributed_c10d._world.pg_map)
    saves = [coordinator.by_messages(60.0) for _ in range(2)]
    coordinator.vote([1]).wait()  # opens the group, in the main thread
    found: list[list[object]] = []

    def save(by_messages: Coordinator) -> None:
        for number in range(ROUNDS):
            time.sleep(0.001 * ((number + world.rank) % 3))  # ranks come to it at different times
            found.append(agree(by_messages, world.rank))

    threads = [threading.Thread(target=save, args=(each,)) for each in saves]
    for thread in threads:
        thread.start()
    votes = [coordinator.vote([number, world.rank]) for number in range(ROUNDS)]
    sums = [vote.wait() for vote in votes]
    gathered = [coordinator.gather(number) for number in range(ROUNDS)]
    for thread in threads:
        thread.join()
    in_order = sums == [[3 * number, 3] for number in range(ROUNDS)] and gathered == [[n] * 3 for n in range(ROUNDS)]
    return in_order and found == [EXPECTED] * 2 * ROUNDS, opened, len(dist.distributed_c10d._world.pg_map)


def test_two_threads_agree_by_messages_while_votes_are_cast_in_the_same_group():
    # The default group, and from the first vote on one more, whatever is saved.
    assert run_ranks(meets, 3) == [(True, 1, 2)] * 3


def waits_in_vain(world: World) -> str:
    coordinator = internals(world).coordinator
    coordinator.vote([1]).wait()
    if world.rank == 0:
        with pytest.raises(RuntimeError) as raised:
            coordinator.by_messages(0.2).gather(1)
        text = str(raised.value)
    else:
        text = "Timed out"
    world.barrier()
    return text


def test_a_message_that_does_not_come_is_waited_for_no_longer_than_asked():
    assert all("imed out" in text for text in run_ranks(waits_in_vain, 2))
