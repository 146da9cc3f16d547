"""`Blocks`, and walks over lists of tiles: what the lists say, which steps are taken, and what comes out."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

import tilewise
from harness.counted import Counted
from harness.gradients import check_gradients
from harness.oracle import check
from harness.problem import run
from harness.replays import launches_of, no_long_way, repeating, replays, results, same
from tilewise.kernels.call import programs
from tilewise.kernels.coverage import list_keys, list_rows
from tilewise.kernels.forward import rows_programs
from tilewise.kernels.tile import Tile
from tilewise.plan import tiles
from tilewise.plan.bind import bind
from tilewise.plan.look import look
from tilewise.plan.request import Request, request_of

Tensor = torch.Tensor
Lines = Counter[tuple[tuple[int, ...], tuple[int, ...]]]  # full tiles and cut ones, and how often


def drawn(device: torch.device, *shape: int, share: float = 0.5, seed: int = 0) -> Tensor:
    """A pattern of which this share counts."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < share).to(device)


def patchy(device: torch.device, batch: int, heads: int, rows: int, keys: int) -> Tensor:
    """A pattern of small blocks that has large areas in which all of them count, and none."""
    areas = drawn(device, batch, heads, -(-rows // 4), -(-keys // 6))
    areas = areas.repeat_interleave(4, -2).repeat_interleave(6, -1)[..., :rows, :keys]
    return areas ^ drawn(device, batch, heads, rows, keys, share=0.02, seed=1)


def qkv(device: torch.device, batch=1, q_heads=2, kv_heads=1, q_len=45, kv_len=61, trained=False):
    lengths = ((q_heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(batch, *each, 16, device=device, requires_grad=trained) for each in lengths]


# ---- What lists say, against brute force


def kept(mask: tilewise.Mask, heads: int, sequences: list[tuple[int, int]]) -> list[Tensor]:
    """The pairs of each sequence that count, [q_heads, q_len, kv_len] bool."""
    head = torch.arange(heads)[:, None, None]
    found = []
    for batch, (n, m) in enumerate(sequences):
        pairs = torch.arange(n)[:, None], torch.arange(m)
        found.append(mask.twin(None)(torch.tensor(batch), head, *pairs).expand(heads, n, m))
    return found


def tiles_of(keep: Tensor, tile: Tile, partial_rows_are_cut: bool) -> Tensor:
    """2 for each tile of pairs in which every one counts, 1 where some do, 0 where none; [.., tiles, tiles].
    One with keys missing is cut, and perhaps one with rows missing."""
    *_, n, m = keep.shape
    missing = (0, -m % tile.tile_kv, 0, -n % tile.tile_q)
    some = torch.nn.functional.pad(keep, missing)
    every = some if partial_rows_are_cut else torch.cat([some[..., :n, :], some[..., n:, :] | True], -2)
    every[..., m:] = False

    def tiled(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, tile.tile_kv)).unflatten(-3, (-1, tile.tile_q)).transpose(-2, -3)

    return tiled(some).any(-1).any(-1).int() + tiled(every).all(-1).all(-1).int()


def expected(states: list[Tensor]) -> Lines:
    """Lists of the last dimension."""
    lines = [line for each in states for line in each.flatten(0, -2)] if states else []
    return Counter(
        (tuple((line == 2).nonzero()[:, 0].tolist()), tuple((line == 1).nonzero()[:, 0].tolist()))
        for line in lines
    )


def said(lists: tuple[Tensor, int]) -> Lines:
    found: Lines = Counter()
    tensor, room = lists
    for full, cut, *numbers in tensor.tolist():
        found[tuple(numbers[:full]), tuple(numbers[::-1][:cut])] += 1
        assert len(numbers) == room and full + cut <= room
    return found


def assert_says(lists: tuple[Tensor, int], states: list[Tensor]) -> None:
    """Numbers that no tile has are those of empty lists."""
    got, want = said(lists), expected(states)
    del got[(), ()], want[(), ()]
    assert got == want and len(want) > 3


@pytest.mark.parametrize("block", [(16, 32), (5, 7), (20, 16)], ids=str)
def test_lists_are_those_of_brute_force(block, device):
    """Of dense calls and of packed ones: blocks that match the tiles, and that do not."""
    tile, heads = Tile(16, 32), 4
    sizes = 2, heads, -(-45 // block[0]), -(-96 // block[1])
    pattern = patchy(device, *sizes) if block == (5, 7) else drawn(device, *sizes)
    mask = tilewise.Blocks(pattern, block)
    for lengths in (None, [(45, 96), (0, 9)]):
        if lengths is None:
            request = request_of(*qkv(device, 2, heads, 2, 45, 96), mask=mask)
        else:  # two rows, and three keys, are of no sequence
            offsets = torch.tensor([2, 47, 47]), torch.tensor([0, 96, 105])
            q, k, v = (torch.randn(n, h, 16, device=device) for n, h in ((47, heads), (108, 2), (108, 2)))
            q_offsets, kv_offsets = (each.to(device) for each in offsets)
            request = request_of(q, k, v, mask=mask, q_offsets=q_offsets, kv_offsets=kv_offsets)
        keeps = kept(mask, heads, lengths or [(45, 96)] * 2)
        call = bind(request)
        count = programs(call.shape, call.shape.q_len, tile.tile_q, heads)
        assert_says(list_keys(call, tile, count), [tiles_of(keep, tile, False) for keep in keeps])
        by_rows = [tiles_of(keep, tile, True).transpose(-1, -2) for keep in keeps if keep.shape[1]]
        assert_says(list_rows(call, tile), by_rows)


def test_a_tile_of_a_group_has_one_list(device):
    """Of a cache, whose tiles hold the rows of all heads of a group; with lengths that the device knows."""
    tile, lens = Tile(16, 16), [61, 24]
    mask = tilewise.Blocks(patchy(device, 2, 4, 6, 21), (2, 3))
    q, k, v = qkv(device, 2, 4, 2, 11, 61)
    call = bind(request_of(q, k, v, mask=mask, kv_lens=torch.tensor(lens, device=device)))
    lists = list_keys(call, tile, rows_programs(call.shape, True, tile.tile_q), is_grouped=True)
    rows = [
        each.unflatten(0, (2, 2)).transpose(1, 2).flatten(1, 2)
        for each in kept(mask, 4, [(11, n) for n in lens])
    ]
    assert_says(lists, [tiles_of(each, tile, False) for each in rows])


# ---- Which steps are taken


def test_empty_tiles_are_not_visited(device):
    """Between two that are, too; in the forward and in both walks of the backward."""
    tile, pattern = Tile(16, 16), drawn(device, 1, 2, 3, 6, seed=1)
    mask = tilewise.Blocks(pattern, 16) & tilewise.Causal()
    q, k, _ = qkv(device, q_len=45, kv_len=96)
    found = Counted(tile, mask, q, k)
    with tiles.use(tile):
        counts = found.found()
    below = torch.arange(6) * 16 <= torch.arange(3)[:, None] * 16 + 15 + 96 - 45
    full = torch.arange(6) * 16 + 15 <= torch.arange(3)[:, None] * 16 + 96 - 45
    visited = (pattern.cpu() & below).sum().item()
    holes = pattern[..., 1:-1].logical_not() & pattern[..., :-2] & pattern[..., 2:]
    assert holes.any() and visited < 2 * below.sum()
    cut = visited - (pattern.cpu() & full).sum().item()
    last_row = (pattern.cpu() & full)[:, :, 2].sum().item()  # it has 13 rows: by keys, its tiles are cut
    assert counts["forward"] == counts["dq"] == (visited, cut)
    assert counts["dkv"] == (visited, cut + last_row)


def test_a_list_is_shared_by_splits(device):
    """Programs that split the keys of a cache have equal shares of the tiles that are not empty."""
    pattern = torch.zeros(1, 1, 1, 24, dtype=torch.bool, device=device)
    pattern[..., [1, 2, 3, 5, 17, 20, 22]] = True
    q, k, v = qkv(device, kv_heads=2, q_len=1, kv_len=384)
    lens = torch.tensor([380], device=device)
    given = dict(mask=tilewise.Blocks(pattern, 16), kv_lens=lens)
    with tiles.use(Tile(16, 16)):
        check(q, k, v, **given)
        check(q, k, v, **given, split_size=128)
        counted = Counted(Tile(16, 16), given["mask"], q, k, kv_lens=lens)
        _, steps = counted.steps(lambda: tiles_run(counted.request))
    assert steps == (2 * 7, 0)  # every tile is full, but none beyond a block is


def tiles_run(request: Request):
    from tilewise.plan.passes import run_forward, split_keys

    split = split_keys(request.shape, Tile(16, 16), 3)
    assert split is not None and split.programs == 3
    return run_forward(request, True)


# ---- What comes out


@pytest.mark.parametrize(
    "features",
    [
        ("grouped_heads", "oblong_tile", "causal", "scattered_documents", "bias"),
        ("packed_apart", "intervals", "sink", "dropout"),
        ("copied_tile", "bool_mask"),
        ("paged_rows", "causal"),
    ],
    ids="-".join,
)
def test_with_other_features(features, device):
    run(device, "blocks", *features, seed=1, backward=True)


def test_calls_with_holes_take_two_walks(device, monkeypatch):
    """In any order too, unless one is asked for. It goes by ranges, and gives the same gradients."""
    pattern = drawn(device, 1, 1, 3, 3, share=0.6)
    given = dict(mask=tilewise.Blocks(pattern, 16), deterministic=False)
    q, k, v = qkv(device, q_len=45, kv_len=45, trained=True)
    with tiles.use(Tile(16, 16)), tiles.use_walks(1):
        check_gradients(q, k, v, **given)
    monkeypatch.setattr("tilewise.plan.passes.choose_walks", lambda q, shape, in_order: 2 if in_order else 1)
    names = [name for name, *_ in launches_of(request_of(q, k, v, **given, impl="portable"))]
    assert names == [
        "list_keys_kernel", "forward_kernel", "prepare_kernel", "list_keys_kernel", "dq_kernel",
        "list_rows_kernel", "dkv_kernel",
    ]  # fmt: skip


def test_another_pattern_takes_the_same_kernels(device):
    """No tile more or less shows on the host: the look, the launches, and a replay of the first's are the
    second's."""

    def request(share: float) -> Request:
        mask = tilewise.Blocks(drawn(device, 1, 2, 6, 8, share=share), 8)
        return request_of(*qkv(device, trained=True), mask=mask, impl="portable")

    some, many = request(0.2), request(0.9)
    assert look(some, True)[0] == look(many, True)[0]
    assert launches_of(some) == launches_of(many)
    with replays(device):
        results(some), results(request(0.3))
        with no_long_way():
            found = results(many)
        with repeating():
            same(found, results(many))


# ---- What is refused


def test_refusals(device):
    blocks, q = tilewise.Blocks, torch.zeros(2, 4, 45, 16, device=device)
    wrong = {
        "pattern=torch.int64 must be a tensor of dtype torch.bool": lambda: blocks(torch.ones(2, 2).long()),
        "pattern=None must be a tensor of dtype torch.bool": lambda: blocks(None),
        "pattern.shape=(4,) must end with [q_blocks, kv_blocks]": lambda: blocks(torch.ones(4).bool()),
        "block=0 must be a number from 1 on": lambda: blocks(torch.ones(2, 2).bool(), 0),
        "block=(16, 2.0) must be a number": lambda: blocks(torch.ones(2, 2).bool(), (16, 2.0)),
    }
    for text, make in wrong.items():
        with pytest.raises(ValueError, match=re.escape(text)):
            make()
    reasons = tilewise.why_not(q, q, q, mask=blocks(torch.ones(3, 4, device=device).bool(), (16, 16)))
    assert "Blocks: pattern.shape=(3, 4) must broadcast to (2, 4, 3, 3)" in str(reasons)
    mask = blocks(torch.ones(3, 3, device=device).bool(), 16)
    assert tilewise.why_not(q, q, q, mask=mask) == []
    half = q.half()
    assert "Blocks may leave out a key" in str(tilewise.why_not(half, half, half, mask=mask, impl="hopper"))
