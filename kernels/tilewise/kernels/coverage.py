"""Which tiles does a program visit, where masks leave holes? It is told in a list, made just before.

An interval says where the keys of a row begin and end. Masks that leave out whole tiles in between say what
rows see of a run of keys: their `coverage`. For each tile of rows, a program here asks that of every tile of
keys, and writes down the numbers of those in which every pair counts (█), and of those that a mask cuts (▒).
The walk takes them from there, and the others (·) are never visited.

                     keys ──►
    a tile of rows   · █ · ▒ · · █ █ ▒         full: 1, 6, 7    cut: 3, 8

Which tiles of rows visit a tile of keys is asked and written down in the same way. All is the device's:
another pattern of the same shape takes the same kernels, and the host reads nothing. A list has room for
every tile: q_len · kv_len / (TILE_Q · TILE_KV) int32 numbers a head, of packed sequences as many as all of
their tokens would take together. To make it, every row is asked about every tile of keys.

What counts, interval and keep decide: a list only leaves out tiles in which nothing does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..parts.intervals import covered, intersect_intervals
from ..parts.shape import ceil_div
from .call import Call, function_arguments, key_programs, sizes_of
from .launch import launch
from .lists import line_of
from .tile import Tile
from .walk import own_group, own_keys

TOGETHER = 16  # tiles that are asked about at a time

# What a kernel is told of lists: lists.py; () where it walks ranges.
Lists = tuple[Any, ...]


@triton.jit
def append(line_ptr, room, tile, is_visited, is_full, full, cut):
    """Write the visited ones of some tiles behind `full` and `cut` others; how many there are now."""
    is_cut = is_visited & (is_full == 0)
    full_place = full + tl.cumsum(is_full.to(tl.int32), 0) - 1
    cut_place = cut + tl.cumsum(is_cut.to(tl.int32), 0) - 1
    place = tl.where(is_full, full_place, room - 1 - cut_place)
    tl.store(line_ptr + 2 + place, tile, mask=is_full | is_cut)
    return full + tl.sum(is_full.to(tl.int32)), cut + tl.sum(is_cut.to(tl.int32))


@triton.jit
def list_keys_kernel(
    lists,  # (pointer, room): a line for each program of the walk, which has the same number as here
    sizes,
    layout,
    mask_args,
    INTERVALS: tl.constexpr,
    COVERAGES: tl.constexpr,  # a function or None for each mask
    IS_GROUPED: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The tiles of keys that each tile of rows visits."""
    batch, head, head_column, _kv_head, _q_idx, row, where, _tile, _q_tile = own_group(
        sizes, layout, TILE_Q, IS_GROUPED
    )
    kv_len = where[3]
    lo, hi, whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args, COVERAGES)
    line_ptr = line_of(lists, tl.program_id(0))
    full, cut = kv_len * 0, kv_len * 0
    for chunk in range(0, tl.cdiv(kv_len, TILE_KV), TOGETHER):
        tile = chunk + tl.arange(0, TOGETHER)
        first = tl.minimum(tile * TILE_KV, kv_len - 1)[None, :]
        last = tl.minimum(tile * TILE_KV + TILE_KV - 1, kv_len - 1)[None, :]
        seen = covered(
            row, first, last, lo, hi, whole, batch, head_column, COVERAGES, mask_args
        )  # [TILE_Q, TOGETHER]
        is_visited = (tl.max(seen, 0) > 0) & (tile * TILE_KV < kv_len)
        is_full = (tl.min(seen, 0) == 2) & (tile * TILE_KV + TILE_KV <= kv_len)
        full, cut = append(line_ptr, lists[1], tile, is_visited, is_full, full, cut)
    tl.store(line_ptr, full)
    tl.store(line_ptr + 1, cut)


@triton.jit
def list_rows_kernel(
    lists,  # (pointer, room): a line for each program of the walk and each query head of its group
    sizes,
    layout,
    mask_args,
    INTERVALS: tl.constexpr,
    COVERAGES: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The tiles of rows that visit each tile of keys. One that reaches beyond q_len is cut, so that its
    missing rows are masked out, and so is every one where keys are missing."""
    _q_heads, group, _q_rows, _kv_rows = sizes
    batch, kv_head, kv_start, where = own_keys(tl.program_id(0), sizes, layout, TILE_KV)
    _q_place, _kv_place, q_len, kv_len = where
    head = kv_head * group + tl.program_id(1)
    line_ptr = line_of(lists, tl.program_id(0) * group + tl.program_id(1))
    first = tl.full([1, 1], 0, tl.int32) + kv_start
    last = tl.minimum(first + TILE_KV - 1, kv_len - 1)
    full, cut = kv_len * 0, kv_len * 0
    for chunk in range(0, tl.cdiv(q_len, TILE_Q), TOGETHER):
        row = tl.minimum(chunk * TILE_Q + tl.arange(0, TOGETHER * TILE_Q), q_len - 1)
        lo, hi, whole = intersect_intervals(row, kv_len, batch, head, INTERVALS, mask_args, COVERAGES)
        seen = covered(row, first, last, lo, hi, whole, batch, head, COVERAGES, mask_args)
        seen = tl.reshape(seen, [TOGETHER, TILE_Q])
        tile = chunk + tl.arange(0, TOGETHER)
        is_visited = (tl.max(seen, 1) > 0) & (tile * TILE_Q < q_len)
        missing = tl.maximum(tile * TILE_Q + TILE_Q - q_len, kv_start + TILE_KV - kv_len)  # rows or keys
        is_full = (tl.min(seen, 1) == 2) & (missing <= 0)
        full, cut = append(line_ptr, lists[1], tile, is_visited, is_full, full, cut)
    tl.store(line_ptr, full)
    tl.store(line_ptr + 1, cut)


def list_keys(call: Call, tile: Tile, count: int, is_grouped: bool = False) -> Lists:
    """For each of `count` programs that own a tile of rows, the tiles of keys that it visits; () where no
    mask has holes."""
    if not call.has_holes:
        return ()
    lists = empty_lists(call, count, ceil_div(call.shape.kv_len, tile.tile_kv))
    if count:
        launch(list_keys_kernel, (count,), call.q, lists, **mask_arguments(call, tile), IS_GROUPED=is_grouped)
    return lists


def list_rows(call: Call, tile: Tile) -> Lists:
    """For each program that owns a tile of keys, and each query head that reads them, the tiles of rows that
    visit it; () where no mask has holes."""
    if not call.has_holes:
        return ()
    shape = call.shape
    count = key_programs(shape, tile.tile_kv, shape.kv_heads)
    lists = empty_lists(call, count * shape.group, ceil_div(shape.q_len, tile.tile_q))
    if count:
        launch(list_rows_kernel, (count, shape.group), call.q, lists, **mask_arguments(call, tile))
    return lists


def empty_lists(call: Call, lines: int, room: int) -> Lists:
    return torch.empty(lines, 2 + room, dtype=torch.int32, device=call.q.device), room


def mask_arguments(call: Call, tile: Tile) -> dict[str, Any]:
    functions = function_arguments(call)
    return dict(
        sizes=sizes_of(call.shape),
        layout=call.shape.layout,
        mask_args=functions["mask_args"],
        INTERVALS=functions["INTERVALS"],
        COVERAGES=tuple([mask.coverage for mask in call.masks]),
        TILE_Q=tile.tile_q,
        TILE_KV=tile.tile_kv,
        TOGETHER=TOGETHER,
        enable_fp_fusion=True,
    )
