"""Which chunks see one another, the steps that follow, and the calls that are made of them."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise.distributed.blocks import blocks_of, ring
from tilewise.distributed.calls import part_calls
from tilewise.distributed.known import known_blocks
from tilewise.distributed.order import Order, order_of
from tilewise.parts.masks.mask import Mask
from tilewise.parts.shape import Shape
from tilewise.plan.request import request_of

LENGTH = 24
SHAPE = Shape(2, 2, 1, LENGTH, LENGTH, 8, 8)
IDS = torch.arange(LENGTH)
MASKS = {
    "none": (), "causal": (tilewise.Causal(),), "window": (tilewise.Window(3, 0),),
    "documents": (tilewise.Documents(IDS // 5),), "documents of one in two": (tilewise.Documents(IDS % 2),),
    "prefix": (tilewise.Prefix(torch.tensor([3, 9])),), "padding": (tilewise.Padding(torch.tensor([5, 0])),),
    "two": (tilewise.Causal(), tilewise.Padding(7, side="left")),
    "one key": (tilewise.Intervals(IDS, IDS + 1),),
    "a tensor": (tilewise.Causal(), tilewise.Dense(IDS[:, None] % 3 != IDS % 3)),
}  # fmt: skip


def pairs(masks: tuple[Mask, ...]) -> torch.Tensor:
    """The pairs that count, [batch, q_heads, q_len, kv_len]."""
    index = [
        torch.arange(n).reshape([n if a == axis else 1 for a in range(4)])
        for axis, n in enumerate(SHAPE.scores)
    ]
    kept = torch.ones(SHAPE.scores, dtype=torch.bool)
    for mask in masks:
        kept = kept & mask.twin(SHAPE)(*index)
    return kept


@pytest.mark.parametrize("order", ("zigzag", "contiguous"))
@pytest.mark.parametrize("name", MASKS)
def test_blocks_are_those_of_pairs(name, order):
    """A block that is seen, or full, by one number too many: but for masks that go pair by pair, exactly."""
    masks = MASKS[name]
    for ranks in (1, 2, 3, 4):
        cut = order_of(LENGTH, ranks, order)
        tiles = pairs(masks).reshape(-1, cut.chunks, cut.chunk, cut.chunks, cut.chunk)
        seen, full = tiles.any(4).any(2).any(0), tiles.all(4).all(2).all(0)
        found = blocks_of(masks, SHAPE, cut, cut)
        assert not (seen & ~found.seen).any() and not (found.full & ~full).any()
        if not any(isinstance(mask, tilewise.Dense) for mask in masks):
            assert torch.equal(found.seen, seen) and torch.equal(found.full, full)


@pytest.mark.parametrize("name", MASKS)
def test_what_one_rank_sends_the_other_expects(name):
    cut = order_of(LENGTH, 4)
    blocks = blocks_of(MASKS[name], SHAPE, cut, cut)
    steps = [ring(rank, blocks.seen, cut, cut) for rank in range(4)]
    computed = set()
    for rank, own in enumerate(steps):
        for number, step in enumerate(own):
            there = steps[step.target][number]
            assert there.source == rank and there.received == step.sent
            computed |= {*step.pairs}
    assert computed == {(q, kv) for q, kv in blocks.seen.nonzero().tolist()}


def test_a_window_talks_to_neighbours_alone():
    cut = order_of(LENGTH, 4, "contiguous")
    blocks = blocks_of((tilewise.Window(3, 0),), SHAPE, cut, cut)
    sent = [[len(step.sent) for step in ring(rank, blocks.seen, cut, cut)[1:]] for rank in range(4)]
    assert sent == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]


def calls_of(masks: tuple[Mask, ...], rank: int, cut: Order, free: bool) -> list[int]:
    """How many calls each step of a ring makes."""
    blocks = blocks_of(masks, SHAPE, cut, cut)
    own = [*ring(rank, blocks.seen, cut, cut)]
    at_hand = [cut.held[rank], *[step.received for step in own[1:]]]
    return [len(part_calls(rank, chunks, blocks, cut, cut, free)) for chunks in at_hand]


def test_a_causal_zigzag_makes_one_call_a_step():
    cut = order_of(LENGTH, 4)
    own = [calls_of((tilewise.Causal(),), rank, cut, True) for rank in range(4)]
    assert own == [[3, 1, 1, 1]] * 3 + [[2, 1, 1, 1]]  # the chunks of the last rank are neighbours


def test_where_positions_count_calls_do_not_cross_a_gap():
    cut = order_of(LENGTH, 4)
    assert calls_of((tilewise.Causal(),), 0, cut, False) == [3, 1, 2, 2]  # chunks 3 and 4 have none


def test_ranks_together_hold_what_fewer_would():
    for order in ("zigzag", "contiguous"):
        assert order_of(LENGTH, 4, order).together([(0, 1), (2, 3)]) == order_of(LENGTH, 2, order)
        apart = order_of(LENGTH, 4, order).together([(0, 2), (1, 3)])
        assert sorted(c for held in apart.held for c in held) == list(range(apart.chunks))
        assert apart.chunk * apart.chunks == LENGTH


def test_a_length_that_does_not_divide_says_which_one_would():
    with pytest.raises(
        ValueError, match=r"q_len=25 must be a multiple of 8, two chunks a rank .* to 32 and "
    ):
        order_of(25, 4, name="q_len")
    with pytest.raises(ValueError, match=r"order='striped' must be one of"):
        order_of(24, 4, "striped")


def test_blocks_are_known_until_a_mask_changes():
    cut = order_of(LENGTH, 2)
    q = torch.zeros(SHAPE.batch, 2, LENGTH, 8)
    ids = torch.zeros(LENGTH, dtype=torch.int64)
    masks = tilewise.Documents(ids), tilewise.Padding(kv_lens := torch.tensor([LENGTH, LENGTH]))
    request = request_of(q, q[:, :1], q[:, :1], mask=masks[0] & masks[1])
    first = known_blocks(request, request.shape, cut, cut)
    assert known_blocks(request, request.shape, cut, cut) is first
    kv_lens.fill_(1)
    after = known_blocks(request, request.shape, cut, cut)
    assert first.seen.all() and after.seen[:, 0].all() and not after.seen[:, 1:].any()
