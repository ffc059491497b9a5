"""Random states of random types and shapes over simulated ranks: folded as defined, in one collective or two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import Metric

from allstep import Alone, Engine
from allstep.coordination import Coordinator
from allstep.errors import MetricError, MetricMismatchError
from allstep.metrics import Max, Mean, Metrics, Sum
from allstep.metrics.exchange import FIRST_FRAME, Exchange
from allstep.metrics.nodes import metric_set
from allstep.metrics.states import make_plan
from allstep.testing import simulate
from tests.metrics.worlds import all_same_bits, same_bits, take

NUMERIC = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]
ANY = [*NUMERIC, torch.bool, torch.complex64]


class States(Metric):
    """A metric with the states that it is given; computes them as they are. `updates` is what it has seen."""

    full_state_update = False

    def __init__(self, states: dict[str, tuple[Any, Any]], updates: int = 1) -> None:
        super().__init__()
        for name, (value, reduction) in states.items():
            self.add_state(name, [] if isinstance(value, list) else torch.zeros_like(value), reduction)
            setattr(self, name, value)
        self._update_count = updates

    def update(self) -> None: ...

    def compute(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._defaults}


def reduced(make: Any, world_size: int) -> list[dict[str, Any]]:
    """What each rank computes from all ranks' states; rank r has those of `make(r)`."""

    def rank(coordinator: Coordinator) -> dict[str, Any]:
        engine = Engine(take, coordinator=coordinator)
        metrics = Metrics({"it": make(coordinator.rank)}).attach(engine)
        before = metrics.state_dict()
        engine.extension.reductions[0](engine)  # type: ignore[operator]
        assert same_bits(metrics.state_dict(), before)
        found: dict[str, Any] = engine.state.metrics["it"]
        return found

    found = simulate(rank, world_size)
    assert all_same_bits(found)
    return found


