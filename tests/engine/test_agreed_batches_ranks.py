"""Agreement on real gloo ranks: gradients are those of one process, and no collective of a step goes unmatched."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from allstep.coordination import Uneven
from allstep.engine import Engine, Events
from allstep.errors import TermsError
from allstep.testing import run_ranks
from allstep.world import World

pytestmark = pytest.mark.slow
Batch = tuple[torch.Tensor, torch.Tensor]
FEATURES, STEPS = 5, 20


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def _shard(rank: int, count: int) -> list[Batch]:
    """Ragged batches: 1 to 6 rows, others on each rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    made = []
    for at in range(count):
        rows = 1 + (3 * at + 2 * rank) % 6
        made.append(
            (
                torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64),
                torch.randn(rows, 1, generator=generator, dtype=torch.float64),
            )
        )
    return made


def _mask(y: torch.Tensor) -> torch.Tensor:
    return y[:, 0] > -0.8  # the tokens that count


def _loss(model: nn.Module, batch: Batch, tokens: bool) -> torch.Tensor:
    x, y = batch
    each = functional.mse_loss(model(x), y, reduction="none")[:, 0]
    return each[_mask(y)].mean() if tokens else each.mean()


def _samples_in(batch: Batch) -> int:
    return int(_mask(batch[1]).sum())


def _train(world: World, counts: list[int], accumulate: int, tokens: bool, uneven: Uneven) -> list[torch.Tensor]:
    model = world.wrap(_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    steps = 0

    def step(engine: Engine, batch: Batch) -> None:
        nonlocal steps
        loss = _loss(model, batch, tokens)
        (loss * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps == STEPS:
                engine.terminate(agreed=True)

    engine = Engine(step, accumulate=accumulate, samples_in=_samples_in if tokens else None)
    if world.world_size == 1:
        engine.modules.append(model)
    engine.run(_shard(world.rank, counts[world.rank]), max_epochs=50, uneven=uneven)
    assert steps == STEPS
    return [p.detach().clone() for p in model.parameters()]


def _alone(counts: list[int], accumulate: int, tokens: bool, uneven: Uneven) -> list[torch.Tensor]:
    """The same steps in one process, each on all samples of its group."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    shards = [_shard(rank, n) for rank, n in enumerate(counts)]
    length = max(counts) if uneven == "longest" else min(counts)
    steps = 0
    while True:
        for begin in range(0, length, accumulate):
            taken = [b for at in range(begin, min(begin + accumulate, length)) for s in shards for b in s[at : at + 1]]
            whole = (torch.cat([x for x, _ in taken]), torch.cat([y for _, y in taken]))
            optimizer.zero_grad()
            _loss(model, whole, tokens).backward()
            optimizer.step()
            steps += 1
            if steps == STEPS:
                return [p.detach() for p in model.parameters()]


CASES: list[tuple[list[int], int, bool, Uneven]] = [
    ([7], 1, False, "shortest"),
    ([7], 3, True, "shortest"),
    ([7, 7], 1, False, "shortest"),
    ([9, 6], 1, True, "longest"),
    ([7, 5], 3, False, "longest"),
    ([7, 5, 6], 1, False, "shortest"),
    ([8, 0, 5], 1, False, "longest"),
    ([7, 8, 5], 3, True, "longest"),
    ([7, 8, 7], 4, False, "shortest"),
]


def _train_cases(world: World, cases: list[int]) -> list[list[torch.Tensor]]:
    return [_train(world, *CASES[case]) for case in cases]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_twenty_steps_are_those_of_one_process_on_all_the_samples(size: int) -> None:
    cases = [at for at, (counts, *_) in enumerate(CASES) if len(counts) == size]
    results = run_ranks(_train_cases, size, cases)
    for at, case in enumerate(cases):
        expected = _alone(*CASES[case])
        for rank in range(size):
            for mine, wanted in zip(results[rank][at], expected, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-12, msg=f"{CASES[case]} rank {rank}")


class Statistics(nn.Module):
    """Centres by a mean over all ranks, which it all-reduces in forward, and keeps a running one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.detach().mean().reshape(1).clone()
        dist.all_reduce(mean)
        self.running += 1
        return x - mean / dist.get_world_size()


def _fill(world: World, poison: bool, counts: list[int], accumulate: int) -> dict[str, Any]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), Statistics(), nn.Linear(8, 1)).double()
    model = world.wrap(body, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    active: list[bool] = []

    def step(engine: Engine, batch: Batch) -> None:
        x, y = batch
        loss = functional.mse_loss(model(x), y)
        world.all_reduce(1.0)  # a collective of the step's own
        if not engine.state.active and poison:
            loss = loss * float("nan")
        (loss * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()
        active.append(engine.state.active)

    data = [(x.repeat(2, 1), y.repeat(2, 1)) for x, y in _shard(world.rank, counts[world.rank])]
    Engine(step, accumulate=accumulate).run(data, max_epochs=2, uneven="longest")
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "tracked": int(body[1].num_batches_tracked),
        "calls": float(body[2].running),
        "active": sum(active),
        "iterations": len(active),
    }


def _fill_all(world: World) -> list[dict[str, Any]]:
    return [
        _fill(world, poison, counts, accumulate)
        for counts, accumulate in (([6, 0, 3], 1), ([5, 2, 4], 3))
        for poison in (False, True)
    ]


def test_a_filler_leaves_no_trace_even_when_its_loss_is_not_a_number() -> None:
    results = run_ranks(_fill_all, 3)
    for scenario, counts in enumerate(([6, 0, 3], [6, 0, 3], [5, 2, 4], [5, 2, 4])):
        for rank in range(3):
            told = results[rank][scenario]
            assert told["active"] == told["tracked"] == told["calls"] == 2 * counts[rank]
            assert told["iterations"] == 2 * max(counts)
            for mine, first in zip(told["parameters"], results[0][scenario]["parameters"], strict=True):
                assert mine.isfinite().all()
                assert torch.equal(mine, first)
    for clean, poisoned in ((0, 1), (2, 3)):
        for one, other in zip(results[0][clean]["parameters"], results[0][poisoned]["parameters"], strict=True):
            assert torch.equal(one, other)


def _count_reductions(world: World) -> tuple[list[int], int, int]:
    model = world.wrap(_model())
    reduced = 0

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and not as strings
        nonlocal reduced
        reduced += 1
        buffer = bucket.buffer().div_(world.world_size)
        work = dist.all_reduce(buffer, async_op=True)
        assert work is not None
        return work.get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, hook)
    after: list[int] = []
    calls = 0
    plain = dist.all_reduce

    def count(tensor: torch.Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
        nonlocal calls
        calls += group is None
        return plain(tensor, *args, group=group, **options)

    def step(engine: Engine, batch: Batch) -> None:
        (_loss(model, batch, False) * engine.state.weight).backward()
        after.append(reduced)

    dist.all_reduce = count
    try:
        Engine(step, accumulate=3).run(_shard(world.rank, [8, 7][world.rank]), uneven="longest")
    finally:
        dist.all_reduce = plain
    return after, reduced, calls


def test_gradients_are_reduced_at_a_groups_end_only() -> None:
    for after, reduced, calls in run_ranks(_count_reductions, 2):
        assert after == [0, 0, 1, 1, 1, 2, 2, 3]
        assert calls == reduced == 3


def _differ(world: World, cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[str, float]]:
    said = []
    for options, terms in cases:
        options, terms = (options, terms) if world.rank == 1 else ({}, {"max_epochs": 2})
        engine = Engine(lambda e, b: None, **{"name": "trainer", **options})
        began = time.monotonic()
        try:
            engine.run(_shard(world.rank, 4), **terms)
        except TermsError as error:
            said.append((str(error), time.monotonic() - began))
    return said


def test_ranks_about_to_run_different_things_are_told_within_two_seconds() -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"max_epochs": 3}),
        ({}, {"max_epochs": 2, "uneven": "longest"}),
        ({"accumulate": 2}, {"max_epochs": 2}),
        ({}, {"max_epochs": 2, "window": 1}),
        ({"name": "evaluator"}, {"max_epochs": 2}),
    ]
    words = ["max_epochs is rank 0: 2, rank 1: 3", "rank 1: 'longest'", "accumulate is rank 0: 1, rank 1: 2"]
    words += ["window is rank 0: None, rank 1: 1", "'trainer', rank 1: 'evaluator'"]
    for said in run_ranks(_differ, 3, cases):
        assert len(said) == len(cases)
        for (message, seconds), word in zip(said, words, strict=True):
            assert word in message
            assert seconds < 20  # on a machine that has other things to do
        assert min(seconds for _, seconds in said) < 2


