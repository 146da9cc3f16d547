"""A list of tiles, as a program writes it (coverage.py) and another walks it (walk.py).

lists = (pointer, room)     lines of 2 + room int32, one for each program that walks
a line                      how many full tiles, how many cut ones; then the numbers of the full ones from
                            the front, and those of the cut ones from the back:

                            3  2   1  6  7  ·  ·  ·  8  3        room for 8: full 1, 6, 7 and cut 3, 8
"""

import triton
import triton.language as tl


@triton.jit
def line_of(lists, number):
    """The address of a program's line."""
    return lists[0] + number.to(tl.int64) * (lists[1] + 2)


@triton.jit
def own_tiles(lists, number):
    """The tiles on a line: where the full ones begin and how many they are, and where the cut ones do, from
    the back."""
    line_ptr = line_of(lists, number)
    return line_ptr + 2, tl.load(line_ptr), line_ptr + 1 + lists[1], tl.load(line_ptr + 1)


@triton.jit
def share_of(tiles, split):
    """The tiles of one of the programs that share a list because keys are split: as many of both kinds."""
    if len(split) == 0:
        return tiles
    else:
        full_ptr, full, cut_ptr, cut = tiles
        full_share, cut_share = tl.cdiv(full, tl.num_programs(1)), tl.cdiv(cut, tl.num_programs(1))
        full_before, cut_before = tl.program_id(1) * full_share, tl.program_id(1) * cut_share
        full = tl.maximum(tl.minimum(full - full_before, full_share), 0)
        cut = tl.maximum(tl.minimum(cut - cut_before, cut_share), 0)
        return full_ptr + full_before, full, cut_ptr - cut_before, cut


@triton.jit
def listed_steps(tiles, IS_CUT: tl.constexpr):
    """How many tiles of this kind there are."""
    _full_ptr, full, _cut_ptr, cut = tiles
    return cut if IS_CUT else full


@triton.jit
def listed_tile(step, tiles, IS_CUT: tl.constexpr):
    """The number of the tile of this kind that a step visits."""
    full_ptr, _full, cut_ptr, _cut = tiles
    if IS_CUT:
        return tl.load(cut_ptr - step)
    else:
        return tl.load(full_ptr + step)
