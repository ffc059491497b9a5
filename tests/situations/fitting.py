"""A model of one number that is pulled towards the values of samples, with allstep and by plain arithmetic.

The loss of a batch is half the mean of `(number - value) ** 2` over its samples, so that one optimizer step moves the
number towards the mean of all values in it, and a sample that counts too little or too much shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from allstep import Engine, World
from allstep.metrics import Mean, Metrics

RATE = 0.5


class Number(nn.Module):
    """The model: a prediction of one number for each of `count` samples."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))

    def forward(self, count: int) -> torch.Tensor:
        return self.number.expand(count)


def fit(
    world: World,
    data: Any,
    values_of: Callable[[Any], Sequence[float]],
    *,
    epochs: int = 1,
    uneven: Any = "longest",
    before: Callable[[Engine], object] = lambda engine: None,
    **engine_options: Any,
) -> float:
    """Train over `data` and return the number.

    Args:
        data: what the engine runs over.
        values_of: from a batch, which it may change, to the values of its samples.
        before: called with the engine before it runs.
        engine_options: of the `Engine`.
    """
    net = Number()
    model = world.wrap(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step(engine: Engine, batch: Any) -> float:
        values = torch.tensor(list(map(float, values_of(batch))))
        loss = ((model(len(values)) - values) ** 2).mean() / 2
        (loss * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    engine = Engine(step, **engine_options)
    before(engine)
    engine.run(data, max_epochs=epochs, uneven=uneven)
    return float(net.number.detach())


def fitted(groups: Iterable[Sequence[float]]) -> float:
    """The same in plain Python: each group is what one optimizer step takes, over all ranks and micro-batches."""
    number = 0.0
    for values in groups:
        number -= RATE * (number - sum(values) / len(values))
    return number


def in_groups(values: Sequence[float], size: int) -> list[Sequence[float]]:
    """Values in groups of so many, the last of which may be smaller."""
    return [values[at : at + size] for at in range(0, len(values), size)]


def mean_over(world: World, data: Any, values_of: Any, **options: Any) -> float:
    """What `Mean` says of the mean of each batch."""
    engine = Engine(lambda e, b: sum(values_of(b)) / len(values_of(b)), **options)
    Metrics({"mean": Mean()}).attach(engine)
    return float(engine.run(data, uneven="longest").metrics["mean"])


VALUES = [float(value) for value in range(10)]


class Numbers(Dataset[float]):
    """Ten numbers."""

    def __len__(self) -> int:
        return len(VALUES)

    def __getitem__(self, index: int) -> float:
        return VALUES[index]


def leave_out_bad(samples: list[float]) -> Any:
    return torch.tensor([value for value in samples if value not in (1.0, 2.0, 7.0)])
