import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allstep.engine import Engine, Events
from tests.engine.recording import NoLength


def groups(data: Any, accumulate: int, **terms: Any) -> tuple[list[tuple[int, float, bool]], Engine]:
    """(samples, weight, group_end) of each iteration; a batch is its number of samples."""
    seen: list[tuple[int, float, bool]] = []

    def step(engine: Engine, batch: int) -> None:
        seen.append((batch, engine.state.weight, engine.state.group_end))

    engine = Engine(step, accumulate=accumulate, samples_in=lambda batch: batch)
    engine.run(data, **terms)
    return seen, engine


def test_without_accumulation_each_iteration_is_a_group_of_weight_one() -> None:
    seen, _ = groups([3, 2], 1)
    assert seen == [(3, 1.0, True), (2, 1.0, True)]


def test_a_batch_weighs_its_share_of_the_groups_samples() -> None:
    seen, _ = groups([3, 1, 2, 2], 2)
    assert seen == [(3, 0.75, False), (1, 0.25, True), (2, 0.5, False), (2, 0.5, True)]


@pytest.mark.parametrize("make", [list, iter, lambda sizes: NoLengthOf(sizes)])
def test_an_epochs_last_group_may_be_short_also_where_the_length_is_not_known(make: Any) -> None:
    seen, engine = groups(make([4, 4, 4, 3, 1]), 3)
    assert seen[3:] == [(3, 0.75, False), (1, 0.25, True)]
    assert engine.state.epoch_length == 5


class NoLengthOf(NoLength):
    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __iter__(self) -> Any:
        return iter(self.sizes)


def test_groups_never_cross_an_epochs_end() -> None:
    seen, _ = groups([1] * 10, 2, max_epochs=3, epoch_length=3)
    assert [end for _, _, end in seen] == [False, True, True] * 3


def test_a_group_goes_on_where_the_data_is_begun_again_inside_an_epoch() -> None:
    seen, _ = groups([3, 1, 1], 2, epoch_length=6)
    assert seen == [
        (3, 0.75, False),
        (1, 0.25, True),
        (1, 0.25, False),
        (3, 0.75, True),
        (1, 0.5, False),
        (1, 0.5, True),
    ]


def test_the_last_group_ends_at_max_iters() -> None:
    seen, _ = groups([1] * 4, 4, max_iters=6)
    assert [end for _, _, end in seen] == [False, False, False, True, False, True]


def test_an_iterator_that_runs_dry_inside_a_group_loses_no_batch() -> None:
    with pytest.warns(UserWarning, match="5 of 20") as caught:
        seen, engine = groups(iter([2, 2, 2, 2, 1]), 2, max_epochs=2, epoch_length=10)
    assert len(caught) == 1
    assert seen[-1] == (1, 1.0, True)
    assert engine.state.iteration == 5


def test_an_epoch_is_cut_after_the_group_that_was_begun() -> None:
    seen: list[tuple[int, bool]] = []

    def step(engine: Engine, batch: int) -> None:
        seen.append((batch, engine.state.group_end))
        if engine.state.iteration == 1:
            engine.terminate_epoch()

    engine = Engine(step, accumulate=2, samples_in=lambda batch: 1)
    engine.run([10, 11, 12, 13], max_epochs=2)
    assert seen == [(10, False), (11, True), (10, False), (11, True), (12, False), (13, True)]


def test_a_group_that_was_begun_is_finished_before_new_data_is_taken() -> None:
    seen: list[tuple[int, float, bool]] = []
    engine = Engine(
        lambda e, batch: seen.append((batch, e.state.weight, e.state.group_end)),
        accumulate=2,
        samples_in=lambda batch: batch,
    )
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: engine.set_data([5, 5]))
    engine.run([3, 1, 2, 2], epoch_length=5)
    assert seen == [(3, 0.75, False), (1, 0.25, True), (5, 0.5, False), (5, 0.5, True), (5, 1.0, True)]


def test_new_data_where_the_old_ended_inside_a_group_completes_the_group() -> None:
    seen: list[tuple[int, bool]] = []
    engine = Engine(lambda e, batch: seen.append((batch, e.state.group_end)), accumulate=2, samples_in=lambda batch: 1)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda: engine.set_data(iter([20, 21, 22])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run(iter([10, 11, 12]), epoch_length=6)
    assert seen == [(10, False), (11, True), (12, False), (20, True), (21, False), (22, True)]


@pytest.mark.parametrize("make", [list, iter])
@pytest.mark.parametrize("fails_at", [5, 6, 8])
def test_a_group_that_a_failure_left_incomplete_is_begun_again(make: Any, fails_at: int) -> None:
    groups: list[list[int]] = [[]]

    def step(engine: Engine, batch: int) -> None:
        if engine.state.iteration == fails_at and not failed:
            failed.append(True)
            groups[-1].clear()
            raise RuntimeError("once")
        groups[-1].append(batch)
        if engine.state.group_end:
            groups.append([])

    failed: list[bool] = []
    engine = Engine(step, accumulate=4)
    data = make(range(12))
    with pytest.raises(RuntimeError, match="once"):
        engine.run(data, epoch_length=12)
    engine.run(data, epoch_length=12)
    assert groups == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], []]


def test_a_state_saved_inside_a_group_resumes_at_the_groups_first_batch() -> None:
    saved: list[dict[str, Any]] = []
    engine = Engine(lambda e, batch: None, accumulate=4)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda: saved.append(engine.state_dict()))
    engine.run(list(range(12)))
    seen: list[int] = []
    other = Engine(lambda e, batch: seen.append(batch), accumulate=4)
    other.load_state_dict(saved[0])
    other.run(list(range(12)))
    assert seen == [4, 5, 6, 7, 8, 9, 10, 11]


def test_a_group_without_a_sample_weighs_nothing() -> None:
    seen, _ = groups([0, 0], 2)
    assert [weight for _, weight, _ in seen] == [0.0, 0.0]


@pytest.mark.parametrize("accumulate", [0, -1, 1.5, None])
def test_accumulate_below_one_is_refused(accumulate: Any) -> None:
    with pytest.raises(ValueError, match="accumulate"):
        Engine(lambda e, b: None, accumulate=accumulate)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=7), accumulate=st.integers(2, 5))
def test_the_accumulated_gradient_is_that_of_one_large_batch(sizes: list[int], accumulate: int) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator)
    weights = torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()
    gradients: list[torch.Tensor] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        ((batch @ weights).square().mean() * engine.state.weight).backward()
        if engine.state.group_end:
            assert weights.grad is not None
            gradients.append(weights.grad.clone())
            weights.grad = None

    parts = list(x.split(sizes))
    Engine(step, accumulate=accumulate).run(parts)
    for number, gradient in enumerate(gradients):
        large = torch.cat(parts[number * accumulate : (number + 1) * accumulate])
        (expected,) = torch.autograd.grad((large @ weights).square().mean(), weights)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)
    assert len(gradients) == -(-len(sizes) // accumulate)
