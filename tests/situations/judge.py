"""One function at several world sizes and under every launcher, against the value that a plain single process gives.

Contract: a test asks for the fixture `same_at_every_world_size` and calls it with a function `(world, *args)` and the
value that is expected of it, which the test computes without allstep. The function is called on several world sizes,
with seed 0, and every rank has to return that value. By day the ranks are warm ones, 1 and 3 of them; by night the same
test is run again on 1, 2 and 3 as a script: one rank under `python`, several under `allstep run` or `torchrun`, which
take turns over the tests.

What can go wrong: a rank raises (its traceback is in the failure), or a value differs (world size, rank and both values
are).
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from allstep import World
from allstep.testing import run_ranks
from tests.jobs.launchers import ROOT, command
from tests.jobs.running import run

Way = Literal["warm", "allstep", "torchrun"]
"""How several ranks are started; "warm" ones are forked for the call."""

WORLD_SIZES = (1, 2, 3)
BY_DAY = (1, 3)
"""World sizes of warm ranks: what holds alone and over three seldom fails over two, which the launched ones show."""

_SCRIPT = """\
import pathlib, pickle, sys
import allstep

folder, root = map(pathlib.Path, sys.argv[1:])
sys.path.insert(0, str(root))
with allstep.init(seed=0) as world:
    function, args = pickle.loads((folder / "call").read_bytes())
    value = function(world, *args)
    (folder / f"value-{world.rank}").write_bytes(pickle.dumps(value))
"""


def one_value(values: Sequence[Any]) -> Any:
    """The value that every rank returned."""
    for rank, value in enumerate(values):
        assert is_same(value, values[0]), f"rank {rank} returned {value!r}, rank 0 {values[0]!r}"
    return values[0]


@dataclass(frozen=True)
class Judge:
    """Calls functions on ranks that are started in one way; `folder` is for what a launcher needs."""

    way: Way
    folder: Path

    def __call__(
        self,
        function: Callable[..., Any],
        expected: Any,
        *args: Any,
        join: Callable[[Sequence[Any]], Any] = one_value,
        world_sizes: Sequence[int] | None = None,
        tolerance: float = 1e-5,
    ) -> None:
        """Fail unless `function(world, *args)` gives `expected` at every world size.

        Args:
            function: at a module's top level; it returns what can be pickled.
            expected: numbers, texts, tensors, and sequences and mappings of them.
            args: further arguments, pickled.
            join: from the values of the ranks, in rank order, to the one that is compared; by default all return it.
            world_sizes: numbers of ranks; by default those of the day or the night.
            tolerance: by how much, absolutely or relatively, numbers that are not whole may differ.
        """
        __tracebackhide__ = True
        for world_size in world_sizes or (BY_DAY if self.way == "warm" else WORLD_SIZES):
            values = self._values(function, args, world_size)
            found = join(values)
            assert is_same(found, expected, tolerance), (
                f"{world_size} ranks ({self.way}): found {found!r}, expected {expected!r}; ranks returned {values!r}"
            )

    def _values(self, function: Callable[..., Any], args: tuple[Any, ...], world_size: int) -> list[Any]:
        __tracebackhide__ = True
        if self.way == "warm":
            return run_ranks(_seeded, world_size, function, args)
        folder = self.folder / f"call-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        (folder / "call").write_bytes(pickle.dumps((function, args)))
        script = folder / "script.py"
        script.write_text(_SCRIPT)
        start = [sys.executable, script] if world_size == 1 else command(self.way, script, nproc=world_size)
        job = run(folder, folder, ROOT, command=start)
        assert job.code == 0, job.text
        return [pickle.loads((folder / f"value-{rank}").read_bytes()) for rank in range(world_size)]


def _seeded(world: World, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    world.seed_everything(0)
    return function(world, *args)


def is_same(found: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    """Whether two values are the same, through sequences and mappings; numbers up to a tolerance, NaN equal to NaN."""
    if isinstance(expected, torch.Tensor | np.ndarray):
        return type(found) is type(expected) and is_same(found.tolist(), expected.tolist(), tolerance)
    if isinstance(expected, Mapping):
        return (
            isinstance(found, Mapping)
            and found.keys() == expected.keys()
            and all(is_same(found[key], expected[key], tolerance) for key in expected)
        )
    if isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        return (
            isinstance(found, Sequence)
            and len(found) == len(expected)
            and all(is_same(one, other, tolerance) for one, other in zip(found, expected, strict=True))
        )
    if isinstance(expected, float) and isinstance(found, int | float):
        return bool(found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True))
    return bool(found == expected)