def tensors(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def squeezed(tensor: torch.Tensor) -> torch.Tensor:
    """What torchmetrics makes of a result with one element."""
    return tensor.squeeze() if tensor.numel() == 1 else tensor


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
worlds = st.integers(2, 5)


@settings(max_examples=60, deadline=None)
@given(
    worlds, st.lists(st.tuples(shapes, st.sampled_from(NUMERIC), st.sampled_from(["sum", "max", "min"])), max_size=6)
)
def test_fixed_states_of_any_type_and_shape_are_reduced_element_by_element(
    world_size: int, forms: list[tuple[tuple[int, ...], torch.dtype, str]]
) -> None:
    def make(rank: int) -> States:
        return States(
            {f"s{i}": (tensors(shape, dtype, 10 * rank + i), op) for i, (shape, dtype, op) in enumerate(forms)}
            | {"last": (torch.tensor(rank), "sum")}
        )

    found = reduced(make, world_size)[0]
    for i, (shape, dtype, op) in enumerate(forms):
        stacked = torch.stack([tensors(shape, dtype, 10 * rank + i) for rank in range(world_size)])
        wide = stacked.double() if dtype.is_floating_point else stacked.to(torch.int64)
        expected = wide.sum(0) if op == "sum" else wide.amax(0) if op == "max" else wide.amin(0)
        grows = op == "sum" and not dtype.is_floating_point and dtype != torch.uint64
        assert same_bits(found[f"s{i}"], squeezed(expected if grows else expected.to(dtype)))


@settings(max_examples=60, deadline=None)
@given(worlds, st.data())
def test_lists_of_any_length_type_and_shape_are_flattened_in_rank_order(world_size: int, data: st.DataObject) -> None:
    elements = st.lists(st.tuples(shapes, st.sampled_from(ANY)), max_size=4)
    held = [
        [tensors(shape, dtype, 100 * rank + at) for at, (shape, dtype) in enumerate(data.draw(elements))]
        for rank in range(world_size)
    ]
    found = reduced(lambda rank: States({"kept": (list(held[rank]), None)}), world_size)[0]
    every = [tensor for of_rank in held for tensor in of_rank]
    assert same_bits(found["kept"], [squeezed(tensor) for tensor in every])


@settings(max_examples=40, deadline=None)
@given(worlds, st.data(), st.sampled_from(ANY), shapes)
def test_concatenated_lists_are_concatenated_in_rank_order(
    world_size: int, data: st.DataObject, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    sizes = st.lists(st.integers(0, 4), max_size=3)
    held = [
        [tensors((n, *shape), dtype, 100 * rank + at) for at, n in enumerate(data.draw(sizes))]
        for rank in range(world_size)
    ]
    found = reduced(lambda rank: States({"kept": (list(held[rank]), "cat")}), world_size)[0]
    every = [tensor for of_rank in held for tensor in of_rank]
    assert same_bits(found["kept"], squeezed(torch.cat(every))) if every else found["kept"] == []


@settings(max_examples=30, deadline=None)
@given(worlds, shapes, st.sampled_from(ANY), st.sets(st.integers(0, 4)))
def test_tensors_without_a_reduction_are_stacked_over_ranks_that_saw_any(
    world_size: int, shape: tuple[int, ...], dtype: torch.dtype, empties: set[int]
) -> None:
    seen = [rank for rank in range(world_size) if rank not in empties] or [0]
    found = reduced(lambda rank: States({"kept": (tensors(shape, dtype, rank), None)}, rank in seen), world_size)[0]
    stacked = torch.stack([tensors(shape, dtype, rank) for rank in seen])
    assert same_bits(found["kept"], squeezed(stacked))


def test_an_unweighted_mean_leaves_out_ranks_that_saw_nothing() -> None:
    values = [torch.tensor([1.0, 8.0]), torch.tensor([0.0, 0.0]), torch.tensor([3.0, 2.0])]
    found = reduced(lambda rank: States({"m": (values[rank], "mean")}, rank != 1), 3)
    assert found[0]["m"].tolist() == [2.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e5m2])
def test_an_unweighted_mean_of_any_type_is_a_float(dtype: torch.dtype) -> None:
    found = reduced(lambda rank: States({"m": (torch.tensor([rank % 2, 1]).to(dtype), "mean")}), 2)
    assert found[0]["m"].dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert found[0]["m"].float().tolist() == [0.5, 1.0]


def test_unsigned_integers_beyond_int64_keep_their_order_and_their_sum() -> None:
    values = [2**63 + 5, 7]

    def make(rank: int) -> States:
        held = torch.tensor([values[rank]], dtype=torch.uint64)
        return States({op: (held.clone(), op) for op in ("sum", "max", "min")})

    found = reduced(make, 2)[0]
    assert [found[op].item() for op in ("sum", "max", "min")] == [2**63 + 12, 2**63 + 5, 7]


def fails(stack: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("value", "reduction", "told"),
    [
        (torch.ones(2, dtype=torch.complex64), "max", r"max of torch\.complex64 cannot.*metric 'it', state 'kept'"),
        (torch.ones(2), fails, r"metric 'it', state 'kept': reduced by fails failed on .* \(2, 2\): broken"),
    ],
)
def test_a_reduction_that_fails_names_metric_and_state(value: torch.Tensor, reduction: Any, told: str) -> None:
    def rank(coordinator: Coordinator) -> None:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"it": States({"kept": (value, reduction)})}).attach(engine)
        with pytest.raises(MetricError, match=told):
            engine.extension.reductions[0](engine)  # type: ignore[operator]

    simulate(rank, 2)


def the_greatest_row(stack: torch.Tensor) -> torch.Tensor:
    assert stack.ndim == 2
    return stack.amax(1)


def test_a_function_is_given_the_stack_of_tensors_or_the_flattened_list() -> None:
    def make(rank: int) -> States:
        return States(
            {
                "stacked": (torch.tensor([rank, 10.0]), the_greatest_row),
                "listed": ([torch.tensor([rank])] * rank, lambda every: torch.stack(every).sum(0)),
            }
        )

    found = reduced(make, 3)[0]
    assert found["stacked"].tolist() == [10.0, 10.0, 10.0]
    assert found["listed"].tolist() == 5


def test_elements_that_are_no_tensors_travel_too() -> None:
    found = reduced(lambda rank: States({"words": ([("rank", rank)] * rank, None)}), 3)[0]
    assert found["words"] == [("rank", 1), ("rank", 2), ("rank", 2)]


def calls_of(make: Any, world_size: int, times: int = 1) -> list[int]:
    """Meetings that each reduction takes."""

    def rank(coordinator: Any) -> list[int]:
        plan = make_plan("event", metric_set({"it": make(coordinator.rank)}).nodes, {})
        exchange, counts = Exchange(), []
        for _ in range(times):
            before = coordinator.calls
            exchange.gather(coordinator, plan, {})
            counts.append(coordinator.calls - before)
        return counts

    found = simulate(rank, world_size)
    assert found == [found[0]] * world_size
    return found[0]


