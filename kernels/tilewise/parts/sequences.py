"""Where does each sequence lie? In a tensor of its own, packed behind others, or in a cache.

A layout is what a kernel is told of that, once for queries and once for keys:

    layout = (q_side, kv_side)
    side   = ()                           dense, [batch, heads, length, dim]
             (offsets_ptr, batch)         packed, [1, heads, tokens, dim]: offsets[b] ≤ row < offsets[b + 1]
             (lens_ptr, stride, pages)    of keys alone: a cache, [batch, heads, capacity, dim], of which the
                                          first lens[b] rows are filled
    pages  = ()                           a sequence has its rows of the cache in one piece
             (table_ptr, strides, page_size, page_count)
                                          in pages, [pages, heads, page_size, dim]: row j of sequence b is in
                                          page table[b, j div page_size]

A *place* is where the rows of one sequence begin: (block, first), the index along the tensor's first
dimension, and the row there: (batch, 0) or (0, offset). With its lengths, that is all a kernel asks.

How many tiles packed sequences have is not known on the host. But sequence s, if the tiles of every sequence
are given numbers from

    first_tile(s) = offsets[s] div TILE + s

on, has room for all of its own before the next one begins: ⌊x + n⌋ - ⌊x⌋ + 1 ≥ ⌈n⌉. So tokens div TILE +
sequences programs serve whatever the lengths are, none of which is read on the host, and a program finds its
sequence by search. Some numbers stay unused.

Rows before the first sequence and after the last belong to two more, 0 and batch + 1, in which a row sees no
key: so somebody writes their zeros. That is why the sequence of the caller's index b is s = b + 1 here.

Offsets and lengths come from the caller and are trusted with nothing: they are cut to the tensor, and an
offset that is lower than the one before it makes an empty sequence.
"""

import triton
import triton.language as tl

PROBES = tl.constexpr(128)  # offsets that a search looks at in one step


# ---- Packed sequences


@triton.jit
def edge(offsets_ptr, sequence, batch, tokens):
    """The first row of each `sequence`, in 0..tokens; of batch + 2, tokens."""
    row = tl.load(offsets_ptr + tl.minimum(tl.maximum(sequence - 1, 0), batch)).to(tl.int64)
    row = tl.where(sequence < 1, 0, tl.where(sequence > batch + 1, tokens, row))
    return tl.minimum(tl.maximum(row, 0), tokens).to(tl.int32)


@triton.jit
def rows_of_sequence(offsets_ptr, sequence, batch, tokens):
    """The first row of a sequence, and its length."""
    first = edge(offsets_ptr, sequence, batch, tokens)
    return first, tl.maximum(edge(offsets_ptr, sequence + 1, batch, tokens) - first, 0)


@triton.jit
def find_sequence(tile, offsets_ptr, batch, tokens, members, TILE: tl.constexpr):
    """The sequence that tile number `tile` belongs to: the last whose first tile is not behind it. A row has
    `members` rows of its tile."""
    found = tile * 0
    count = found + batch + 2
    while count > 1:
        step = tl.cdiv(count, PROBES)
        sequence = found + tl.arange(0, PROBES) * step
        begins = edge(offsets_ptr, sequence, batch, tokens) * members // TILE + sequence
        before = tl.sum(((begins <= tile) & (sequence < found + count)).to(tl.int32))
        skipped = tl.maximum(before - 1, 0) * step
        found += skipped
        count = tl.minimum(step, count - skipped)
    return found


# ---- Sequences of any layout


@triton.jit
def rows_at(side, batch, rows):
    """Where the caller's sequence `batch` lies on a side: its place, and its length."""
    zero = batch * 0
    if len(side) == 0:
        return (batch, zero), rows + zero
    elif len(side) == 2:
        first, length = rows_of_sequence(side[0], batch + 1, side[1], rows)
        return (zero, first), length
    else:
        length = tl.load(side[0] + batch.to(tl.int64) * side[1]).to(tl.int64)
        return (batch, zero), tl.minimum(tl.maximum(length, 0), rows).to(tl.int32)


@triton.jit
def sequence_at(batch, sizes, layout):
    """Where the caller's sequence `batch` lies: (place of its queries, place of its keys, q_len, kv_len)."""
    q_place, q_len = rows_at(layout[0], batch, sizes[2])
    kv_place, kv_len = rows_at(layout[1], batch, sizes[3])
    return q_place, kv_place, q_len, kv_len


# ---- Tiles


@triton.jit
def tiles_of(rows, side, TILE: tl.constexpr):
    """How many numbers the tiles of one head have; rows: of a sequence, or of all that are packed."""
    if len(side) == 2:
        return rows // TILE + side[1] + 2
    else:
        return tl.cdiv(rows, TILE)


@triton.jit
def first_tile(q_place, batch, layout, TILE: tl.constexpr):
    """The number of the first tile of rows of the caller's sequence `batch`."""
    if len(layout[0]) == 2:
        return q_place[1] // TILE + batch + 1
    else:
        return batch * 0


