"""A program owns a tile of rows or of keys: which? And which keys does one of rows see at each step?

First come the tiles of keys in which every pair counts (█), then those that a mask cuts (▒); the others (·)
are never visited. Of the keys of a cut tile some may lie outside the range of the walk.

                     keys ──►
    q_tile 0         ▒ · · · ·
    q_tile 1         █ ▒ · · ·          causal, TILE_Q = TILE_KV
    q_tile 2         █ █ ▒ · ·
    q_tile 3         █ █ █ ▒ ·

Which tiles these are, their range says, or, where masks leave holes in it, a list: coverage.py.
"""

import triton
import triton.language as tl

from ..parts.addressing import keys_of
from ..parts.intervals import cut_tile
from ..parts.pieces import copy_pieces, load_pieces
from ..parts.sequences import head_and_tile, tile_of_keys, tile_of_rows, tiles_of, valid_rows
from .lists import listed_steps, listed_tile, own_tiles, share_of


@triton.jit
def own_rows(sizes, layout, TILE_Q: tl.constexpr):
    """batch, head and q_idx [TILE_Q] of the program's rows; `row`: the same rows for masks and scores, which
    are asked about valid rows only; where the sequence lies, as sequences.py has it; and the tile's number
    and its place in the sequence. The last tiles, the longest under a causal mask, start first."""
    q_heads, _group, q_rows, _kv_rows = sizes
    tiles = tiles_of(q_rows, layout[0], TILE_Q)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = (program // tiles) % q_heads
    batch, q_tile, where = tile_of_rows(tile, program // tiles // q_heads, sizes, layout, 1, TILE_Q)
    q_idx = q_tile * TILE_Q + tl.arange(0, TILE_Q)
    return batch, head, q_idx, valid_rows(q_idx, where[2], where[3], layout), where, tile, q_tile


@triton.jit
def own_group(sizes, layout, TILE_Q: tl.constexpr, IS_GROUPED: tl.constexpr):
    """The same for the forward, where a tile may hold the rows of all query heads of a group, so that few
    rows share the keys they read: then head is [TILE_Q], and row r of the tiles of a sequence is query
    r div group of the group's head r mod group. Also the head of keys, and head as it goes with a tile."""
    if IS_GROUPED:
        q_heads, group, q_rows, _kv_rows = sizes
        tiles, kv_heads = tiles_of(q_rows * group, layout[0], TILE_Q), q_heads // group
        program = tl.program_id(0)
        tile = tiles - 1 - program % tiles
        kv_head = (program // tiles) % kv_heads
        block = program // tiles // kv_heads
        batch, q_tile, where = tile_of_rows(tile, block, sizes, layout, group, TILE_Q)
        member = q_tile * TILE_Q + tl.arange(0, TILE_Q)
        head, q_idx = kv_head * group + member % group, member // group
        row = valid_rows(q_idx, where[2], where[3], layout)
        return batch, head, head[:, None], kv_head, q_idx, row, where, tile, q_tile
    else:
        batch, head, q_idx, row, where, tile, q_tile = own_rows(sizes, layout, TILE_Q)
        return batch, head, head, head // sizes[1], q_idx, row, where, tile, q_tile


@triton.jit
def once_more(tile, kv_len, TILE: tl.constexpr):
    """The rows, or keys, of a tile, for its results: for these no registers are held while the program walks.
    kv_len is never negative, but the compiler does not know, and takes them for others."""
    return (tile + tl.minimum(kv_len, 0)) * TILE + tl.arange(0, TILE)


@triton.jit
def own_keys(program, sizes, layout, TILE_KV: tl.constexpr):
    """batch, head of keys, the first key of the program's tile, and where the sequence lies. The first tiles
    of keys, seen by the most rows under a causal mask, start first."""
    q_heads, group, _q_rows, kv_rows = sizes
    tiles, kv_heads = tiles_of(kv_rows, layout[1], TILE_KV), q_heads // group
    head, tile = head_and_tile(program, tl.num_programs(0), tiles)
    batch, kv_tile, where = tile_of_keys(tile, head // kv_heads, sizes, layout, TILE_KV)
    kv_head = head % kv_heads
    return batch, kv_head, kv_tile * TILE_KV, where


@triton.jit
def keys_of_split(lo, hi, whole, kv_len, split, TILE_KV: tl.constexpr):
    """What a split leaves of the intervals lo..hi: the keys of a sequence are split over the programs of one
    tile, in pieces of split[0], or, where that is 0, of equal ones for each sequence. Pieces of a given size
    promise bits that do not depend on what other rows are in a tile, so no tile goes before others there
    because all of its pairs count."""
    if len(split) == 0:
        return lo, hi, whole
    else:
        equal = tl.cdiv(tl.cdiv(kv_len, tl.num_programs(1)), TILE_KV) * TILE_KV
        size = tl.where(split[0] == 0, equal, split[0])
        first = tl.program_id(1) * size
        return tl.maximum(lo, first), tl.minimum(hi, first + size), whole & (split[0] == 0)


# ---- The keys that a program with a tile of rows walks over; span: what `kv_range` or `listed_keys` says


@triton.jit
def listed_keys(lo, hi, kv_len, lists, split):
    """What `kv_range` says, from the program's list: the keys start..stop that its rows visit, and the tiles
    that hold them."""
    sees = lo < hi
    start = tl.min(tl.where(sees, lo, kv_len))
    stop = tl.max(tl.where(sees, hi, 0))
    return start, stop, share_of(own_tiles(lists, tl.program_id(0)), split)


@triton.jit
def steps_of(span, IS_CUT: tl.constexpr):
    """How many tiles of this kind the walk visits."""
    if len(span) == 3:
        return listed_steps(span[2], IS_CUT)
    else:
        _start, _stop, first, full_first, full_last, last = span
        if IS_CUT:
            return last - first - (full_last - full_first)
        else:
            return full_last - full_first


@triton.jit
def step_keys(step, span, kv_len, IS_CUT: tl.constexpr, TILE_KV: tl.constexpr):
    """A step's keys: the first of them, kv_idx [TILE_KV], and `kv_row`: the same keys for masks and scores,
    which are asked about valid keys only."""
    kv_start = key_tile(step, span, IS_CUT) * TILE_KV
    kv_idx = kv_start + tl.arange(0, TILE_KV)
    if IS_CUT:
        return kv_start, kv_idx, tl.minimum(kv_idx, kv_len - 1)
    else:
        return kv_start, kv_idx, kv_idx


@triton.jit
def key_tile(step, span, IS_CUT: tl.constexpr):
    """Which tile of keys a step visits."""
    if len(span) == 3:
        return listed_tile(step, span[2], IS_CUT)
    else:
        _start, _stop, first, full_first, full_last, _last = span
        if IS_CUT:
            return cut_tile(step, first, full_first, full_last)
        else:
            return full_first + step


@triton.jit
def in_pieces(copy, copy_2):
    """Descriptors, of which there may be one or none, as a tuple: Triton 3.6 hands no None in one around."""
    if copy is None:
        return ()
    elif copy_2 is None:
        return (copy,)
    else:
        return copy, copy_2


@triton.jit
def walked(x, copies, place, head, layout):
    """Keys or values of one head, for `load_keys`; copies: what the copy engine knows of them, a descriptor
    for each piece of columns, or ()."""
    return keys_of(x, place, head, layout), copies, (place[0], head, place[1])


@triton.jit
def load_keys(x, kv_start, kv_idx, span, IS_CUT: tl.constexpr, DIM: tl.constexpr, PIECES: tl.constexpr):
    """A step's tile of K or V, [TILE_KV, PIECES]; what lies outside the range of the walk is 0."""
    x_head, copies, first = x
    if IS_CUT:
        return load_pieces(x_head, kv_idx, (kv_idx >= span[0]) & (kv_idx < span[1]), DIM, PIECES)
    elif len(copies) > 0:
        return copy_pieces(copies, first, kv_start, PIECES)
    else:
        return load_pieces(x_head, kv_idx, None, DIM, PIECES)


# ---- The rows that a program with a tile of keys walks over; span: what `q_range` or `listed_rows` says
#
# First the tiles in which every pair counts, then those that a mask cuts. Programs that take turns (turns.py)
# walk from the last row to the first, in two halves of two runs each: the tiles cut above the full ones, and
# these; those cut below, and none.


@triton.jit
def listed_rows(lists, number):
    """What `q_range` says, from the list of this number."""
    return (own_tiles(lists, number),)


@triton.jit
def row_steps(span, half, IS_CUT: tl.constexpr, IN_TURNS: tl.constexpr):
    """How many tiles of rows a run visits."""
    if len(span) == 1:
        tl.static_assert(not IN_TURNS, "turns are those of ranges")
        return listed_steps(span[0], IS_CUT)
    else:
        first, full_first, full_last, last = span
        full = full_last - full_first
        if IN_TURNS and IS_CUT:
            return tl.where(half == 0, last - full_last, full_first - first)
        elif IN_TURNS:
            return tl.where(half == 0, full, 0)
        elif IS_CUT:
            return last - first - full
        else:
            return full


@triton.jit
def row_tile(step, span, half, IS_CUT: tl.constexpr, IN_TURNS: tl.constexpr):
    """Which tile of rows a step of a run visits."""
    if len(span) == 1:
        tl.static_assert(not IN_TURNS, "turns are those of ranges")
        return listed_tile(step, span[0], IS_CUT)
    else:
        first, full_first, full_last, last = span
        if IN_TURNS and IS_CUT:
            return tl.where(half == 0, last, full_first) - 1 - step
        elif IN_TURNS:
            return full_last - 1 - step
        elif IS_CUT:
            return cut_tile(step, first, full_first, full_last)
        else:
            return full_first + step
