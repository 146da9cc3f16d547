"""The tiles of a mask: which of them are skipped, cut and full, as the kernels find them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...kernels.tile import Tile
from ...parts.masks.dense import Dense
from ...parts.masks.mask import Mask, as_mask
from ...parts.shape import Shape, ceil_div
from ...plan import tiles
from ...plan.checks import violations
from ...plan.request import make_request
from ..chips import find_chip
from ..explain.coverage import STATES, Coverage, KeyTiles, Rows, key_tiles, rows_of, walk_over_keys
from ..explain.explain import on_meta

GPU, HEAD_DIM = "H200", 128  # the call whose tile is drawn unless another is asked for, in bf16
LONGEST = 1 << 22  # tokens of a side: each row has three numbers
MOST_TILES = 1 << 24  # that are looked at one by one
MOST_PAIRS = 128  # tokens of a side whose pairs are drawn
PAIR_TILE = 16  # the smallest tile that kernels take


@dataclass(frozen=True)
class Shown:
    """The tiles of one head under a mask.

    sizes: how many batches and heads the mask tells apart; batch, head: the ones that these tiles are of.
    coverage: how many of the head's tiles are skipped, cut (`masked`) and full; of_all: the same for all of
    `sizes`. pairs: bool [q_len, kv_len], True where the pair counts, if asked for. contradicted: how many of
    these pairs the mask's interval denies. unknown: as in `Rows`.
    """

    mask: str
    q_len: int
    kv_len: int
    tile: tuple[int, int]
    tile_from: str
    sizes: tuple[int, int]
    batch: int
    head: int
    visits: KeyTiles
    coverage: Coverage
    of_all: Coverage
    pairs: torch.Tensor | None
    contradicted: int
    unknown: tuple[str, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """How many tiles there are down and across."""
        return ceil_div(self.q_len, self.tile[0]), ceil_div(self.kv_len, self.tile[1])

    @property
    def states(self) -> torch.Tensor:
        """The state of every tile, an index into STATES: uint8 [q_tiles, kv_tiles]."""
        down, across = self.grid
        if down * across > MOST_TILES:
            raise ValueError(
                f"tile={self.tile}: {down:,} × {across:,} tiles are too many to list one by one (at most "
                f"{MOST_TILES:,}); give larger ones"
            )
        return self.visits.states(across)[0, 0]

    def blocks(self, down: int, across: int) -> torch.Tensor:
        """The same for blocks of down × across tiles: full or skipped where all of these are, else cut."""
        q_tiles, kv_tiles = self.grid
        begin = torch.arange(0, kv_tiles, across, device="cpu")
        end = (begin + across).clamp(max=kv_tiles)
        if not q_tiles:
            return torch.zeros(0, len(begin), dtype=torch.uint8, device="cpu")
        visits = self.visits
        visited, full = (  # how many tiles of each row of them lie in each block
            (torch.minimum(last[0, 0, :, None], end) - torch.maximum(first[0, 0, :, None], begin)).clamp(0)
            for first, last in ((visits.first, visits.last), (visits.full_first, visits.full_last))
        )
        any_visited = torch.stack([(rows > 0).any(0) for rows in visited.split(down)])
        all_full = torch.stack([(rows == end - begin).all(0) for rows in full.split(down)])
        return any_visited.to(torch.uint8) + all_full.to(torch.uint8)


def show(
    mask: Any,
    lengths: tuple[int, int],
    *,
    tile: tuple[int, int] | None = None,
    batch: int = 0,
    head: int = 0,
    pairs: bool = False,
) -> Shown:
    """The tiles that the forward skips, cuts and leaves full under a mask.

    mask: what `attention` takes; None: no mask. lengths: q_len and kv_len. tile: rows and keys of one, powers
    of two from 16; None: that of the portable forward on an H200 in bf16 with head_dim 128, or 16 × 16 where
    pairs are asked for. batch, head: whose tiles, where the mask tells them apart. pairs: which pairs count
    too, up to 128 × 128 tokens.

    Raises ValueError for what `attention` would refuse, and for sizes that are none or too large.
    """
    q_len, kv_len = check_lengths(lengths, pairs)
    masks = () if mask is None else as_mask(mask).parts()
    told_apart = sizes_of(masks, q_len, kv_len)
    for name, index, count in (("batch", batch, told_apart[0]), ("head", head, told_apart[1])):
        if index < 0 or 1 < count <= index:
            most = "at least 0" if count == 1 else f"from 0 to {count - 1}: the mask has {count} of them"
            raise ValueError(f"{name}={index} must be {most}")
    batches, heads = max(told_apart[0], batch + 1), max(told_apart[1], head + 1)
    q = torch.empty(batches, heads, q_len, HEAD_DIM, device="meta", dtype=torch.bfloat16)
    k = torch.empty(batches, heads, kv_len, HEAD_DIM, device="meta", dtype=torch.bfloat16)
    request = make_request(q, k, k, mask=mask, impl="portable")
    for violation in violations(on_meta(request)):
        raise violation
    shape = request.shape
    size, size_from = tile_of(shape, tile, pairs)
    rows = rows_of(masks, shape)
    own = one_of(rows, batch, head)
    alone = shape._replace(batch=1, q_heads=1, kv_heads=1)
    kept = pairs_of(masks, shape, batch, head) if pairs else None
    return Shown(
        mask="no mask" if mask is None else repr(as_mask(mask)),
        q_len=q_len,
        kv_len=kv_len,
        tile=size,
        tile_from=size_from,
        sizes=(batches, heads),
        batch=batch,
        head=head,
        visits=key_tiles(own, alone, *size),
        coverage=walk_over_keys(own, alone, *size),
        of_all=walk_over_keys(rows, shape, *size),
        pairs=kept,
        contradicted=0 if kept is None else contradictions(own, kept),
        unknown=rows.unknown,
    )


def check_lengths(lengths: Any, pairs: bool) -> tuple[int, int]:
    most = MOST_PAIRS if pairs else LONGEST
    found = tuple(lengths)
    if len(found) != 2 or not all(isinstance(n, int) and 0 <= n <= most for n in found):
        of_pairs = " where pairs are drawn" * pairs
        raise ValueError(f"{lengths=} must be q_len and kv_len, each from 0 to {most:,}{of_pairs}")
    return found[0], found[1]


def sizes_of(masks: Iterable[Mask], q_len: int, kv_len: int) -> tuple[int, int]:
    """How many batches and heads the masks' tensors tell apart; 1 where they tell none."""
    alone, found = Shape(1, 1, 1, q_len, kv_len, HEAD_DIM, HEAD_DIM), [(1, 1)]
    for mask in (leaf for each in masks for leaf in each.leaves()):
        if isinstance(mask, Dense):
            sizes = [(1, 1, *mask.mask.shape)[-4:-2]]
        else:
            sizes = [(1, 1, 1, *x.shape)[-3:-1] for x in mask.bounds(alone) or ()]
        found += [(size[0], size[1]) for size in sizes]
    return max(size[0] for size in found), max(size[1] for size in found)