def test_small_states_take_one_collective_each_time() -> None:
    assert calls_of(lambda rank: States({"s": (torch.zeros(100), "sum")}), 3, times=3) == [1, 1, 1]


def test_states_beyond_the_first_frame_take_two_collectives_once_and_then_one() -> None:
    many = FIRST_FRAME
    assert calls_of(lambda rank: States({"s": (torch.zeros(many), "sum")}), 3, times=3) == [2, 1, 1]
    assert calls_of(lambda rank: States({"s": ([torch.zeros(many)] * (rank == 1), "cat")}), 3, times=3) == [2, 1, 1]


def test_fixed_states_take_one_collective_from_the_first_time_on() -> None:
    many = 3 * FIRST_FRAME

    def rank(coordinator: Any) -> list[int]:
        engine = Engine(take, coordinator=coordinator)
        Metrics({"it": States({"s": (torch.zeros(many), "sum"), "n": (torch.tensor(1), "max")})}).attach(engine)
        counts = []
        for _ in range(2):
            before = coordinator.calls
            engine.extension.reductions[0](engine)  # type: ignore[operator]
            counts.append(coordinator.calls - before)
        return counts

    assert simulate(rank, 3) == [[1, 1]] * 3


def test_metrics_attached_anew_on_one_rank_only_are_an_error() -> None:
    def rank(coordinator: Any) -> str:
        engine = Engine(take, coordinator=coordinator)
        metrics = Metrics({"it": Mean()}).attach(engine)
        engine.run([1.0])
        if coordinator.rank:
            metrics.detach()
            metrics.attach(engine)
        with pytest.raises(MetricMismatchError) as caught:
            engine.run([1.0])
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors[0] == errors[1]
    assert "gathered for the first time on rank 1" in errors[0]


def test_large_states_are_reduced_once_for_each_operation_and_type() -> None:
    forms = [("sum", torch.float32), ("sum", torch.int32), ("max", torch.float64), ("min", torch.bfloat16)]
    values = {
        (rank, op, dtype): tensors((6, 3), dtype, 10 * rank + i)
        for rank in range(3)
        for i, (op, dtype) in enumerate(forms)
    }

    def rank(coordinator: Any) -> tuple[list[torch.Tensor], int]:
        states = {f"{op}{i}": (values[coordinator.rank, op, dtype], op) for i, (op, dtype) in enumerate(forms)}
        plan = make_plan("event", metric_set({"it": States(states)}).nodes, {})
        small = Exchange().gather(coordinator, plan, {}).blocks
        before = coordinator.calls
        large = Exchange(largest=3).gather(coordinator, plan, {}).blocks
        assert coordinator.calls - before == 1 + len(forms)
        assert same_bits(large, small)
        return large, coordinator.calls

    assert all_same_bits(simulate(rank, 3))


@pytest.mark.parametrize("largest", [3, 1_000_000], ids=["reduced", "gathered"])
def test_states_of_ranks_that_share_their_batches_count_once(largest: int) -> None:
    def rank(coordinator: Any) -> list[torch.Tensor]:
        own = float(coordinator.data.rank + 1)
        states = {op: (torch.full((4,), own), op) for op in ("sum", "max", "min")}
        plan = make_plan("event", metric_set({"it": States(states)}).nodes, {})
        return Exchange(largest=largest).gather(coordinator, plan, {}).blocks

    for blocks in simulate(rank, 4, sharing=2):
        assert sorted(block[0].item() for block in blocks) == [1.0, 2.0, 3.0]


def mismatched(make: Any, world_size: int = 3) -> list[str]:
    """The error of each rank."""

    def rank(coordinator: Coordinator) -> str:
        plan = make_plan("EPOCH_COMPLETED", metric_set({"it": make(coordinator.rank)}).nodes, {})
        with pytest.raises(MetricMismatchError) as caught:
            Exchange().gather(coordinator, plan, {})
        return str(caught.value)

    return simulate(rank, world_size)


