"""Units that compute their activations anew: what they compute, how often, and which they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from allstep.errors import AllstepError
from allstep.parallel import wrap_module
from allstep.testing import run_ranks
from tests.parallel.sharded_training import Block, Plan, Transformer, alone, check_equal, train

CPU = torch.device("cpu")


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.noise = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.noise(torch.tanh(self.mix(x)))


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*[Noisy() for _ in range(4)])


def trained(module: nn.Module) -> tuple[list[torch.Tensor], list[int]]:
    """Gradients of one step with dropout, and how often each linear layer was called in it."""
    layers = [each for each in module.modules() if isinstance(each, nn.Linear)]
    calls = [0 for _ in layers]

    def count(at: int) -> Any:
        def called(*_: Any) -> None:
            calls[at] += 1

        return called

    for at, each in enumerate(layers):
        each.register_forward_pre_hook(count(at))
    torch.manual_seed(2)
    module(torch.ones(3, 4)).sum().backward()
    return [each.grad for each in module.parameters() if each.grad is not None], calls


def test_units_computed_anew_have_the_same_dropout_names_and_gradients() -> None:
    plain, calls = trained(model())
    assert calls == [1, 1, 1, 1]
    wrapped = wrap_module(model(), CPU, 1, checkpoint_activations=Noisy)
    assert list(wrapped.state_dict()) == list(model().state_dict())
    anew, calls = trained(wrapped)
    assert calls == [2, 2, 2, 2]
    assert all(map(torch.equal, anew, plain))
    with torch.no_grad():
        wrapped(torch.ones(1, 4))
    assert calls == [3, 3, 3, 3]


def test_every_second_unit_computes_its_activations_anew() -> None:
    _, calls = trained(wrap_module(model(), CPU, 1, checkpoint_activations=2, units=Noisy))
    assert calls == [1, 2, 1, 2]


def test_a_copy_of_a_unit_computed_anew_calls_its_own_layers() -> None:
    wrapped = wrap_module(model(), CPU, 1, checkpoint_activations=Noisy)
    copied = copy.deepcopy(wrapped)
    with torch.no_grad():
        copied[0].mix.weight.zero_()
    assert not torch.equal(copied.eval()(torch.ones(1, 4)), wrapped.eval()(torch.ones(1, 4)))


@pytest.mark.parametrize("which", [0, True, "Block", nn.Conv2d])
def test_units_to_compute_anew_that_cannot_be_meant_are_refused(which: Any) -> None:
    given = model()
    with pytest.raises(AllstepError, match="checkpoint_activations is"):
        wrap_module(given, CPU, 1, checkpoint_activations=which)
    assert "forward" not in vars(given[0])


ANEW = Plan(options=(("units", Block),), everywhere=(("checkpoint_activations", Block),))


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [
        (2, "shard=2"),  # by day beside compiled units, in test_compilation.py
        (2, "replicate=2"),
        (4, "shard=2,tensor=2"),
    ],
)
def test_activations_computed_anew_train_what_one_process_trains(ranks: int, mesh: str) -> None:
    for found in run_ranks(train, ranks, ANEW, env={"ALLSTEP_MESH": mesh}):
        check_equal(found, alone(Plan()))


def test_the_transformer_is_given_back_as_it_was() -> None:
    plain = Transformer()
    assert wrap_module(plain, CPU, 1, checkpoint_activations=1, units=Block) is plain