def _stop(world: World) -> list[tuple[int, int, str | None, str | None]]:
    logging.getLogger("allstep.engine").disabled = True
    told: list[tuple[int, int, str | None, str | None]] = []

    def run(ask: Callable[[Engine], None], at: int, **terms: Any) -> None:
        engine = Engine(lambda e, b: None, name="run")
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=at), lambda: ask(engine))
        error = None
        try:
            engine.run(DataLoader(TensorDataset(torch.zeros(60, 1)), batch_size=1), max_epochs=2, **terms)
        except Exception as caught:
            error = type(caught).__name__
        told.append((engine.state.epoch, engine.state.iteration, engine.state.stop_reason, error))

    run(lambda e: e.terminate(reason="enough") if world.rank == 1 else None, 17)
    run(lambda e: e.terminate(reason="enough") if world.rank == 2 else None, 17, window=1)
    run(lambda e: e.terminate(agreed=True, reason="all"), 17)
    run(lambda e: e.terminate(agreed=True) if world.rank == 3 else None, 17)
    return [(e, i, r if r is None else r.split(": ")[-1], x) for e, i, r, x in told]


def test_a_stop_on_one_rank_ends_all_at_one_iteration() -> None:
    results = run_ranks(_stop, 4)
    early, at_once, agreed, _ = results[0]
    assert all(result[:3] == results[0][:3] for result in results)
    assert 17 <= early[1] <= 60
    assert early[2:] == ("enough", None)
    assert at_once == (1, 17, "enough", None)
    assert agreed == (1, 17, "all", None)
    assert [result[3][3] for result in results] == ["DivergenceError"] * 4