@pytest.mark.parametrize(
    ("value", "reduction", "told"),
    [
        (torch.zeros(3), "sum", "shape (3,) on rank 1"),
        (torch.zeros(2, dtype=torch.int64), "sum", "int64, shape (2,) on rank 1"),
        (torch.zeros(2), "max", "max, float32, shape (2,) on rank 1"),
        ([], "cat", "a list, cat on rank 1"),
        (torch.zeros(50_000), "sum", "shape (50000,) on rank 1"),
    ],
    ids=["shape", "type", "operation", "kind", "size"],
)
def test_states_that_differ_are_the_same_error_on_all_ranks(value: Any, reduction: str, told: str) -> None:
    errors = mismatched(lambda rank: States({"s": (value, reduction) if rank == 1 else (torch.zeros(2), "sum")}))
    assert errors == [errors[0]] * 3
    assert "metric 'it (States)', state 's'" in errors[0]
    assert "sum, float32, shape (2,) on ranks 0, 2" in errors[0]
    assert told in errors[0]


def test_a_state_that_one_rank_lacks_is_named() -> None:
    errors = mismatched(
        lambda rank: States({"a": (torch.zeros(2), "sum")} | ({} if rank == 2 else {"b": (torch.zeros(2), "sum")}))
    )
    assert errors == [errors[0]] * 3
    assert "metric 'it (States)', state 'b', at EPOCH_COMPLETED on ranks 0, 1; no further state on rank 2" in errors[0]


def test_concatenations_that_do_not_fit_together_name_metric_state_and_ranks() -> None:
    def rank(coordinator: Coordinator) -> str:
        engine = Engine(take, coordinator=coordinator)
        wide = torch.zeros(2, 3 + coordinator.rank)
        Metrics({"it": States({"s": ([wide], "cat")})}).attach(engine)
        with pytest.raises(MetricMismatchError) as caught:
            engine.extension.reductions[0](engine)  # type: ignore[operator]
        return str(caught.value)

    errors = simulate(rank, 2)
    assert errors == [errors[0]] * 2
    assert "metric 'it', state 's'" in errors[0]
    assert "rank 0: float32 (3,) a sample; rank 1: float32 (4,) a sample" in errors[0]


def test_a_rank_that_cannot_pack_its_states_is_an_error_on_all() -> None:
    def rank(coordinator: Coordinator) -> str:
        ragged = [torch.zeros(2, 3), torch.zeros(2, 4)] if coordinator.rank == 1 else [torch.zeros(2, 3)]
        plan = make_plan("event", metric_set({"it": States({"s": (ragged, "cat")})}).nodes, {})
        with pytest.raises(MetricError) as caught:
            Exchange().gather(coordinator, plan, {})
        return str(caught.value)

    errors = simulate(rank, 3)
    assert errors == [errors[0]] * 3
    assert "rank 1: RuntimeError" in errors[0]
    assert "rank 0" not in errors[0]


def test_on_an_accelerator_the_payloadtravels_apart_from_what_the_host_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(rank: int) -> States:
        return States(
            {
                "sum": (tensors((3,), torch.int32, rank), "sum"),
                "top": (tensors((2, 2), torch.float32, rank), "max"),
                "kept": ([tensors((rank, 2), torch.float64, rank)] * rank, None),
                "cat": ([tensors((2 * rank,), torch.bool, rank)], "cat"),
                "words": ([f"rank {rank}"], None),
            }
        )

    on_host = reduced(make, 3)[0]
    monkeypatch.setattr("allstep.metrics.exchange.travels_apart", lambda device: True)
    assert same_bits(reduced(make, 3)[0], on_host)
    assert calls_of(make, 3, times=2) == [2, 2]
    assert calls_of(lambda rank: States({"words": (["a"], None)}), 3) == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_host_waits_for_no_result_until_it_is_read() -> None:
    engine = Engine(take, coordinator=Alone())
    values = {"mean": lambda o: o, "sum": lambda o: o, "max": lambda o: o}
    Metrics({"mean": Mean(), "sum": Sum(), "max": Max()}).attach(engine, values, device="cuda")
    data = [torch.rand(4, device="cuda") for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        state = engine.run(data, max_epochs=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    every = torch.cat(data).double()
    assert state.metrics["mean"].device.type == "cuda"
    assert float(state.metrics["sum"]) == pytest.approx(float(every.sum()))


def test_a_world_of_one_computes_from_its_own_states_and_leaves_them() -> None:
    engine = Engine(take, coordinator=Alone())
    kept = [torch.ones(2)]
    metric = States({"total": (torch.ones(2), "sum"), "kept": (kept, "cat")})
    Metrics({"it": metric}).attach(engine)
    engine.extension.reductions[0](engine)  # type: ignore[operator]
    assert metric.kept is kept
    assert engine.state.metrics["it"]["total"].tolist() == [1.0, 1.0]
