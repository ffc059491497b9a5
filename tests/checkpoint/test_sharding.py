"""Ranks assign pieces of tensors without communication: each element is written once, by ranks about equally."""

from __future__ import annotations

import math
from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st

from allstep.checkpoint.sharding import Box, assign, covers, own_pieces, whole_box

shapes = st.lists(st.integers(0, 2000), max_size=2).map(tuple)
tensors = st.dictionaries(st.text("abc", min_size=1, max_size=3), shapes, max_size=8)


@given(tensors, st.integers(1, 5))
def test_the_pieces_of_all_ranks_cover_each_tensor_exactly(shapes: dict[str, tuple[int, ...]], world_size: int) -> None:
    shares = assign([(name, 8, shape) for name, shape in shapes.items()], world_size)
    assert len(shares) == world_size
    pieces = list(chain(*shares))
    for name, shape in shapes.items():
        assert covers(shape, [piece.box for piece in pieces if piece.name == name])


def test_the_order_in_which_a_rank_knows_tensors_makes_no_difference() -> None:
    tensors = [(f"t{at}", 4, (at * 997 % 13, 100)) for at in range(20)]
    assert assign(tensors, 3) == assign(tensors[::-1], 3)


def test_one_large_tensor_is_cut_so_that_ranks_write_equally_much() -> None:
    shares = assign([("embedding", 4, (1_000_000, 16)), ("bias", 4, (16,))], 4)
    sizes = [sum(piece.box.numel for piece in share) for share in shares]
    assert max(sizes) - min(sizes) <= 16


def test_small_tensors_are_given_to_the_rank_that_has_least() -> None:
    shares = assign([(f"t{at}", 4, (1000,)) for at in range(10)], 2)
    assert [len(share) for share in shares] == [5, 5]


def test_a_piece_has_the_values_of_its_place() -> None:
    tensor = torch.arange(4_000_000.0).reshape(1000, 4000)
    parts = [part for rank in range(3) for part in own_pieces({"t": tensor}, rank, 3)]
    parts.sort(key=lambda part: part[0].box.offsets)
    assert len(parts) == 3
    assert torch.equal(torch.cat([values for _, values in parts]), tensor)


@given(shapes, st.data())
def test_a_gap_an_overlap_and_a_piece_beyond_the_edge_are_no_cover(shape: tuple[int, ...], data: st.DataObject) -> None:
    if not math.prod(shape) or not shape:
        return
    whole = whole_box(shape)
    assert covers(shape, [whole])
    assert not covers(shape, [])
    assert not covers(shape, [whole, Box(whole.offsets, (1,) * len(shape))])
    dim = data.draw(st.integers(0, len(shape) - 1))
    moved = Box(tuple(int(at == dim) for at in range(len(shape))), shape)
    assert not covers(shape, [moved])


def test_two_pieces_that_overlap_as_much_as_they_leave_out_are_no_cover() -> None:
    assert not covers((4,), [Box((0,), (2,)), Box((1,), (2,))])
    assert not covers((2, 2), [Box((0, 0), (2, 1)), Box((1, 0), (1, 2))])
    assert covers((2, 2), [Box((0, 0), (2, 1)), Box((0, 1), (2, 1))])


def test_boxes_overlap_where_all_dimensions_do() -> None:
    assert Box((0, 0), (4, 4)).overlap(Box((2, 3), (5, 5))) == Box((2, 3), (2, 1))
    assert Box((0, 0), (4, 4)).overlap(Box((4, 0), (1, 4))) is None
    assert Box((), ()).overlap(Box((), ())) == Box((), ())
