from allstep.coordination import Alone, Coordinator


def test_alone_is_a_coordinator_of_one_rank() -> None:
    coordinator: Coordinator = Alone()
    assert (coordinator.rank, coordinator.world_size) == (0, 1)


def test_what_the_only_rank_says_is_what_all_say() -> None:
    coordinator: Coordinator = Alone()
    assert coordinator.vote([3, 1]).wait() == [3, 1]
    assert coordinator.gather("mine") == ["mine"]
    assert coordinator.broadcast("mine", 0) == "mine"
