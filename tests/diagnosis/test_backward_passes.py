"""What is said of ranks whose numbers of backward passes differ."""

from __future__ import annotations

from allstep.diagnosis.backward_passes import advise_passes, explain_passes


def test_ranks_that_left_out_a_pass_are_named_by_iteration():
    said = explain_passes({0: 0, 1: 5, 2: 7, 3: 5}, {0: 1, 1: 1, 2: 1, 3: 1})
    assert "ranks 1, 3 made no backward pass in iteration 5; rank 2 made no backward pass in iteration 7" in said
    assert "state.skip()" in said
    assert "LBFGS" not in said


def test_several_passes_in_an_iteration_speak_of_a_closure():
    said = explain_passes({0: 0, 1: 0}, {0: 20, 1: 17})
    assert "up to 20 backward passes" in said
    assert "world.all_reduce(loss, 'mean')" in said


def test_a_pass_that_all_ranks_left_out_tells_nothing():
    assert explain_passes({0: 5, 1: 5}, {0: 1, 1: 1}) == explain_passes({}, {}) == ""


def test_where_nothing_is_known_both_reasons_are_given():
    said = advise_passes({0: 0, 1: 0}, {})
    assert "state.skip()" in said
    assert "LBFGS" in said
