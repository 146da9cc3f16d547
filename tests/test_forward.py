"""The forward kernel against float64: every feature alone, in pairs and in sequence, on small odd sizes.

In the interpreter the tiles are forced small, so that a few dozen rows make several tiles; on a GPU the same
problems run too, and larger ones (`Problem.longer`).
"""

import random

import pytest
import torch
import triton
import triton.language as tl

import tilewise
from harness.features import FEATURES, Problem, block_interval, build, judge, of_kind
from harness.oracle import check, kept_pairs
from harness.problem import DTYPES, lengths, longer, run
from tilewise import (
    ALiBi,
    Causal,
    Documents,
    Padding,
    Prefix,
    RelativePosition,
    Softcap,
    UserMask,
    UserScore,
    Window,
)
from tilewise.kernels.tile import Tile
from tilewise.plan.request import make_request

MASKS = [entry.name for entry in of_kind("mask")]
SCORES = [entry.name for entry in of_kind("score")]
# q_len, kv_len: none a multiple of a tile; equal, decoding with a cache, and more queries than keys.
LENGTHS = ((37, 37), (19, 45), (45, 19))


# ---- Masks and scores


@pytest.mark.parametrize("pair", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_mask(device, mask, pair):
    dtype = DTYPES[(MASKS.index(mask) + LENGTHS.index(pair)) % 3]
    run(device, mask, dtype, seed=pair, **lengths(device, pair))


@pytest.mark.in_turns
@pytest.mark.parametrize("mask, other", [(a, b) for a in MASKS for b in MASKS if a < b])
def test_pair_of_masks(device, mask, other):
    run(device, mask, other, **lengths(device, (20, 37)))


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_interval_masks_at_once(device, dtype):
    p = build(device, random.Random(1), [dtype, "grouped_heads"], **lengths(device, (33, 45)))
    p.mask = Causal("bottom_right") & Window(25, 3, "bottom_right") & Padding(p.kv_len - 4)
    p.mask = p.mask & Prefix(p.kv_len // 3, "bottom_right")
    judge(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_score(device, score, dtype):
    run(device, score, dtype, seed=dtype, **lengths(device, LENGTHS[DTYPES.index(dtype)]))


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("pair", LENGTHS[1:], ids=str)
def test_scores_by_position_at_both_corners(device, align, pair):
    p = build(device, random.Random(9), ["float32"], **lengths(device, pair))
    p.scores = [ALiBi(p.randn(p.q_heads), align), RelativePosition(p.randn(p.q_heads, 12), 7, True, align)]
    judge(p)


@pytest.mark.in_turns
@pytest.mark.parametrize("first, second", [(a, b) for a in SCORES for b in SCORES if a != b])
def test_scores_apply_in_order(device, first, second):
    run(device, first, second, "bfloat16", q_len=17, kv_len=21)


@pytest.mark.in_turns
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_mask_with_score(device, mask, score):
    dtype = DTYPES[(MASKS.index(mask) + SCORES.index(score)) % 3]
    run(device, mask, score, dtype, "grouped_heads" if dtype == "float16" else "multi_head")


@pytest.mark.oldest
def test_bias_comes_after_modifiers_and_before_the_mask(device):
    run(device, "softcap", "bias", "sink", "causal", "float16")
    # The oracle above takes the order from the same place as the kernel; here it is spelled out.
    q, k, v, bias = (torch.randn(1, 2, 20, 16, device=device) for _ in range(4))
    bias = 4 * bias @ bias.mT
    out = tilewise.attention(q, k, v, score=Softcap(0.5), bias=bias, mask=Causal(), impl="portable")
    s = 0.5 * torch.tanh((q @ k.mT).double() / 4 / 0.5) + bias
    s = s.masked_fill(torch.ones(20, 20, device=device).triu(1).bool(), -torch.inf)
    want, torchs = s.softmax(3) @ v.double(), s.float().softmax(3) @ v
    rounding = torch.finfo(torch.float32).eps / 2 * want.abs().max()
    assert (out - want).abs().max() <= 10 * (torchs - want).abs().max().clamp_min(rounding)


@triton.jit
def keep_upper(q_idx, kv_idx, batch, head, args):
    return kv_idx >= q_idx


@triton.jit
def halve(s, batch, head, q_idx, kv_idx, args):
    return 0.5 * s


def test_bare_functions_stand_for_user_masks_and_scores(device):
    p = build(device, random.Random(3), [])
    q, k, v = p.tensors()
    mask = UserMask(keep_upper, twin=lambda batch, head, q_idx, kv_idx: kv_idx >= q_idx)
    score = UserScore(halve, twin=lambda s, batch, head, q_idx, kv_idx: 0.5 * s)
    out, _ = check(q, k, v, mask=mask, score=score)
    assert torch.equal(out, tilewise.attention(q, k, v, mask=keep_upper, score=halve))
    out, _ = check(q, k, v, mask=Causal() & mask, score=[score, Softcap(2.0)])
    bare = tilewise.attention(q, k, v, mask=Causal() & keep_upper, score=[halve, Softcap(2.0)])
    assert torch.equal(out, bare)


# ---- Similarity, scale, sink


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", [entry.name for entry in of_kind("similarity")])
def test_similarity(device, similarity, dtype):
    run(device, similarity, dtype, "grouped_heads", seed=dtype)


@pytest.mark.in_turns
@pytest.mark.parametrize("similarity", ["scaled_dot", "dot", "cosine"])
@pytest.mark.parametrize("scale", [0.7, 1, 1.0, -0.7, 0.0, "tensor", "half tensor"])
def test_scale(device, similarity, scale):
    if isinstance(scale, str):
        scale = torch.tensor(-0.7, device=device, dtype=torch.float16 if "half" in scale else torch.float32)
    p = build(device, random.Random(4), ["float16"], q_len=17, kv_len=20)
    p.arguments |= {"similarity": similarity, "scale": scale}
    judge(p)
    p.scores = [Softcap(1.5)]
    judge(p)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES)
def test_sink(device, dtype):
    run(device, "sink", "window", dtype, "grouped_heads")
    p = build(device, random.Random(5), [dtype], q_len=17, kv_len=20)
    for logit in (40.0, -40.0, 0.0, -torch.inf):  # takes all weight, takes none
        p.arguments["sink"] = torch.tensor([1.0, logit], device=device)
        judge(p)


# ---- Rows without a key, documents, additive masks


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_key(device, dtype):
    p = build(device, random.Random(7), [dtype], q_len=40, kv_len=17)
    p.mask = Causal()  # bottom right: the first 23 rows stand before every key
    q, k, v = p.tensors()
    with tilewise.tiles.use(p.tile):
        out, lse = check(q, k, v, mask=p.mask)
        assert (out[:, :, :23] == 0).all() and (lse[:, :, :23] == -torch.inf).all()
        sink = torch.tensor([0.5, -3.0], device=device)
        out, lse = check(q, k, v, mask=p.mask, sink=sink)
        assert (out[:, :, :23] == 0).all()
        torch.testing.assert_close(lse[:, :, :23], sink[None, :, None].expand(2, 2, 23))
        out, lse = check(q, k, v, mask=torch.zeros(17, dtype=torch.bool, device=device))
        assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("ids", ["packed", "interrupted", "unsorted", "cross"])
def test_documents(device, ids):
    times = longer(device)
    rows = {
        "packed": [0] * 7 + [1] * 20 + [5] * 1 + [2] * 17,
        "interrupted": [4] * 10 + [-1] * 20 + [4] * 15,
        "unsorted": [3, 1, 2] * 15,
        "cross": [0] * 20 + [9] * 10 + [2] * 15,  # document 9 has no key
    }[ids]
    q_ids = torch.tensor(rows, device=device).repeat_interleave(times)
    kv_ids = torch.tensor([2] * 12 + [0] * 9 + [7] * 3, device=device).repeat_interleave(times)
    kv_ids = kv_ids if ids == "cross" else q_ids
    p = build(device, random.Random(8), ["float16"], q_len=len(q_ids), kv_len=len(kv_ids))
    p.mask = Documents(q_ids, kv_ids)
    judge(p)
    p.mask = p.mask & Causal("top_left")
    judge(p)


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low", ["-inf", "finfo.min"])
def test_additive_mask(device, dtype, bias_dtype, low):
    """A bias of -inf, or of the dtype's lowest number, takes keys out."""
    p = build(device, random.Random(9), [dtype], q_len=18, kv_len=37)
    number = -torch.inf if low == "-inf" else torch.finfo(bias_dtype).min
    bias = torch.zeros(2, 1, 18, 37, dtype=bias_dtype, device=device)
    bias.masked_fill_(torch.rand(bias.shape, device=device) < 0.5, number)
    bias[:, :, 3, :20] = number  # a whole tile
    p.arguments["bias"] = bias
    judge(p)


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_row_of_lowest_biases(device, dtype, bias_dtype):
    """finfo.min on every key of a row is no mask: as in PyTorch, what is left of the scores decides, and that
    is nothing once they are lost in a number of this size."""
    p = build(device, random.Random(10), [dtype], q_len=18, kv_len=37)
    bias = torch.full((18, 1), torch.finfo(bias_dtype).min, dtype=bias_dtype, device=device)
    bias[:3] = 0
    p.arguments["bias"] = bias
    judge(p)


# ---- Tiles that a mask rules out


@triton.jit
def count_tile(q_idx, kv_idx, counter):
    counts_ptr, tile_q, tile_kv, kv_tiles = counter
    tile = tl.min(tl.min(q_idx, 1), 0) // tile_q * kv_tiles + tl.min(tl.min(kv_idx, 1), 0) // tile_kv
    tl.atomic_add(counts_ptr + tile, 1)


@triton.jit
def counting_score(s, batch, head, q_idx, kv_idx, args):
    count_tile(q_idx, kv_idx, args)
    return s


@triton.jit
def counting_keep(q_idx, kv_idx, batch, head, args):
    count_tile(q_idx, kv_idx, args[1])
    return q_idx // args[0] == kv_idx // args[0]


def tiles_of(keep: torch.Tensor, tile: Tile) -> list[list[torch.Tensor]]:
    """keep [q_len, kv_len] cut into tiles."""
    return [list(rows.split(tile.tile_kv, dim=1)) for rows in keep.split(tile.tile_q)]


def walk(device, tile, mask_of):
    """Run a mask on one head; return which pairs count and how often `mask_of`'s counter saw each tile."""
    p = build(device, random.Random(11), [], batch=1, q_heads=1, kv_heads=1, q_len=77, kv_len=90, tile=tile)
    counts = torch.zeros(-(-77 // tile.tile_q), -(-90 // tile.tile_kv), dtype=torch.int32, device=device)
    mask_of(p, (counts, tile.tile_q, tile.tile_kv, counts.shape[1]))
    judge(p)
    keep = kept_pairs(make_request(*p.tensors(), **p.keywords()))
    return keep[0, 0], counts.tolist()


SKIPPING = [[name] for name in MASKS if name not in ("bool_mask", "user_mask")]
SKIPPING += [["causal", "window"], ["prefix", "left_padding", "window"], ["intervals", "causal"]]


@pytest.mark.in_turns
@pytest.mark.parametrize("tile", [Tile(16, 16), Tile(32, 16), Tile(16, 32)], ids=str)
@pytest.mark.parametrize("masks", SKIPPING, ids=",".join)
def test_tiles_outside_a_mask_are_not_visited(device, masks, tile):
    """Each tile between the first and the last that hold a pair is visited once, and no other."""

    def add(p: Problem, counter: tuple) -> None:
        for name in masks:
            FEATURES[name].apply(p)
        p.scores = [UserScore(counting_score, counter, twin=lambda s, *_: s)]

    keep, counts = walk(device, tile, add)
    for row, row_counts in zip(tiles_of(keep, tile), counts, strict=True):
        held = [i for i, pairs in enumerate(row) if pairs.any()]
        assert row_counts == [int(bool(held) and held[0] <= i <= held[-1]) for i in range(len(row))]


@pytest.mark.parametrize("tile", [Tile(16, 16), Tile(32, 16), Tile(16, 32)], ids=str)
def test_tiles_in_which_every_pair_counts_are_not_masked(device, tile):
    """A user's function is asked about the tiles that a mask cuts, and about no other."""

    def add(p: Problem, counter: tuple) -> None:
        def twin(batch, head, q_idx, kv_idx, size, counter):
            return q_idx // size == kv_idx // size

        p.mask = UserMask(counting_keep, (40, counter), interval=block_interval, twin=twin)
        p.add_mask(Causal())

    keep, counts = walk(device, tile, add)
    for row, row_counts in zip(tiles_of(keep, tile), counts, strict=True):
        whole = [bool(pairs.all()) and pairs.shape[1] == tile.tile_kv for pairs in row]
        visited = [bool(pairs.any()) for pairs in row]
        assert row_counts == [int(seen and not full) for seen, full in zip(visited, whole, strict=True)]
