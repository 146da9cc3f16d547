"""Where does each sequence lie? In a tensor of its own, or packed behind others in one tensor.

A layout is what a kernel is told of that: () for dense tensors [batch, heads, length, dim], and for packed
ones [1, heads, tokens, dim] where the sequences start, which only the device knows:

    layout = (q_offsets_ptr, kv_offsets_ptr, batch)      sequence b: q_offsets[b] ≤ row < q_offsets[b + 1]

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

Offsets come from the caller and are trusted with nothing: they are cut to the tensor, and one that is lower
than the one before it makes an empty sequence.
"""

import triton
import triton.language as tl

PROBES = tl.constexpr(128)  # offsets that a search looks at in one step


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
def find_sequence(tile, offsets_ptr, batch, tokens, TILE: tl.constexpr):
    """The sequence that tile number `tile` belongs to: the last whose first tile is not behind it."""
    found = tile * 0
    count = found + batch + 2
    while count > 1:
        step = tl.cdiv(count, PROBES)
        sequence = found + tl.arange(0, PROBES) * step
        begins = edge(offsets_ptr, sequence, batch, tokens) // TILE + sequence
        before = tl.sum(((begins <= tile) & (sequence < found + count)).to(tl.int32))
        skipped = tl.maximum(before - 1, 0) * step
        found += skipped
        count = tl.minimum(step, count - skipped)
    return found


@triton.jit
def lengths_of(batch, layout, tokens, kv_tokens):
    """q_len and kv_len of the caller's sequence `batch`, in a packed layout."""
    q_offsets_ptr, kv_offsets_ptr, count = layout
    _q_first, q_len = rows_of_sequence(q_offsets_ptr, batch + 1, count, tokens)
    _kv_first, kv_len = rows_of_sequence(kv_offsets_ptr, batch + 1, count, kv_tokens)
    return q_len, kv_len


@triton.jit
def sequence_at(batch, sizes, layout):
    """Where the caller's sequence `batch` lies: (place of its queries, place of its keys, q_len, kv_len)."""
    _q_heads, _group, q_rows, kv_rows = sizes
    zero = batch * 0
    if len(layout) == 0:
        return (batch, zero), (batch, zero), q_rows + zero, kv_rows + zero
    else:
        q_offsets_ptr, kv_offsets_ptr, count = layout
        q_first, q_len = rows_of_sequence(q_offsets_ptr, batch + 1, count, q_rows)
        kv_first, kv_len = rows_of_sequence(kv_offsets_ptr, batch + 1, count, kv_rows)
        return (zero, q_first), (zero, kv_first), q_len, kv_len


# ---- Tiles


@triton.jit
def tiles_of(rows, layout, TILE: tl.constexpr):
    """How many numbers the tiles of one head have; rows: of a sequence, or of all that are packed."""
    if len(layout) == 0:
        return tl.cdiv(rows, TILE)
    else:
        return rows // TILE + layout[2] + 2


@triton.jit
def first_tile(q_place, batch, layout, TILE: tl.constexpr):
    """The number of the first tile of rows of the caller's sequence `batch`."""
    if len(layout) == 0:
        return batch * 0
    else:
        return q_place[1] // TILE + batch + 1


@triton.jit
def tile_of_rows(tile, block, sizes, layout, TILE_Q: tl.constexpr):
    """Which tile of rows has this number: the caller's sequence, the tile's place in it, and where it lies.
    A number that no tile has, and rows of no sequence, see no key: their kv_len is 0."""
    if len(layout) == 0:
        return block, tile, sequence_at(block, sizes, layout)
    else:
        q_offsets_ptr, kv_offsets_ptr, count = layout
        sequence = find_sequence(tile, q_offsets_ptr, count, sizes[2], TILE_Q)
        q_first, q_len = rows_of_sequence(q_offsets_ptr, sequence, count, sizes[2])
        kv_first, kv_len = rows_of_sequence(kv_offsets_ptr, sequence, count, sizes[3])
        tile -= q_first // TILE_Q + sequence
        sees = (sequence >= 1) & (sequence <= count) & (tile * TILE_Q < q_len)
        batch = tl.minimum(tl.maximum(sequence - 1, 0), count - 1)
        return batch, tile, ((block, q_first), (block, kv_first), q_len, tl.where(sees, kv_len, 0))


@triton.jit
def tile_of_keys(tile, block, sizes, layout, TILE_KV: tl.constexpr):
    """The same for a tile of keys: those of no sequence are seen by no row, so their q_len is 0."""
    if len(layout) == 0:
        return block, tile, sequence_at(block, sizes, layout)
    else:
        q_offsets_ptr, kv_offsets_ptr, count = layout
        sequence = find_sequence(tile, kv_offsets_ptr, count, sizes[3], TILE_KV)
        q_first, q_len = rows_of_sequence(q_offsets_ptr, sequence, count, sizes[2])
        kv_first, kv_len = rows_of_sequence(kv_offsets_ptr, sequence, count, sizes[3])
        tile -= kv_first // TILE_KV + sequence
        is_seen = (sequence >= 1) & (sequence <= count) & (tile * TILE_KV < kv_len)
        batch = tl.minimum(tl.maximum(sequence - 1, 0), count - 1)
        return batch, tile, ((block, q_first), (block, kv_first), tl.where(is_seen, q_len, 0), kv_len)


@triton.jit
def is_of_a_sequence(tile, sizes, layout, TILE_Q: tl.constexpr):
    """Whether the rows of the tile of this number belong to a sequence of the caller's."""
    if len(layout) == 0:
        return tile * 0 == 0
    else:
        sequence = find_sequence(tile, layout[0], layout[2], sizes[2], TILE_Q)
        return (sequence >= 1) & (sequence <= layout[2])


@triton.jit
def valid_rows(q_idx, q_len, kv_len, layout):
    """The rows q_idx as masks and scores are asked about them, which must be rows that are there."""
    row = tl.minimum(q_idx, q_len - 1)
    if len(layout) == 0:
        return row
    else:
        return tl.where(kv_len > 0, row, 0)


# ---- What masks and scores ask: where a row stands among the keys


@triton.jit
def row_shift(batch, shift_args):
    """Row i of this sequence stands at key position i + shift; shift_args: `Shape.shift_args`."""
    if len(shift_args) == 1:
        return shift_args[0]
    else:
        q_len, kv_len = lengths_of(batch, shift_args[0], shift_args[1], shift_args[2])
        return kv_len - q_len


@triton.jit
def key_count(batch, kv_len_args):
    """kv_len of this sequence; kv_len_args: `Shape.kv_len_args`."""
    if len(kv_len_args) == 1:
        return kv_len_args[0]
    else:
        _q_len, kv_len = lengths_of(batch, kv_len_args[0], kv_len_args[1], kv_len_args[2])
        return kv_len
