"""Collectives over real gloo ranks."""

from __future__ import annotations

import inspect
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allstep.errors import CollectiveError
from allstep.protocol.heartbeat import RankActivity
from allstep.testing import run_ranks
from allstep.world.collectives import NamedWaits, fold

OPS = ("sum", "mean", "min", "max", "product")


def reduce_numbers(world):
    rank = world.rank
    return {
        "ints": world.all_reduce(2**53 + 1),
        "beyond": world.all_reduce(2**63 - 1),
        "pi": world.all_reduce(math.pi, "mean"),
        "bools": world.all_reduce(rank == 0),
        "all": world.all_reduce(rank == 0, "min"),
        "mixed": world.all_reduce(1 if rank == 0 else 0.5),
        "max": world.all_reduce(rank, "max"),
        "product": world.all_reduce(rank + 2, "product"),
    }


def test_numbers_are_reduced_exactly_and_alike_on_every_rank():
    results = run_ranks(reduce_numbers, 3)
    assert results[0] == {
        "ints": 3 * (2**53 + 1),
        "beyond": 3 * (2**63 - 1),
        "pi": math.pi,
        "bools": 1,
        "all": False,
        "mixed": 2.0,
        "max": 2,
        "product": 24,
    }
    assert results[1] == results[2] == results[0]
    assert type(results[0]["ints"]) is int
    assert type(results[0]["all"]) is bool


def reduce_tensors(world):
    x = torch.tensor([[3, 1], [0, 2]]).T if world.rank == 0 else torch.tensor([[1, 1], [1, 2]])
    results = {}
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.float32, torch.float64):
        own = x.to(dtype)
        before = own.clone()
        results[dtype] = {op: world.all_reduce(own, op) for op in OPS}
        assert torch.equal(own, before)
    return results


@pytest.fixture(scope="module")
def reduced():
    return run_ranks(reduce_tensors, 2)


EXPECTED = {
    "sum": [[4, 1], [2, 4]],
    "mean": [[2, 0.5], [1, 2]],
    "min": [[1, 0], [1, 2]],
    "max": [[3, 1], [1, 2]],
    "product": [[3, 0], [1, 4]],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float16, torch.float32, torch.float64])
def test_tensors_are_reduced_also_when_not_contiguous(reduced, dtype, op):
    integer = not dtype.is_floating_point
    result_dtype = {"mean": torch.float64, "sum": torch.int64, "product": torch.int64}.get(op) if integer else None
    for results in reduced:
        torch.testing.assert_close(
            results[dtype][op], torch.tensor(EXPECTED[op], dtype=result_dtype or dtype), rtol=0, atol=0
        )


def test_bool_tensors_are_counted_and_compared(reduced):
    results = reduced[1][torch.bool]
    assert results["sum"].tolist() == [[2, 1], [2, 2]]
    assert results["min"].tolist() == [[True, False], [True, True]]
    assert results["max"].dtype == torch.bool
    assert results["mean"].tolist() == [[1.0, 0.5], [1.0, 1.0]]


def reduce_precisely(world):
    big = torch.tensor([2**53 + 1])
    return {
        "int64": world.all_reduce(big),
        "float64": world.all_reduce(torch.tensor([math.pi], dtype=torch.float64)),
        "int8": world.all_reduce(torch.tensor([100], dtype=torch.int8)),
        "half": world.all_reduce(torch.tensor([60000.0], dtype=torch.float16), "mean"),
        "complex": world.all_reduce(torch.tensor([1 + 2j])),
        "empty": world.all_reduce(torch.empty(0, 3)).shape,
        "scalar": world.all_reduce(torch.tensor(1.0, requires_grad=True)),
    }


def test_tensors_lose_nothing_on_the_way():
    result = run_ranks(reduce_precisely, 2)[1]
    assert result["int64"].item() == 2 * (2**53 + 1)
    assert result["float64"].item() == 2 * math.pi
    assert result["int8"].item() == 200
    assert result["half"].item() == 60000.0
    assert result["complex"].item() == 2 + 4j
    assert result["empty"] == (0, 3)
    assert (result["scalar"].item(), result["scalar"].requires_grad) == (2.0, False)


def gather(world):
    rank = world.rank
    own = torch.full((rank, 2), float(rank)) if rank < 2 else torch.tensor([[True, False, True]])
    return {
        "ragged": world.all_gather(own),
        "numbers": world.all_gather([2**53 + 1, math.pi, True][rank]),
        "mixed": world.all_gather(torch.ones(1) if rank == 0 else rank),
        "objects": world.gather_objects({"rank": rank, "text": "x" * 1000 * rank}),
    }


def test_gathered_tensors_may_differ_in_shape_and_dtype():
    for result in run_ranks(gather, 3):
        first, second, third = result["ragged"]
        assert first.shape == (0, 2)
        assert second.tolist() == [[1.0, 1.0]]
        assert third.tolist() == [[True, False, True]]
        assert third.dtype == torch.bool
        assert result["numbers"] == [2**53 + 1, math.pi, True]
        assert (result["mixed"][0].tolist(), result["mixed"][1:]) == ([1.0], [1, 2])
        assert [(each["rank"], len(each["text"])) for each in result["objects"]] == [(0, 0), (1, 1000), (2, 2000)]


