"""Each name that torch does not promise is taken away, and a save goes another way."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from allstep.checkpoint.encoding import decode, encode
from allstep.checkpoint.torch_private import module_versions, wraps_tensors
from allstep.errors import UnsupportedStateError
from allstep.parallel import shard_boxes
from allstep.testing import run_ranks
from allstep.world import World


def locate_shards(world: World) -> list[tuple[Any, Any]]:
    """Where the shards of several layouts lie, as torch says and as is computed without its protocol."""
    mesh = init_device_mesh("cpu", (2, 2))
    one = init_device_mesh("cpu", (4,))
    tensors = [
        *(distribute_tensor(torch.zeros(5, 7), one, [placement]) for placement in (Shard(0), Shard(1), Replicate())),
        distribute_tensor(torch.zeros(6, 10), mesh, [Replicate(), Shard(0)]),
        distribute_tensor(torch.zeros(6, 10), mesh, [Shard(0), Shard(1)]),
        distribute_tensor(torch.zeros(7, 10), mesh, [Shard(0), Shard(0)]),
        distribute_tensor(torch.zeros(2, 3), one, [Shard(0)]),
    ]
    known = [shard_boxes(each) for each in tensors]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(DTensor, "__create_chunk_list__")
        computed = [shard_boxes(each) for each in tensors]
        with pytest.raises(UnsupportedStateError, match="redistribute it to Shard or Replicate"):
            shard_boxes(DTensor.from_local(torch.zeros(2), one, [Partial()]))
    return list(zip(known, computed, strict=True))


def is_empty(box: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    return 0 in box[1]


@pytest.mark.slow
def test_shards_are_located_without_dtensors_protocol() -> None:
    for located in run_ranks(locate_shards, 4):
        for known, computed in located:
            assert known == computed or all(map(is_empty, [*known, *computed]))


def test_a_module_is_saved_without_the_versions_of_its_submodules() -> None:
    class Unversioned(nn.BatchNorm1d):
        """What a torch does that hangs no versions on a state dict."""

        def state_dict(self, *args: Any, **options: Any) -> Any:
            return OrderedDict(super().state_dict(*args, **options).items())

    module, other = Unversioned(3), nn.BatchNorm1d(3)
    nn.init.uniform_(module.weight)
    encoded = encode(module.state_dict(), "module")
    state = decode(encoded.document, encoded.tensors.__getitem__)
    assert module_versions(state) is None
    other.load_state_dict(state)
    assert torch.equal(other.weight, module.weight)


def test_a_tensor_made_of_others_is_known_by_torch_compiles_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair(torch.Tensor):
        def __tensor_flatten__(self) -> Any:
            raise NotImplementedError

    assert wraps_tensors(torch.ones(2).as_subclass(Pair))
    assert not wraps_tensors(torch.ones(2))
    monkeypatch.delattr(Pair, "__tensor_flatten__")
    assert not wraps_tensors(torch.ones(2).as_subclass(Pair))
