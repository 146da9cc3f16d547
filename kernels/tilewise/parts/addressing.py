"""Where are my rows? Addresses of tiles of a [batch, heads, length, dim] tensor with any strides.

Every product of an index and a stride is taken in 64 bits: one stride can pass 2³¹ elements by itself.
"""

import triton
import triton.language as tl


@triton.jit
def tensors_of(pointers, strides):
    """(pointer, strides) of each of three tensors."""
    return (pointers[0], strides[0]), (pointers[1], strides[1]), (pointers[2], strides[2])


@triton.jit
def head_of(x, place, head):
    """One head of a sequence in x = (pointer, strides of batch, head, row and dim, in elements): the address
    of its row 0, and the strides of row and dim. place: (block, first), as in sequences.py."""
    ptr, strides = x
    ptr += place[0].to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return ptr + place[1].to(tl.int64) * strides[2], strides[2], strides[3]


@triton.jit
def keys_of(x, place, head, layout):
    """The same of keys or values, which may be in pages: then also how a row's page is found."""
    if len(layout[1]) == 3 and len(layout[1][2]) > 0:
        ptr, strides = x
        table_ptr, table_strides, page_size, page_count = layout[1][2]
        ptr += head.to(tl.int64) * strides[1]
        table_ptr += place[0].to(tl.int64) * table_strides[0]
        return ptr, strides[2], strides[3], strides[0], (table_ptr, table_strides[1], page_size, page_count)
    else:
        return head_of(x, place, head)


@triton.jit
def page_of(rows, row_mask, pages):
    """The page of each row of a sequence, [rows]; what the table says is cut to the pages there are."""
    table_ptr, stride, page_size, page_count = pages
    ptrs = table_ptr + (rows // page_size).to(tl.int64) * stride
    if row_mask is None:
        page = tl.load(ptrs).to(tl.int64)
    else:
        page = tl.load(ptrs, mask=row_mask, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(page, 0), page_count - 1)


@triton.jit
def rows_of(place, head, heads, rows):
    """Where a sequence begins in a dense array [blocks, heads, rows] of one number a row."""
    return (place[0].to(tl.int64) * heads + head) * rows + place[1]


@triton.jit
def load_within(ptrs, idx, limits, OTHER: tl.constexpr):
    """What a tensor holds at idx along a dimension with one limit, of `shape.common_limits`; OTHER beyond.
    Without limits () nothing lies beyond."""
    if len(limits) == 0:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=idx < limits[0], other=OTHER)


@triton.jit
def load_pairs(ptrs, q_idx, kv_idx, limits, OTHER: tl.constexpr):
    """The same for a tensor with an element a pair, and a limit along queries and one along keys."""
    if len(limits) == 0:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(q_idx < limits[0]) & (kv_idx < limits[1]), other=OTHER)


@triton.jit
def tile_ptrs(x_head, rows, row_mask, columns):
    """Addresses of rows × columns of a head, [rows, columns]."""
    if len(x_head) == 3:
        ptr, row_stride, dim_stride = x_head
        return ptr + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * dim_stride
    else:
        ptr, row_stride, dim_stride, page_stride, pages = x_head
        offsets = page_of(rows, row_mask, pages) * page_stride
        offsets += (rows % pages[2]).to(tl.int64) * row_stride
        return ptr + offsets[:, None] + columns.to(tl.int64)[None, :] * dim_stride


@triton.jit
def load_tile(x_head, rows, row_mask, START: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns of rows of a head, from START on, [rows, COLUMNS]; rows outside row_mask (None: all
    count) and columns from DIM on are 0."""
    columns = START + tl.arange(0, COLUMNS)
    ptrs = tile_ptrs(x_head, rows, row_mask, columns)
    if START + COLUMNS <= DIM and row_mask is None:
        return tl.load(ptrs)
    elif START + COLUMNS <= DIM:
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
def store_tile(x_head, tile, rows, row_mask, START: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a tile [rows, COLUMNS] to rows of a head, from column START on; what load_tile reads as 0 is not
    written."""
    columns = START + tl.arange(0, COLUMNS)
    mask = row_mask[:, None] & (columns < DIM)[None, :]
    tl.store(tile_ptrs(x_head, rows, row_mask, columns), tile, mask=mask)