def tile_of(shape: Shape, asked: tuple[int, int] | None, pairs: bool) -> tuple[tuple[int, int], str]:
    """The tile to draw, and why this one."""
    if asked is not None:
        tile, why = Tile(*asked), "as asked for"
    elif pairs:
        tile, why = Tile(PAIR_TILE, PAIR_TILE), "the smallest that kernels take"
    else:
        tile = tiles.gpu_tile(find_chip(GPU).arch, torch.bfloat16.itemsize, shape)
        why = f"those of the portable forward on an {GPU}, bf16, head_dim {HEAD_DIM}"
    return (tile.tile_q, tile.tile_kv), why


def one_of(rows: Rows, batch: int, head: int) -> Rows:
    """The rows of one head."""
    at = min(batch, rows.repeats[0] - 1), min(head, rows.repeats[1] - 1)
    lo, hi, whole = (x[at[0], at[1]][None, None] for x in (rows.lo, rows.hi, rows.whole))
    return replace(rows, lo=lo, hi=hi, whole=whole)


def pairs_of(masks: Iterable[Mask], shape: Shape, batch: int, head: int) -> torch.Tensor:
    """Which pairs of a head count, by the masks' specifications."""
    indices = torch.arange(shape.q_len, device="cpu")[:, None], torch.arange(shape.kv_len, device="cpu")
    index = (torch.tensor(batch).view(1, 1), torch.tensor(head).view(1, 1), indices[0], indices[1][None])
    kept = torch.ones(shape.q_len, shape.kv_len, dtype=torch.bool, device="cpu")
    for mask in masks:
        kept = kept & mask.twin(shape)(*index).to("cpu")
    return kept


def contradictions(rows: Rows, pairs: torch.Tensor) -> int:
    """How many pairs count outside of their row's interval, or do not inside of one that is whole."""
    keys = torch.arange(pairs.shape[1], device="cpu")
    lo, hi, whole = (x[0, 0, :, None] for x in (rows.lo, rows.hi, rows.whole))
    inside = (lo <= keys) & (keys < hi)
    return int(torch.where(inside, whole & ~pairs, pairs).sum())


def as_dict(shown: Shown) -> dict[str, Any]:
    """For JSON. `tiles` has a string a row of tiles, a letter a tile."""
    letters = [state[0] for state in STATES]
    return {
        "mask": shown.mask,
        "q_len": shown.q_len,
        "kv_len": shown.kv_len,
        "tile": list(shown.tile),
        "tile_from": shown.tile_from,
        "batch": shown.batch,
        "head": shown.head,
        "batches": shown.sizes[0],
        "heads": shown.sizes[1],
        "counts": counts(shown.coverage),
        "counts_of_all": counts(shown.of_all),
        "skipped_share": shown.coverage.skipped_share,
        "letters": dict(zip(letters, STATES, strict=True)),
        "tiles": ["".join(letters[state] for state in row) for row in shown.states.tolist()],
        "pairs": None
        if shown.pairs is None
        else ["".join("01"[kept] for kept in row) for row in shown.pairs.tolist()],
        "contradicted": shown.contradicted,
        "unknown": list(shown.unknown),
    }


def counts(of: Coverage) -> dict[str, int]:
    return {"total": of.total, "skipped": of.skipped, "cut": of.masked, "full": of.full}