def broadcast(world):
    last = world.world_size - 1
    source = torch.arange(6, dtype=torch.float64).reshape(2, 3).T
    return (
        world.broadcast(source if world.rank == last else None, src=last),
        world.broadcast(source if world.rank == 0 else torch.zeros(1, dtype=torch.bool)),
        world.broadcast(2**53 + 1 if world.rank == 0 else None),
        world.broadcast(math.pi if world.rank == 0 else -1),
    )


def test_a_broadcast_tells_shape_and_dtype_itself():
    expected = torch.arange(6, dtype=torch.float64).reshape(2, 3).T
    for from_last, over_other, number, pi in run_ranks(broadcast, 2):
        assert torch.equal(from_last, expected)
        assert from_last.dtype == torch.float64
        assert torch.equal(over_other, expected)
        assert (number, pi) == (2**53 + 1, math.pi)


def refuse(world):
    messages = []
    for call in (
        lambda: world.all_gather("text" if world.rank == 1 else torch.ones(2)),
        lambda: world.all_reduce(2**63 if world.rank == 1 else 1),
        lambda: world.broadcast(None if world.rank == 1 else 1, src=1),
        lambda: world.gather_objects((lambda: 0) if world.rank == 1 else 0),
    ):
        try:
            call()
        except CollectiveError as error:
            messages.append(str(error))
    return messages, world.all_reduce(1)


def test_what_one_rank_cannot_send_is_one_error_and_the_next_call_works():
    (first, total), (second, _) = run_ranks(refuse, 2)
    assert first == second
    assert total == 2
    names = ("all_gather", "all_reduce", "broadcast", "gather_objects")
    assert [message.startswith(f"{name} on rank 1") for name, message in zip(names, first, strict=True)] == [True] * 4


def seeded(world):
    world.seed_everything(7)
    shared = torch.rand(2).tolist()
    world.seed_everything(7, per_rank=True)
    return shared, torch.rand(2).tolist()


def test_seeding_gives_all_ranks_one_stream_or_each_its_own():
    one, two = run_ranks(seeded, 2)
    assert one[0] == two[0]
    assert one[1] != two[1]
    assert one[1] != one[0]
    assert run_ranks(seeded, 3)[:2] == [one, two]


def prints(world, path):
    world.print(world.rank, file=path.open("a"))
    world.barrier()


def test_only_the_main_rank_prints(tmp_path):
    run_ranks(prints, 2, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "0\n"


def loaded(world):
    data = torch.utils.data.TensorDataset(torch.arange(10))
    return [batch[0].tolist() for batch in world.loader(data, global_batch_size=4)]


def test_the_loader_gives_each_rank_its_share():
    first, second = run_ranks(loaded, 2)
    assert sorted(itertools.chain(*first, *second)) == list(range(10))
    assert [len(a) + len(b) for a, b in zip(first, second, strict=True)] == [4, 4, 2]


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("numbers", "op", "result"),
    [
        ([2**53 + 1, 2**53 + 1], "sum", 2**54 + 2),
        ([2**62, 2**62, 2**62], "sum", 3 * 2**62),
        ([2**40, 2**40], "product", 2**80),
        ([1, 2], "mean", 1.5),
        ([2**63 - 1, 2**63 - 1], "mean", float(2**63)),
        ([3, 1.5], "sum", 4.5),
        ([1e100, 1.0, -1e100], "sum", 1.0),
        ([True, True], "sum", 2),
        ([True, False], "min", False),
        ([3, -2], "min", -2),
        ([3, -2], "max", 3),
        ([INF, 1.0], "sum", INF),
        ([1.7e308, 1.7e308], "sum", INF),
    ],
)
def test_fold(numbers, op, result):
    folded = fold(numbers, op)
    assert folded == result
    assert type(folded) is type(result)


@pytest.mark.parametrize(("numbers", "op"), [([INF, -INF], "sum"), ([1.0, NAN], "min"), ([NAN, 1], "max")])
def test_what_is_no_number_stays_visible(numbers, op):
    assert math.isnan(fold(numbers, op))


@given(st.lists(st.floats(-1e200, 1e200), min_size=1, max_size=20))
def test_a_sum_of_floats_is_the_exact_sum_rounded_once_in_any_order(numbers):
    exact = float(sum(map(Fraction, numbers)))
    assert fold(numbers, "sum") == exact
    assert fold(numbers[::-1], "sum") == exact


def test_a_wait_has_a_name_a_number_and_the_line_of_its_caller():
    activity = RankActivity()
    waits = NamedWaits(activity)
    seen = []
    for name in ("barrier", "all_reduce"):
        with waits.at(name): line = inspect.currentframe().f_lineno; seen.append(activity.waiting)  # fmt: skip # noqa: E701, E702
    assert seen == [f"barrier #1 at test_collectives.py:{line}", f"all_reduce #2 at test_collectives.py:{line}"]
    assert activity.waiting == ""


def test_a_wait_that_raises_is_over():
    activity = RankActivity()
    with pytest.raises(KeyError), NamedWaits(activity).at("gather_objects"):
        raise KeyError("in the collective")
    assert activity.waiting == ""


def test_a_wait_has_no_line_where_python_keeps_no_frames(monkeypatch):
    monkeypatch.setattr("inspect.currentframe", lambda: None)
    activity = RankActivity()
    with NamedWaits(activity).at("close"):
        assert activity.waiting == "close #1"