@triton.jit
def tile_of_rows(tile, block, sizes, layout, members, TILE_Q: tl.constexpr):
    """Which tile of rows has this number: the caller's sequence, the tile's place in it, and where it lies.
    A number that no tile has, and rows of no sequence, see no key: their kv_len is 0. members: how many rows
    of the tile each query has: one, or one a head of its group."""
    if len(layout[0]) == 2:
        q_offsets_ptr, count = layout[0]
        q_rows = sizes[2]
        sequence = find_sequence(tile, q_offsets_ptr, count, q_rows, members, TILE_Q)
        q_first, q_len = rows_of_sequence(q_offsets_ptr, sequence, count, q_rows)
        tile -= q_first * members // TILE_Q + sequence
        sees = (sequence >= 1) & (sequence <= count) & (tile * TILE_Q < q_len * members)
        batch = tl.minimum(tl.maximum(sequence - 1, 0), count - 1)
        q_first = tl.where(q_len > 0, q_first, 0)  # no row is asked for behind the last
        kv_place, kv_len = rows_at(layout[1], batch, sizes[3])
        return batch, tile, ((block, q_first), kv_place, q_len, tl.where(sees, kv_len, 0))
    else:
        return block, tile, sequence_at(block, sizes, layout)


HEADS_TOGETHER = tl.constexpr(8)


@triton.jit
def head_and_tile(number, programs, tiles):
    """The head and the tile, of `tiles` a head, that a program of so many owns. Of some heads together come
    first all first tiles, then all second ones, and so on: under a causal mask the longest start first, and
    programs that add to the same rows in the order of their tiles start one after another (turns.py)."""
    first_head = number // (HEADS_TOGETHER * tiles) * HEADS_TOGETHER
    # The last heads may be fewer. The maximum and the last remainder change nothing: they tell the compiler
    # that no tile is negative, which spares steps that a mask cuts up to a tenth of their instructions.
    together = tl.maximum(tl.minimum(HEADS_TOGETHER, programs // tiles - first_head), 1)
    within = number % (HEADS_TOGETHER * tiles)
    return first_head + within % together, within // together % tiles


@triton.jit
def tile_of_keys(tile, block, sizes, layout, TILE_KV: tl.constexpr):
    """The same for a tile of keys: those of no sequence are seen by no row, so their q_len is 0."""
    if len(layout[1]) == 2:
        kv_offsets_ptr, count = layout[1]
        kv_rows = sizes[3]
        sequence = find_sequence(tile, kv_offsets_ptr, count, kv_rows, 1, TILE_KV)
        kv_first, kv_len = rows_of_sequence(kv_offsets_ptr, sequence, count, kv_rows)
        tile -= kv_first // TILE_KV + sequence
        is_seen = (sequence >= 1) & (sequence <= count) & (tile * TILE_KV < kv_len)
        batch = tl.minimum(tl.maximum(sequence - 1, 0), count - 1)
        q_place, q_len = rows_at(layout[0], batch, sizes[2])
        return batch, tile, (q_place, (block, kv_first), tl.where(is_seen, q_len, 0), kv_len)
    else:
        return block, tile, sequence_at(block, sizes, layout)


@triton.jit
def is_of_a_sequence(tile, sizes, layout, members, TILE_Q: tl.constexpr):
    """Whether the rows of the tile of this number belong to a sequence of the caller's."""
    if len(layout[0]) == 2:
        q_offsets_ptr, count = layout[0]
        sequence = find_sequence(tile, q_offsets_ptr, count, sizes[2], members, TILE_Q)
        return (sequence >= 1) & (sequence <= count)
    else:
        return tile >= 0


@triton.jit
def valid_rows(q_idx, q_len, kv_len, layout):
    """The rows q_idx as masks and scores are asked about them, which must be rows that are there."""
    row = tl.minimum(q_idx, q_len - 1)
    if len(layout[0]) == 2:
        return tl.where(kv_len > 0, row, 0)
    else:
        return row


# ---- What masks and scores ask: where a row stands among the keys


@triton.jit
def row_shift(batch, shift_args):
    """Row i of this sequence stands at key position i + shift; shift_args: `Shape.shift_args`."""
    if len(shift_args) == 1:
        return shift_args[0]
    elif len(shift_args) == 2:
        shift = tl.load(shift_args[0] + batch.to(tl.int64) * shift_args[1])
        return tl.minimum(tl.maximum(shift, -(1 << 29)), 1 << 29).to(tl.int32)  # shape.POSITIONS
    else:
        layout, q_rows, kv_rows = shift_args
        _q_place, q_len = rows_at(layout[0], batch, q_rows)
        _kv_place, kv_len = rows_at(layout[1], batch, kv_rows)
        return kv_len - q_len


@triton.jit
def key_count(batch, kv_len_args):
    """kv_len of this sequence; kv_len_args: `Shape.kv_len_args`."""
    if len(kv_len_args) == 1:
        return kv_len_args[0]
    else:
        _kv_place, kv_len = rows_at(kv_len_args[0], batch, kv_len_args[1])
        return kv_len
