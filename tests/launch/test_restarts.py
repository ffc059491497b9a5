"""When a run that failed is begun again, as tables."""

from __future__ import annotations

import pytest

from allstep.launch.head import FailedAttempt, Progress, decide


def attempts(*progress: Progress) -> list[FailedAttempt]:
    return [FailedAttempt(number, each, "boom") for number, each in enumerate(progress)]


@pytest.mark.parametrize(
    ("progress", "max_restarts", "stop_after", "again"),
    [
        ([None], 0, 3, False),
        ([(1, 7)], 0, 3, False),
        ([None], 1, 3, True),
        ([None, None], 1, 3, False),
        ([None] * 3, 9, 3, True),
        ([None] * 4, 9, 3, False),  # never came through init
        ([None, None, None, (0, 0), (0, 0), None], 9, 3, True),
        ([(1, 7), (1, 7), (1, 7)], 9, 3, True),
        ([(1, 7), (1, 7), (1, 7), (1, 7)], 9, 3, False),
        ([(1, 7), (1, 6), (1, 7), (1, 8)], 9, 3, True),
        ([(1, 7), (1, 6), (1, 7), (1, 8), (1, 8), (1, 1)], 9, 3, True),
        ([(1, 7), (1, 6), (1, 7), (1, 8), (1, 8), (1, 1), (0, 9)], 9, 3, False),
        ([(1, 7), (2, 1), (3, 1), (4, 1)], 9, 1, True),
        ([(1, 7), None, None, None], 9, 3, False),  # failed before its first message: no further
        ([None, None, None, (0, 0)], 9, 3, True),
        ([(0, 0), (0, 0)], 9, 1, False),
    ],
)
def test_another_attempt_needs_a_restart_left_and_progress_now_and_then(
    progress: list[Progress], max_restarts: int, stop_after: int, again: bool
) -> None:
    assert decide(attempts(*progress), max_restarts=max_restarts, stop_after=stop_after).again is again


def test_the_reason_says_how_far_the_attempts_came_and_how_often() -> None:
    decision = decide(attempts((2, 30), (2, 5), (1, 40)), max_restarts=9, stop_after=2)
    assert decision.reason == (
        "2 restarts in a row got no further than epoch 2, iteration 30, so another would not either"
    )
    assert decide(attempts((1, 1)), max_restarts=2, stop_after=2).reason == "restart 1 of at most 2"
    decision = decide(attempts(None, None, None), max_restarts=9, stop_after=2)
    assert decision.reason.startswith("2 restarts in a row ended before all ranks had come through allstep.init")
    assert "--stop-after" in decision.reason
    assert decide(attempts(None, None), max_restarts=1, stop_after=2).reason == "1 restart taken"
