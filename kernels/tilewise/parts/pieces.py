"""Columns in pieces: a tile with head_dim or value_dim columns is a tuple of tiles that lie side by side.

A tile of Triton's has a power of two of columns. One of 128 for head_dim 80 would multiply 48 columns of
zeros; as two pieces, of 16 and 64 columns, it multiplies none:

    head_dim        64      80        96        128     160        192        512     576
    pieces          64      16 + 64   32 + 64   128     32 + 128   64 + 128   512     64 + 512

What a kernel does with such tiles is a function here each, and with one piece the same as without: a product
over the columns, S = Σ_i A_i B_iᵀ, adds up the pieces in their order, in the forward as in the backward, so
that both have the same S; a product into them, and all else, is done to each piece.
"""

import triton
import triton.language as tl

from .addressing import load_tile, store_tile
from .numerics import matmul, round_to, widen
from .shape import next_power_of_two

NARROWEST = 16  # columns that a matmul needs
UNDIVIDED = 64  # columns that are one piece
WIDE = 256  # from more columns on, sums leave a program few registers


def pieces_of(dim: int, narrowest: int = NARROWEST) -> tuple[int, ...]:
    """The columns of the pieces that hold rows of `dim`: one power of two, or two where these have fewer; in
    none fewer than the narrowest.

    Two are a quarter less than one at least. A third would spare an eighth at most, and each takes a product,
    a load and addresses of its own. Up to 64 columns exponentials and instructions take longer than products,
    and one piece has fewer instructions. The wider comes last: Triton distributes all products of a step over
    the warps as the last one, and after a narrow one several warps would compute the same numbers."""
    whole = max(narrowest, next_power_of_two(dim))
    half = whole // 2
    rest = max(narrowest, next_power_of_two(dim - half))
    return (rest, half) if dim > UNDIVIDED and rest + half < whole else (whole,)


def padded_columns(dim: int) -> int:
    """How many columns they have together."""
    return sum(pieces_of(dim))


@triton.constexpr_function
def are_wide(pieces):
    return sum(pieces) > WIDE


@triton.constexpr_function
def columns_before(pieces, i):
    """Where a piece begins among the columns."""
    return sum(pieces[:i])


@triton.jit
def zero_pieces(ROWS: tl.constexpr, PIECES: tl.constexpr):
    """Sums that have not begun, [ROWS, PIECES] in fp32."""
    x = ()
    for i in tl.static_range(len(PIECES)):
        x = x + (tl.full([ROWS, PIECES[i]], 0.0, tl.float32),)  # type: ignore[assignment]
    return x


@triton.jit
def load_pieces(x_head, rows, row_mask, DIM: tl.constexpr, PIECES: tl.constexpr):
    """Rows of a head, [rows, PIECES]; rows outside row_mask (None: all count) and padding columns are 0."""
    x = ()
    for i in tl.static_range(len(PIECES)):
        x = x + (load_tile(x_head, rows, row_mask, columns_before(PIECES, i), DIM, PIECES[i]),)  # type: ignore[assignment]
    return x


@triton.jit
def copy_pieces(copies, first, row, PIECES: tl.constexpr):
    """The same of rows that all count, from `row` on, by the copy engine: a descriptor for each piece.
    first: (block, head, row) where the sequence begins."""
    x = ()
    for i in tl.static_range(len(PIECES)):
        corner = [first[0], first[1], first[2] + row, columns_before(PIECES, i)]
        tile = copies[i].load(corner)  # [1, 1, rows, PIECES[i]]
        x = x + (tl.reshape(tile, [tile.shape[2], PIECES[i]]),)  # type: ignore[assignment]
    return x


@triton.jit
def store_pieces(x_head, x, rows, row_mask, DIM: tl.constexpr, PIECES: tl.constexpr):
    """Write pieces to rows of a head; rows outside row_mask and padding columns are not."""
    for i in tl.static_range(len(PIECES)):
        store_tile(x_head, x[i], rows, row_mask, columns_before(PIECES, i), DIM, PIECES[i])


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """A Bᵀ, [rows of a, rows of b] in fp32: one sum along the columns, from zero, a piece after the other."""
    s = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    for i in tl.static_range(len(a)):
        s = matmul(a[i], tl.trans(b[i]), s, PRECISION)
    return s


@triton.jit
def products(p, x, sums, PRECISION: tl.constexpr):
    """Sums + P X, for a tile P [.., rows of x]."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (matmul(p, x[i], sums[i], PRECISION),)  # type: ignore[assignment]
    return y


@triton.jit
def widened(x):
    """X in fp32."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (widen(x[i]),)  # type: ignore[assignment]
    return y


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """X, in fp32, in `dtype`."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (round_to(x[i], dtype),)  # type: ignore[assignment]
    return y


@triton.jit
def dots(a, b):
    """Σ A · B along the columns, [rows], for A and B in fp32."""
    total = tl.sum(a[0] * b[0], 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i] * b[i], 1)
    return total


@triton.jit
def magnitudes(x):
    """Σ |X| along the columns, [rows]."""
    total = tl.sum(tl.abs(x[0]), 1)
    for i in tl.static_range(1, len(x)):
        total += tl.sum(tl.abs(x[i]), 1)
    return total


@triton.jit
def scaled(x, factor):
    """X · factor, a number or one for each row, [rows, 1]."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (x[i] * factor,)  # type: ignore[assignment]
    return y


@triton.jit
def where_rows(mask, x):
    """X with 0 in rows outside the mask."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (tl.where(mask[:, None], x[i], tl.zeros_like(x[i])),)  # type: ignore[assignment]
    return y
