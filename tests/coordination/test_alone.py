import pytest

from allstep.coordination import Alone, Coordinator, Request


@pytest.mark.parametrize("request_", list(Request))
def test_every_request_of_the_only_rank_holds_at_once(request_: Request) -> None:
    assert Alone().ask(request_)


def test_alone_is_a_coordinator_of_one_rank() -> None:
    coordinator: Coordinator = Alone()
    assert (coordinator.rank, coordinator.world_size) == (0, 1)
