"""A wrap that is refused leaves the model as it was: its modules, parameters, values, hooks and forward passes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import allstep
from allstep.errors import AllstepError
from allstep.parallel import is_fully_sharded, wrap_module
from allstep.world import World


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))


def blocks() -> nn.Module:
    return nn.Sequential(Block(), Block())


def facts(model: nn.Module) -> list[Any]:
    """What a wrap could have changed."""
    found: list[Any] = []
    for name, each in model.named_modules():
        hooks = [len(value) for key, value in sorted(vars(each).items()) if key.endswith("_hooks")]
        found.append((name, each, type(each), sorted(vars(each)), hooks))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.append((name, id(tensor), type(tensor), tensor.device, str(tensor.detach())))
    return found


@pytest.fixture(scope="module")
def in_parts() -> Iterator[World]:
    with allstep.init(device="cpu", mesh={"shard": 1, "tensor": 1}) as world:
        yield world


PLAN = {"*.up": "colwise", "*.down": "rowwise"}
ALL = {"tensor_plan": PLAN, "checkpoint_activations": Block, "compile": Block, "units": Block}

REFUSED: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "precision": lambda model: {"precision": "fp8"},
    "units": lambda model: {"units": nn.Conv2d},
    "ignored": lambda model: {"ignored": [nn.Parameter(torch.zeros(1))]},
    "ignored is divided": lambda model: {"ignored": [model[0].up.weight]},
    "option": lambda model: {"unit": Block},
    "plan": lambda model: {"tensor_plan": {**PLAN, "*.middle": "colwise"}},
    "style": lambda model: {"tensor_plan": {**PLAN, "*.norm": "colwise"}},
    "activations": lambda model: {"checkpoint_activations": nn.Conv2d},
    "compile": lambda model: {"compile": nn.Conv2d},
    "compile options": lambda model: {"compile_options": {"backends": "eager"}},
    "float8": lambda model: {"precision": "float8"},
    "a part is sharded": lambda model: {"units": Block},
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_refused_wrap_leaves_a_model_for_parts_as_it_was(in_parts: World, how: str) -> None:
    model = blocks()
    if how == "a part is sharded":
        fully_shard(model[0], mesh=in_parts.mesh["shard"])
    before = facts(model)
    with pytest.raises(AllstepError):
        in_parts.wrap(model, **(ALL | REFUSED[how](model)))
    assert facts(model) == before


def with_a_scalar() -> nn.Module:
    model = blocks()
    model[0].scale = nn.Parameter(torch.tensor(2.0))
    return model


def with_two_dtypes() -> nn.Module:
    model = blocks()
    model[1].up.bias = nn.Parameter(model[1].up.bias.detach().bfloat16())
    return model


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (with_a_scalar, {}, r"^0\.scale is a scalar.*ignored=\[model\.0\.scale\]"),
        (with_two_dtypes, {}, r"^1\.up\.weight is float32 and 1\.up\.bias is bfloat16.* a Block"),
        (
            lambda: nn.Sequential(nn.LazyLinear(2)),
            {},
            r"^0\.weight has no shape before the module's first forward pass",
        ),
        (lambda: nn.ModuleList([Block()]), {}, r"is a ModuleList, which has no forward pass"),
        (lambda: nn.Sequential(nn.Embedding(3, 2, sparse=True)), {}, r"^0 gives sparse gradients"),
        (blocks, {"reshard_after_forward": 2}, r"reshard_after_forward is 2; .* divides the 1 of shard"),
        (blocks, {"reshard_after_forward": 1, "tensor_plan": PLAN}, r"reshard_after_forward is 1, a number of ranks"),
    ],
)
def test_what_torch_cannot_put_in_parts_is_named_beforehand(
    in_parts: World, make: Callable[[], nn.Module], options: dict[str, Any], said: str
) -> None:
    model = make()
    known = {name: id(each) for name, each in model.named_parameters()}
    with pytest.raises(AllstepError, match=said):
        in_parts.wrap(model, **({"units": Block} if isinstance(model[0], Block) else {}), **options)
    assert {name: id(each) for name, each in model.named_parameters()} == known
    assert not any(map(is_fully_sharded, model.modules()))


def test_scalars_that_stay_whole_and_frozen_ones_of_other_dtypes_train(in_parts: World) -> None:
    model = blocks()
    model[1].table = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16), requires_grad=False)
    model[1].scale = nn.Parameter(torch.tensor(2.0))
    wrapped = in_parts.wrap(model, units=Block, ignored=[model[1].scale], tensor_plan={})
    (wrapped(torch.ones(4, 16)).sum() * model[1].scale).backward()
    assert model[1].scale.grad is not None
    assert model[0].up.weight.grad is not None


def test_norms_with_statistics_compute_in_their_own_dtype_in_16_bits(in_parts: World) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    seen: list[torch.dtype] = []
    for each in model:
        each.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    output = in_parts.wrap(model, precision="bf16", units=nn.BatchNorm1d)(torch.randn(8, 4))
    output.sum().backward()
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert model[1].running_mean.dtype == output.dtype == torch.float32
    assert model[1].weight.grad is not None


def test_a_model_whose_first_pass_is_in_inference_mode_trains(in_parts: World) -> None:
    model = in_parts.wrap(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), units=nn.Linear)
    with torch.inference_mode():
        model(torch.ones(2, 4))
    model(torch.ones(2, 4)).sum().backward()
    assert all(each.grad is not None for each in model.parameters())


def test_weights_in_another_memory_format_are_put_in_parts(in_parts: World) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    first, second = (each.weight.detach().clone() for each in model)
    model = in_parts.wrap(model, ignored=[model[1].weight])
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    assert torch.equal(model[0].weight.full_tensor(), first)
    assert torch.equal(model[1].weight, second)
    assert model[1].weight.grad.stride() == second.stride()


WITHOUT_PARTS: dict[str, Callable[[nn.Module], tuple[nn.Module, dict[str, Any]]]] = {
    "option": lambda model: (model, {"find_unused_params": True}),
    "plan": lambda model: (model, {"tensor_plan": {"*.middle": "colwise"}}),
    "activations": lambda model: (model, {"checkpoint_activations": nn.Conv2d}),
    "compile": lambda model: (model, {"compile": nn.Conv2d}),
    "ignored": lambda model: (model, {"ignored": [model[0].up.weight]}),
    "no module": lambda model: (None, {}),  # type: ignore[return-value]
}


@pytest.mark.parametrize("how", WITHOUT_PARTS)
def test_a_refused_wrap_puts_no_layer_in_float8(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[nn.Module] = []
    torchao = SimpleNamespace(
        convert_to_float8_training=lambda module, **_: converted.append(module), Float8LinearConfig=SimpleNamespace
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: torchao)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    model = blocks()
    before = facts(model)
    given, options = WITHOUT_PARTS[how](model)
    with pytest.raises(AllstepError):
        wrap_module(given, torch.device("cuda", 0), 2, in_float8=True, **options)
    assert not converted
    assert facts(model) == before


def test_a_refusal_of_ddp_gives_batch_norms_back(in_parts: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    model = blocks()
    before = facts(model)
    with pytest.raises(ValueError, match="device"):
        wrap_module(model, torch.device("cuda", 0), 2, sync_batchnorm=True, device_ids=[0, 1])
    assert facts(model) == before


def test_an_option_that_nothing_has_is_refused_over_tensor_alone(in_parts: World) -> None:
    with pytest.raises(TypeError, match="bucket_cap"):
        wrap_module(blocks(), in_parts.device, 1, mesh=in_parts.mesh["tensor"], tensor_plan=PLAN, bucket_cap=3)


class InFloat8(nn.Linear):
    """In place of torchao's layer."""


def test_what_is_asked_of_layers_holds_for_those_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(module: nn.Module, *, module_filter_fn: Callable[[nn.Module, str], bool], **_: Any) -> None:
        for outer in list(module.modules()):
            for name, each in list(outer.named_children()):
                if module_filter_fn(each, name):
                    setattr(outer, name, InFloat8(each.in_features, each.out_features))

    torchao = SimpleNamespace(convert_to_float8_training=convert, Float8LinearConfig=SimpleNamespace)
    monkeypatch.setattr(importlib, "import_module", lambda name: torchao)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    model = blocks()
    wrap_module(
        model, torch.device("cuda", 0), 1, in_float8=True, checkpoint_activations=lambda each: type(each) is nn.Linear
    )
    layers = [model[0].up, model[0].down, model[1].up, model[1].down]
    assert all(type(each) is InFloat8 and "forward" in vars(each) for each in layers)
