"""Which submodules are gathered in one piece."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from allstep.errors import ArgumentError, ParallelError
from allstep.parallel import choose_units
from tests.parallel.sharded_training import Block, SharedBlock, Transformer


def unit_names(module: nn.Module, units: Any) -> list[str]:
    names = {each: name for name, each in module.named_modules()}
    return [names[each] for each in choose_units(module, units)]


def test_units_are_chosen_by_class_predicate_or_size() -> None:
    model = Transformer(tied=False, blocks=6)
    blocks = [f"blocks.{at}" for at in range(6)][::-1]
    assert unit_names(model, Block) == blocks
    assert unit_names(model, lambda each: isinstance(each, nn.LayerNorm)) == [f"{each}.norm" for each in blocks]
    assert unit_names(model, None) == ["head", "embedding", *blocks]
    assert unit_names(Transformer(tied=True, blocks=6), None) == blocks  # the tied ones stay with the whole
    assert unit_names(SharedBlock(), nn.Sequential) == ["outer.0.0", "outer.1", "outer.0"]


def test_what_torchs_attention_computes_with_itself_is_no_unit() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
    assert unit_names(encoder, None) == ["layers.0"]
    assert unit_names(encoder, (nn.Linear, nn.LayerNorm, nn.TransformerEncoderLayer)) == ["layers.0"]


def test_units_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ParallelError, match="no submodule fits; the module has Block, Embedding"):
        choose_units(Transformer(), nn.Conv2d)
    with pytest.raises(ParallelError, match="ModuleList, which has no forward pass"):
        choose_units(Transformer(), nn.ModuleList)
    with pytest.raises(ArgumentError, match="units is 3"):
        choose_units(Transformer(), 3)  # type: ignore[arg-type]
