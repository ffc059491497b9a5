from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from allstep.engine import Engine, Events
from allstep.engine.events import NEVER, make_filter
from tests.engine.recording import nothing

bounds = st.one_of(st.none(), st.integers(0, 25))
arguments = st.one_of(
    st.builds(lambda n: {"once": n}, st.one_of(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1))),
    st.builds(
        lambda every, before, after: {"every": every, "before": before, "after": after},
        st.integers(1, 9),
        bounds,
        bounds,
    ),
    st.builds(lambda a, b: {"before": a, "after": b} if (a, b) != (None, None) else {"before": 9}, bounds, bounds),
    st.builds(lambda k: {"event_filter": lambda engine, count: count % k == 1}, st.integers(2, 5)),
)


def says_the_definition(filters: dict[str, Any], count: int) -> bool:
    """What filters mean, word by word."""
    if "event_filter" in filters:
        return bool(filters["event_filter"](None, count))
    if "once" in filters:
        once = filters["once"]
        return count in (once if isinstance(once, list) else [once])
    every, before, after = (filters.get(name) for name in ("every", "before", "after"))
    if before is None and after is None:
        return count % every == 0
    start = (after or 0) + 1
    return start <= count < (NEVER if before is None else before) and (count - start) % (every or 1) == 0


@given(filters=arguments, count=st.integers(0, 60))
def test_a_filter_matches_by_its_definition(filters: dict[str, Any], count: int) -> None:
    chosen = make_filter(*(filters.get(name) for name in ("event_filter", "every", "once", "before", "after")))
    assert (True if chosen is None else chosen.matches(None, count)) == says_the_definition(filters, count)


@given(filters=arguments, count=st.integers(0, 60))
def test_next_due_is_the_smallest_count_that_matches(filters: dict[str, Any], count: int) -> None:
    chosen = make_filter(*(filters.get(name) for name in ("event_filter", "every", "once", "before", "after")))
    if chosen is None or "event_filter" in filters:
        return
    expected = next((n for n in range(count, 200) if chosen.matches(None, n)), NEVER)
    assert chosen.next_due(count) == expected


@settings(max_examples=60, deadline=None)
@given(several=st.lists(arguments, max_size=5), iterations=st.integers(1, 40))
def test_firing_by_schedule_equals_testing_each_count(several: list[dict[str, Any]], iterations: int) -> None:
    engine = Engine(nothing)
    seen: list[tuple[int, int]] = []
    for number, filters in enumerate(several):
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(**filters), lambda e, number: seen.append((e.state.iteration, number)), number
        )
    engine.run(range(iterations))
    assert seen == [
        (count, number)
        for count in range(1, iterations + 1)
        for number, filters in enumerate(several)
        if says_the_definition(filters, count)
    ]
