"""The recurrent trainer: pieces of time, the state between them, and ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from allstep import EMA, Alone, Engine, Schedule, World
from allstep.errors import ArgumentError, DataError, RanksError
from allstep.testing import run_ranks
from allstep.trainers import create_recurrent_trainer
from tests.regression import same


class Recurrent(nn.Module):
    """Predicts the next value of a series (N, T, 1)."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.LSTM(1, 5, batch_first=batch_first)
        self.head = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        outputs, state = self.layer(x, state)
        return self.head(outputs), state


def batch(rows: int = 4, time: int = 7, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    series = torch.randn(rows, time + 1, 1, generator=torch.Generator().manual_seed(seed)).cumsum(1)
    return series[:, :-1], series[:, 1:]


def trainer_of(model: nn.Module, steps: int = 3, **options: Any) -> Engine:
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    return create_recurrent_trainer(model, optimizer, F.mse_loss, steps, **({"coordinator": Alone()} | options))


def test_each_piece_is_a_step_that_begins_where_the_last_one_ended() -> None:
    model, other = Recurrent(), Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    state, losses = None, []
    for begin, end in ((0, 3), (3, 6), (6, 7)):
        optimizer.zero_grad()
        y_pred, state = model(x[:, begin:end], state)
        loss = F.mse_loss(y_pred, y[:, begin:end])
        loss.backward()
        optimizer.step()
        state = tuple(each.detach() for each in state)
        losses.append(loss.item() * (end - begin) / 7)
    output = trainer_of(other).run([(x, y)]).output
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert float(output) == pytest.approx(sum(losses))
    assert not output.requires_grad


def test_time_may_be_the_first_dimension() -> None:
    one, other = Recurrent(), Recurrent(batch_first=False)
    x, y = batch()
    trainer_of(one).run([(x, y)])
    first = (x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous())
    trainer_of(other, time_dim=0, samples_in=lambda batch: batch[0].shape[1]).run([first])
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_schedule_and_an_average_go_on_once_a_batch() -> None:
    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule, ema = Schedule(lambda step: 0.5**step, optimizer), EMA(model)
    trainer = trainer_of(model, optimizer=optimizer, scheduler=schedule, ema=ema, clip_norm=1.0)
    trainer.run([batch(), batch()])
    assert schedule.rates == [0.025]
    assert int(ema.n_averaged) == 2
    assert list(trainer.extension.states) == ["model", "optimizer", "Schedule", "EMA"]


def test_wrong_lengths_are_named() -> None:
    with pytest.raises(ArgumentError, match="steps_of_time is 0"):
        trainer_of(Recurrent(), 0)
    x, y = batch()
    with pytest.raises(DataError, match="dimension 1"):
        trainer_of(Recurrent()).run([(x, y[:, :-1])])


def _trained(world: World, times: tuple[int, ...]) -> Any:
    model = world.wrap(Recurrent())
    data = [batch(2, times[world.rank], seed=world.rank), batch(2, times[0], seed=5 + world.rank)]
    trainer_of(model, coordinator=None).run(data * 3)
    return dict(world.unwrap(model).state_dict())


@pytest.mark.slow
def test_ranks_train_one_model() -> None:
    first, second = run_ranks(_trained, 2, (7, 7))
    assert same(first, second)


@pytest.mark.slow
def test_ranks_with_different_numbers_of_pieces_are_told_so() -> None:
    with pytest.raises(RanksError, match="different numbers of backward passes"):
        run_ranks(_trained, 2, (3, 7))
