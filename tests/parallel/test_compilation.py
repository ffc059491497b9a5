"""Models that torch compiles: names, how often, over ranks, and beside fixed buckets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.errors import AllstepError
from allstep.parallel import Compilations, wrap_module
from allstep.testing import run_ranks
from allstep.world import World
from tests.parallel.sharded_training import Block, Plan, Transformer, alone, check_equal, train

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NO_COMPILER = {"backend": "aot_eager"}  # which needs no C++ compiler


def compiled_often(_: World) -> dict[str, Any]:
    """Two epochs of ragged batches through four compiled blocks."""
    torch.manual_seed(0)
    plain = Transformer(blocks=4)
    names = list(plain.state_dict())
    expected = plain(torch.zeros(3, 5, dtype=torch.int64))
    counts = Compilations()
    model = wrap_module(plain, CPU, 1, compile=Block, compile_options=NO_COMPILER)
    said = []
    for _epoch in range(2):
        for size in (4, 4, 3, 2, 1):
            output = model(torch.zeros(size, 5, dtype=torch.int64))
            output.sum().backward()
            if size == 3:
                torch.testing.assert_close(output, expected)
        said.append(counts.in_words())
    return {"is_same": model is plain, "names": list(model.state_dict()) == names, "said": said}


def compiled_by_block(world: World) -> tuple[dict[str, Any] | None, tuple[dict[str, Any], bool, str]]:
    """Both in one process, since torch's compiler takes long to import: ragged batches on rank 0, and a training."""
    return compiled_often(world) if world.is_main else None, compiled_training(world, BY_BLOCK)


@pytest.fixture(scope="module")
def by_block() -> list[Any]:
    return run_ranks(compiled_by_block, 2, env={"ALLSTEP_MESH": "shard=2"})


def test_blocks_compile_together_and_ragged_batches_end_compiling(by_block: list[Any]) -> None:
    found = by_block[0][0]
    assert found["is_same"]
    assert found["names"]
    first, second = found["said"]
    assert first == second  # the second epoch compiles nothing
    assert first.startswith("1 compiled, 2 again (")
    assert "size mismatch at index 0. expected 4, actual 3" in first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": nn.Conv2d}, "compile is .*Conv2d.*, which no submodule fits"),
        ({"compile": True, "compile_options": {"back_end": "eager"}}, "did you mean backend"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AllstepError, match=message):
        wrap_module(Transformer(), CPU, 1, **options)


BY_BLOCK = Plan(
    options=(("units", Block),),
    everywhere=(("compile", Block), ("compile_options", NO_COMPILER), ("checkpoint_activations", Block)),
)
WHOLE = replace(BY_BLOCK, everywhere=(("compile", True), ("compile_options", NO_COMPILER)))


def compiled_training(world: World, plan: Plan) -> tuple[dict[str, Any], bool, str]:
    has_fixed = []

    def seen(self: Any, *arguments: Any, **options: Any) -> Any:
        model = wrap(*arguments, **options)
        has_fixed.append(not isinstance(model, DistributedDataParallel) or model._has_rebuilt_buckets)
        return model

    wrap = world.wrap
    world.wrap = seen.__get__(world)  # type: ignore[method-assign]
    counts = Compilations()
    return train(world, plan), has_fixed[0], counts.in_words()


def check_trained(ranks: list[tuple[dict[str, Any], bool, str]]) -> None:
    for found, has_fixed_buckets, said in ranks:
        check_equal(found, alone(Plan()))
        assert has_fixed_buckets
        assert " compiled, " in said
        assert not said.startswith("0 ")


def test_compiled_blocks_train_what_one_process_trains(by_block: list[Any]) -> None:
    check_trained([trained for _, trained in by_block])


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("ranks", "mesh", "plan"),
    [
        (2, "replicate=2", WHOLE),
        (2, "replicate=2", BY_BLOCK),
        (2, "shard=2", WHOLE),
        (4, "shard=2,tensor=2", BY_BLOCK),
    ],
)
def test_a_compiled_model_trains_what_one_process_trains(ranks: int, mesh: str, plan: Plan) -> None:
    check_trained(run_ranks(compiled_training, ranks, plan, env={"ALLSTEP_MESH": mesh}))


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own compiler writes C++ on the CPU")
@pytest.mark.parametrize("mesh", ["replicate=2", "shard=2"])
def test_torchs_own_compiler_trains_units_as_one_process_does(mesh: str) -> None:
    plan = replace(BY_BLOCK, samples=13, epochs=1, everywhere=(("compile", Block),))
    for found, _, said in run_ranks(compiled_training, 2, plan, env={"ALLSTEP_MESH": mesh}, timeout=500):
        check_equal(found, alone(plan))  # under the same names
        assert not said.startswith("0 ")


def compiled_in_16_bits(world: World) -> tuple[list[torch.dtype], torch.dtype, float]:
    world.seed_everything(0)
    plain, tokens = Transformer(), torch.zeros(3, 5, dtype=torch.int64)
    expected = plain(tokens).detach()
    inside: list[torch.dtype] = []
    plain.head.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    model = world.wrap(plain, compile=True, compile_options=NO_COMPILER, precision="bf16")
    for _ in range(2):
        output = model(tokens)
        output.sum().backward()
    return inside, output.dtype, float((output - expected).norm() / expected.norm())


@pytest.mark.nightly
def test_a_whole_model_compiles_in_16_bits() -> None:
    (found,) = run_ranks(compiled_in_16_bits, 1)
    assert set(found[0]) == {torch.bfloat16}
    assert found[1] == torch.float32
    assert 0 < found[2] < 0.03
