"""Where are my rows? Addresses of tiles of a dense [batch, heads, length, dim] tensor with any strides.

Every product of an index and a stride is taken in 64 bits: one stride can pass 2³¹ elements by itself.
"""

import triton
import triton.language as tl


@triton.jit
def tensors_of(pointers, strides):
    """(pointer, strides) of each of three tensors."""
    return (pointers[0], strides[0]), (pointers[1], strides[1]), (pointers[2], strides[2])


@triton.jit
def head_of(x, batch, head):
    """One head of x = (pointer, strides of batch, head, row and dim, in elements): the address of its row 0,
    and the strides of row and dim."""
    ptr, strides = x
    return ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1], strides[2], strides[3]


@triton.jit
def tile_ptrs(x_head, rows, columns):
    """Addresses of rows × columns of a head, [rows, columns]."""
    ptr, row_stride, dim_stride = x_head
    return ptr + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * dim_stride


@triton.jit
def load_tile(x_head, rows, row_mask, DIM: tl.constexpr, DIM_TILE: tl.constexpr):
    """Rows of a head, [rows, DIM_TILE]; rows outside row_mask (None: all count) and padding columns are 0."""
    columns = tl.arange(0, DIM_TILE)
    ptrs = tile_ptrs(x_head, rows, columns)
    if DIM == DIM_TILE and row_mask is None:
        return tl.load(ptrs)
    elif DIM == DIM_TILE:
        return tl.load(ptrs, mask=row_mask[:, None], other=0.0)
    elif row_mask is None:
        return tl.load(ptrs, mask=(columns < DIM)[None, :], other=0.0)
    else:
        return tl.load(ptrs, mask=row_mask[:, None] & (columns < DIM)[None, :], other=0.0)


@triton.jit
def load_rows(ptr, rows, row_mask):
    """One number a row, [rows], of a dense array; rows outside row_mask (None: all count) are 0."""
    if row_mask is None:
        return tl.load(ptr + rows)
    else:
        return tl.load(ptr + rows, mask=row_mask, other=0.0)


@triton.jit
def store_tile(x_head, tile, rows, row_mask, DIM: tl.constexpr, DIM_TILE: tl.constexpr):
    """Write a tile [rows, DIM_TILE] to rows of a head; rows outside row_mask and padding columns are not."""
    columns = tl.arange(0, DIM_TILE)
    mask = row_mask[:, None] & (columns < DIM)[None, :]
    tl.store(tile_ptrs(x_head, rows, columns), tile, mask=mask)
