"""Which tiles the kernels of the backward walk: those that a mask leaves, once, by the tile of each pass."""

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from harness.features import FEATURES, Problem, block_interval, build
from harness.gradients import check_gradients
from harness.oracle import kept_pairs
from harness.problem import SMALL
from harness.sanitizer import sanitize
from tilewise import Bias, Causal, UserMask, UserScore
from tilewise.kernels.tile import Tile
from tilewise.plan.request import make_request


@triton.jit
def count_tile(q_idx, kv_idx, counts_ptr, tile_q, tile_kv, kv_tiles):
    tile = tl.min(tl.min(q_idx, 1), 0) // tile_q * kv_tiles + tl.min(tl.min(kv_idx, 1), 0) // tile_kv
    tl.atomic_add(counts_ptr + tile, 1)


@triton.jit
def same_score(s, batch, head, q_idx, kv_idx, args):
    return s


@triton.jit
def counting_derivative(s, batch, head, q_idx, kv_idx, args):
    count_tile(q_idx, kv_idx, args[0], args[1], args[2], args[3])
    return 1.0


@triton.jit
def counting_keep(q_idx, kv_idx, batch, head, args):
    count_tile(q_idx, kv_idx, args[1], args[2], args[3], args[4])
    return q_idx // args[0] == kv_idx // args[0]


def block_twin(batch, head, q_idx, kv_idx, size, *counter):
    return q_idx // size == kv_idx // size


def tiles_of(keep: torch.Tensor, tile: Tile) -> list[list[torch.Tensor]]:
    """keep [q_len, kv_len] cut into tiles."""
    return [list(rows.split(tile.tile_kv, dim=1)) for rows in keep.split(tile.tile_q)]


def walked(device, tile, kernel, change):
    """Run one kernel of the backward on one head; returns which pairs count and how often a counter that
    `change` built into the problem saw each tile."""
    p = build(device, random.Random(11), [], batch=1, q_heads=1, kv_heads=1, q_len=77, kv_len=90, tile=tile)
    counts = torch.zeros(-(-77 // tile.tile_q), -(-90 // tile.tile_kv), dtype=torch.int32, device=device)
    change(p, (counts, tile.tile_q, tile.tile_kv, counts.shape[1]))
    q, k, v = p.tensors()
    bias = torch.zeros(77, 90, device=device)
    p.scores.insert(0, Bias(bias))
    {"dq": q, "dkv": k, "parameter": bias}[kernel].requires_grad_()
    with tilewise.tiles.use(tile):
        out = tilewise.attention(q, k, v, **p.keywords(), impl="portable")
        of_forward = counts.clone()
        out.sum().backward()
    counts -= of_forward
    return kept_pairs(make_request(q, k, v, **p.keywords()))[0, 0], counts.tolist()


def visited_tiles(keep: torch.Tensor, tile: Tile) -> list[list[bool]]:
    """For each tile of rows, the tiles of keys from the first to the last that hold a pair."""
    visited = []
    for row in tiles_of(keep, tile):
        held = [i for i, pairs in enumerate(row) if pairs.any()]
        visited.append([bool(held) and held[0] <= i <= held[-1] for i in range(len(row))])
    return visited


def walk_of(kernel: str, visited: list[list[bool]]) -> list[list[bool]]:
    """The tiles that a kernel walks: dkv those of rows from the first to the last that visit its keys."""
    if kernel != "dkv":
        return visited
    columns = []
    for column in zip(*visited, strict=True):
        held = [i for i, visits in enumerate(column) if visits]
        columns.append([bool(held) and held[0] <= i <= held[-1] for i in range(len(column))])
    return [list(row) for row in zip(*columns, strict=True)]


SKIPPING = [
    ["causal"],
    ["window"],
    ["prefix"],
    ["documents"],
    ["left_padding"],
    ["intervals"],
    ["user_interval"],
]
SKIPPING += [["scattered_documents"], ["causal", "window"], ["prefix", "left_padding", "window"]]
WALKS = [(kernel, tile) for kernel in ("dkv", "dq") for tile in (Tile(32, 16), Tile(16, 32))]
WALKS += [("parameter", Tile(32, 32))]


@pytest.mark.parametrize("kernel, tile", WALKS, ids=str)
def test_tiles_outside_a_mask_are_not_visited(device, kernel, tile):
    for masks in SKIPPING:

        def change(p: Problem, counter: tuple[Any, ...], masks: list[str] = masks) -> None:
            for name in masks:
                FEATURES[name].apply(p)
            p.scores = [UserScore(same_score, counter, twin=lambda s, *_: s, derivative=counting_derivative)]

        keep, counts = walked(device, tile, kernel, change)
        wanted = walk_of(kernel, visited_tiles(keep, tile))
        assert counts == [[int(visits) for visits in row] for row in wanted], masks


@pytest.mark.parametrize("kernel, tile", WALKS[:-1], ids=str)
def test_tiles_in_which_every_pair_counts_are_not_masked(device, kernel, tile):
    """A user's function is asked about the tiles that a mask cuts, and about no other."""

    def change(p: Problem, counter: tuple[Any, ...]) -> None:
        p.mask = UserMask(counting_keep, (64, *counter), interval=block_interval, twin=block_twin)
        p.add_mask(Causal())

    keep, counts = walked(device, tile, kernel, change)
    whole = [
        [bool(x.all()) and x.shape == (tile.tile_q, tile.tile_kv) for x in row]
        for row in tiles_of(keep, tile)
    ]
    if kernel == "dq":  # rows beyond q_len are not written, so they need no mask
        whole = [[bool(x.all()) and x.shape[1] == tile.tile_kv for x in row] for row in tiles_of(keep, tile)]
    wanted = walk_of(kernel, visited_tiles(keep, tile))
    assert any(map(any, whole))
    assert counts == [
        [int(visits and not full) for visits, full in zip(*rows, strict=True)]
        for rows in zip(wanted, whole, strict=True)
    ]


def test_each_pass_has_its_own_tile(device, monkeypatch):
    """The table gives the passes different tiles, and the ranges that dK and dV walk are those of its own."""
    tiles = {"forward": Tile(32, 16), "dkv": Tile(16, 32), "dq": Tile(64, 16)}
    monkeypatch.setattr("tilewise.plan.passes.choose_tile", lambda q, shape, work: tiles[work])
    p = build(device, random.Random(19), [], **(SMALL | {"q_len": 70, "kv_len": 90}))
    p.mask, p.arguments["bias"] = Causal(), p.randn(2, 1, 90)
    with sanitize():
        check_gradients(*p.tensors(), p.gradient_of_out(), **p.keywords())
