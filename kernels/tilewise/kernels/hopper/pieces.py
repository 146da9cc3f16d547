"""Columns in pieces: what a consumer does with tiles of which each is a tuple of tiles side by side.

Which pieces, and why, says `parts/pieces.py`. Here a piece of K or V is a buffer of its own, so that its rows
are swizzled over their own width; and a product over the columns, or into them, is one for each piece, all of
them under way together.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait


@gluon.constexpr_function
def accumulator(columns):
    """A warpgroup's 64 rows of a product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def left_operand(columns):
    """64 rows in registers that are multiplied for such a product."""
    return gl.DotOperandLayout(0, accumulator(columns), 2)


@gluon.constexpr_function
def rows_of_product(columns):
    """A number a row, where such a product has the row."""
    return gl.SliceLayout(1, accumulator(columns))


@gluon.jit
def in_pieces(descriptor, descriptor_2):
    """Descriptors, of which the second may be None, as a tuple: Triton 3.6 hands no None in one around."""
    if descriptor_2 is None:
        return (descriptor,)
    else:
        return descriptor, descriptor_2


@gluon.jit
def renamed(x, LAYOUT: gl.constexpr):
    """X in another layout that has every number in the same register. Triton 3.6 keeps a conversion to the
    layout that x has."""
    if x.type.layout == LAYOUT:
        return x
    else:
        return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def load_pieces(x, LAYOUT: gl.constexpr):
    """Rows in shared memory, in registers."""
    y = ()
    for i in gl.static_range(len(x)):
        y = y + (x[i].load(LAYOUT),)  # type: ignore[assignment]
    return y


@gluon.jit
def zero_pieces(ROWS: gl.constexpr, like):
    """Sums that have not begun, with the columns of the buffers `like`."""
    x = ()
    for i in gl.static_range(len(like)):
        x = x + (gl.full([ROWS, like[i].shape[4]], 0.0, gl.float32, accumulator(like[i].shape[4])),)  # type: ignore[assignment]
    return x


@gluon.jit
def start_product(a, b, LAYOUT: gl.constexpr):
    """A Bᵀ, [rows of a, rows of b]: one sum along the columns, from zero, a piece after the other."""
    s = gl.full([a[0].shape[0], b[0].shape[0]], 0.0, gl.float32, LAYOUT)
    for i in gl.static_range(len(a)):
        s = warpgroup_mma(a[i], b[i].permute((1, 0)), s, use_acc=i > 0, is_async=True)
    return s


@gluon.jit
def start_products(p, x, sums):
    """Sums + P X, for a tile P [.., rows of x] in registers."""
    y = ()
    for i in gl.static_range(len(x)):
        operand = renamed(p, left_operand(x[i].shape[1]))
        y = y + (warpgroup_mma(operand, x[i], sums[i], is_async=True),)  # type: ignore[assignment]
    return y


@gluon.jit
def wait_products(later):
    """The sums that `start_products` has started."""
    if len(later) == 1:
        return (warpgroup_mma_wait(0, deps=[later[0]]),)
    else:
        return warpgroup_mma_wait(0, deps=[later[0], later[1]])


@gluon.jit
def scaled(x, factor):
    """X · factor, a number for each row; factor: in the layout of whichever product."""
    y = ()
    for i in gl.static_range(len(x)):
        of_rows = renamed(factor, rows_of_product(x[i].shape[1]))
        y = y + (x[i] * of_rows[:, None],)  # type: ignore[assignment]
    return y
