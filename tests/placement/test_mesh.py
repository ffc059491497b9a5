"""Meshes as text and as numbers: what may be said, and what becomes of it where ranks are placed so and so."""

from __future__ import annotations

import pytest

from allstep.errors import MeshError
from allstep.placement import DataRanks, MeshShape, Placement, Rendezvous, check_nodes, parse_mesh, resolve_mesh


def placed(world_size: int, nodes: int = 1, here: int | None = None) -> Placement:
    here = world_size // nodes if here is None else here
    where = Rendezvous("head", (1,)) if world_size > 1 else None
    return Placement("allstep", 0, world_size, 0, here, 0, nodes, where)


@pytest.mark.parametrize(
    ("mesh", "placement", "shape"),
    [
        ({"replicate": 2, "shard": 4}, placed(8), MeshShape(("replicate", "shard"), (2, 4))),
        ({"tensor": 2, "data": 4}, placed(8), MeshShape(("data", "tensor"), (4, 2))),
        ({"shard": -1}, placed(6), MeshShape(("shard",), (6,))),
        ({"shard": -1}, placed(8, nodes=2), MeshShape(("replicate", "shard"), (2, 4))),
        ({"shard": -1, "tensor": 2}, placed(16, nodes=2), MeshShape(("replicate", "shard", "tensor"), (2, 4, 2))),
        ({"replicate": 1, "shard": -1}, placed(8, nodes=2), MeshShape(("replicate", "shard"), (1, 8))),
        ({"replicate": -1, "shard": 2}, placed(8, nodes=2), MeshShape(("replicate", "shard"), (4, 2))),
        ({"shard": -1}, placed(1), MeshShape(("shard",), (1,))),
    ],
)
def test_a_mesh_is_outermost_first_and_shards_inside_a_node(mesh, placement, shape) -> None:
    assert resolve_mesh(mesh, placement) == shape


@pytest.mark.parametrize(
    ("mesh", "placement", "said"),
    [
        ({"replicate": 2, "shard": 4}, placed(6), "replicate=2,shard=4, which is 8 ranks, but the world has 6 ranks"),
        ({"tensor": 2}, placed(1), "tensor=2, which is 2 ranks, but the world has 1 rank"),
        ({"shard": -1, "tensor": 3}, placed(8), "the world has 8 ranks cannot be divided by 3"),
        ({"shard": -1, "tensor": 3}, placed(8, nodes=2), "the 4 ranks of a node cannot be divided by 3"),
        ({"shard": -1}, placed(5, nodes=2, here=3), "3 of 5 are here"),
        ({"context": 2}, placed(2), "keeps the name for it"),
        ({"pipeline": 2}, placed(2), "keeps the name for it"),
        ({"experts": 2}, placed(2), "its dimensions are replicate, data, shard, tensor"),
        ({"shard": 0}, placed(2), "shard=0; a size is 1 or more"),
        ({"shard": True}, placed(2), "shard=True"),
        ({"data": 2, "replicate": 1}, placed(2), "two names of one dimension"),
        ({"data": -1, "shard": -1}, placed(2), "-1 for data and shard"),
        ({}, placed(2), "give sizes by name"),
        ("shard=2", placed(2), "give sizes by name"),
    ],
)
def test_a_mesh_that_cannot_be_meant_is_refused_with_its_numbers(mesh, placement, said) -> None:
    with pytest.raises(MeshError) as raised:
        resolve_mesh(mesh, placement)
    assert said in str(raised.value)


def test_a_copy_for_each_node_takes_ranks_that_are_numbered_by_node() -> None:
    shape = resolve_mesh({"shard": -1}, placed(4, nodes=2))
    check_nodes(shape, [0, 0, 1, 1])
    check_nodes(shape, [1, 1, 0, 0])
    with pytest.raises(MeshError, match=r"rank 0 is on node 0 and rank 1 on node 1\. Number ranks node by node"):
        check_nodes(shape, [0, 1, 0, 1])
    check_nodes(resolve_mesh({"replicate": 2, "shard": 2}, placed(4, nodes=2)), [0, 1, 0, 1])  # as it was asked for


def test_a_mesh_is_read_from_text() -> None:
    assert parse_mesh("replicate=2, shard=-1") == {"replicate": 2, "shard": -1}
    for text in ("", "shard", "shard=x", "shard=2,shard=2", "shard=2,"):
        with pytest.raises(MeshError):
            parse_mesh(text)


def test_neighbours_of_a_tensor_dimension_share_a_data_rank() -> None:
    ranks = [DataRanks.of(rank, 4, sharing=2) for rank in range(4)]
    assert [(each.rank, each.is_twin) for each in ranks] == [(0, False), (0, True), (1, False), (1, True)]
    assert {each.size for each in ranks} == {2}
