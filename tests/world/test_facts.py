"""What must be the same on all ranks, as text by name."""

from __future__ import annotations

import pytest

from allstep.world.facts import facts_of


def test_nested_settings_are_named_by_their_own_keys():
    given = {"config": {"lr": 0.1, "data": {"name": "digits", "options": {}}}, "git": "3f2a"}
    assert facts_of(given, {}, {"torch": "2.13"}) == {
        "the version of torch": "2.13",
        "config.lr": "0.1",
        "config.data.name": "digits",
        "config.data.options": "{}",
        "git": "3f2a",
    }


def test_the_launchers_digest_is_a_fact():
    assert facts_of(None, {"ALLSTEP_CONFIG": "9c1d", "HOME": "/root"}, {}) == {"ALLSTEP_CONFIG": "9c1d"}


def test_long_texts_that_differ_anywhere_differ_as_facts():
    one, other = (facts_of({"text": "x" * 5000 + end}, {}, {})["text"] for end in "ab")
    assert one != other
    assert len(one) < 200


@pytest.mark.parametrize("given", [["lr", 0.1], "lr=0.1", {1: 2}, {"config": {3: 4}}])
def test_what_is_no_mapping_of_names_is_refused(given):
    with pytest.raises(TypeError, match="facts"):
        facts_of(given, {}, {})
