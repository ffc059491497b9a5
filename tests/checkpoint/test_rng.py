"""Random generators are put back as they were, and ranks without a saved state get their own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from allstep.checkpoint import rng
from allstep.checkpoint.encoding import decode, encode
from allstep.data.seeding import generators_kept
from allstep.errors import CheckpointError


@pytest.fixture(autouse=True)
def _kept():
    with generators_kept():
        yield


def draws():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()


def test_what_is_restored_goes_on_where_it_was():
    draws()
    state = rng.capture()
    expected = draws(), draws()
    draws()
    rng.restore(state)
    assert (draws(), draws()) == expected


def test_the_state_is_one_that_a_checkpoint_keeps():
    encoded = encode(rng.capture(), "rng")
    state = decode(encoded.document, encoded.tensors.__getitem__)
    expected = draws()
    rng.restore(state)
    assert draws() == expected


def test_ranks_differ_and_epochs_differ_and_both_are_repeatable():
    drawn = []
    for epoch, rank in [(0, 0), (0, 1), (1, 0), (0, 1)]:
        rng.seed_for_rank(7, epoch, rank)
        drawn.append(draws())
    assert drawn[1] == drawn[3]
    for each in zip(*drawn[:3], strict=True):
        assert len({str(value) for value in each}) == 3


def test_what_is_no_state_is_an_error():
    with pytest.raises(CheckpointError, match="cannot be restored"):
        rng.restore({"python": 1})
