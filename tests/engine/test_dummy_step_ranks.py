"""Iterations in which a rank has no batch or no sample, and engines inside another's handlers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from allstep.coordination import Alone
from allstep.engine import Engine, Events
from allstep.testing import SimulatedRank, simulate
from allstep.trainers import create_supervised_evaluator
from tests.engine.simulated_data import batches

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 1), (4, 4, 4)])
def test_an_evaluator_fires_the_same_events_with_and_without_a_batch(
    counts: tuple[int, ...],
) -> None:
    def world(coordinator: SimulatedRank) -> tuple[list[tuple[str, int]], int, int]:
        calls: list[int] = []

        def model(x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return x

        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return model(x)

        evaluator = create_supervised_evaluator(Model(), device="cpu", coordinator=coordinator)
        seen: list[tuple[str, int]] = []
        outputs: list[Any] = []
        for event in Events:
            evaluator.add_event_handler(
                event, lambda *_, event=event: seen.append((event.name, evaluator.state.iteration))
            )
        evaluator.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: outputs.append(evaluator.state.output) if evaluator.state.active else 0
        )
        data = [(x, x) for x in batches(counts[coordinator.rank])]
        evaluator.run(data)
        assert None not in outputs
        return seen, len(calls), len(outputs)

    results = simulate(world, 3, timeout=30.0)
    assert [seen for seen, _, _ in results] == [results[0][0]] * 3
    assert [(calls, outputs) for _, calls, outputs in results] == [(n, n) for n in counts]
    assert ("ITERATION_COMPLETED", max(counts)) in results[0][0]


def test_engines_in_handlers_share_the_coordinator_and_one_alone_needs_nobody() -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, int]:
        trainer = Engine(lambda e, b: None, coordinator=coordinator, name="trainer")
        evaluator = Engine(lambda e, b: None, coordinator=coordinator, name="evaluator", uneven="longest", idle="skip")
        alone = Engine(lambda e, b: None, coordinator=Alone(), name="alone")

        @trainer.on(Events.ITERATION_COMPLETED(every=3))
        def evaluate() -> None:
            evaluator.run(batches(2 + coordinator.rank))
            if coordinator.rank == 0:
                alone.run(batches(5))

        trainer.run(batches(20), max_epochs=2)
        return trainer.state.iteration, evaluator.state.iteration

    assert simulate(world, 3) == [(40, 4)] * 3


def test_a_batch_without_a_sample_to_count_weighs_nothing_and_poisons_nothing() -> None:
    def world(coordinator: SimulatedRank) -> list[float]:
        model = nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(2.0)
        grads: list[float] = []

        def step(engine: Engine, tokens: torch.Tensor) -> None:
            kept = tokens[tokens >= 0]
            loss = model(kept[:, None]).mean()
            model.zero_grad()
            (loss * engine.state.weight).backward()
            grads.append(float(model.weight.grad))  # type: ignore[arg-type]
            assert engine.state.active

        engine = Engine(step, coordinator=coordinator, samples_in=lambda tokens: (tokens >= 0).sum())
        engine.modules.append(model)
        mine = [torch.tensor([3.0, 5.0]), torch.tensor([-1.0, -1.0])]
        engine.run(mine if coordinator.rank else mine[::-1])
        return grads

    assert simulate(world, 2) == [[0.0, 8.0], [8.0, 0.0]]
