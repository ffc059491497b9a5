"""torch without a private name that `data` uses: the loader's workers are found another way, and it is said once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torch.utils.data import DataLoader

from allstep.data import torch_private


class Hiding:
    """An iterator whose worker processes are not shown."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator


@pytest.mark.slow
def test_workers_that_torch_hides_are_those_started_with_the_iterator():
    torch_private._warned.clear()
    earlier = iter(DataLoader(range(4), num_workers=1))
    before = torch_private.child_processes()
    iterator = iter(DataLoader(range(4), num_workers=2))
    shown = torch_private.workers_of(iterator, 2, before)
    assert len(shown) == 2
    with pytest.warns(RuntimeWarning, match="_workers"):
        hidden = torch_private.workers_of(Hiding(iterator), 2, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = torch_private.workers_of(Hiding(iterator), 2, before)
    assert {each.pid for each in hidden} == {each.pid for each in again} == {each.pid for each in shown}
    assert [list(each) for each in (earlier, iterator)]


def test_a_loader_without_workers_has_none_and_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch_private.workers_of(Hiding(None), 0, ()) == ()
