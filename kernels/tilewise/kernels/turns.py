"""In which order do programs add to the same tile of dQ? In that of their keys, so that bits repeat.

A program that owns tile j of the keys adds a share to every tile of rows that visits it. Sums in floating
point depend on their order, so each tile of rows has a counter of the programs that have added, and program
j adds when that counter is its rank: how many tiles of keys before j the rows visit. prepare.py has written
the keys start..stop that they visit, so the rank is j - start div TILE_KV, without holes.

    counter of a tile of rows    0 ──► 1 ──► 2 ──► 3        tiles of keys 4, 5 and 6 visit it
    who adds there               4     5     6

Nobody waits for long: program j walks the rows from the last to the first, a tile of rows or two behind
program j - 1, which started before it. Nobody waits for ever: a program waits only for lower numbers of its
own head, and numbers are tickets, taken when a program starts, so that every lower number is running. The
lowest of those that run waits for nobody, and so, one after another, all of them end.

A turn is passed on before the next one is waited for, and not at once: until then the additions have come to
pass, which takes memory longer than the program has to spare.

    turns = (turns_ptr,)    int32 zeros: how many numbers are taken; a counter of no tile, which is passed on
                            before the first turn; the counters [blocks, q_heads, tiles of rows]
            ()              programs add as they come, and bits do not repeat
"""

import triton
import triton.language as tl

from ..parts.numerics import INTERPRETED

NOBODYS = tl.constexpr(1)  # the counter of no tile
FIRST_COUNTER = tl.constexpr(2)


@triton.jit
def take_number(turns):
    """The number of this program: programs that start earlier have lower ones. Without turns it does not
    matter."""
    if len(turns) == 0:
        return tl.program_id(0)
    else:
        return tl.atomic_add(turns[0], 1, sem="relaxed")


@triton.jit
def rank_of(start, stop, kv_tile, TILE_KV: tl.constexpr):
    """Whether rows that visit the keys start..stop visit this tile of keys, and how many before it."""
    visits = (start < (kv_tile + 1) * TILE_KV) & (stop > kv_tile * TILE_KV)
    return visits, kv_tile - start // TILE_KV


@triton.jit
def take_turn(turn_ptr, rank, before_ptr):
    """Pass on the turn of before_ptr, and wait until `rank` programs have had that of turn_ptr.

    To ask for a counter is to wait for all threads of the program, for all are told what one of them reads.
    So before the turn is passed on all have made their additions, and after the last answer none has begun.
    A barrier by its own name would say the same, but Triton has no loads in flight in a loop with one."""
    had = tl.atomic_add(turn_ptr, 0, sem="acquire")
    tl.atomic_add(before_ptr, 1, sem="release")
    while had != rank:
        assert not INTERPRETED, "programs run one after another here: whoever waits, waits for ever"
        had = tl.atomic_add(turn_ptr, 0, sem="acquire")


@triton.jit
def pass_last_turn(turns, turn):
    """The program adds no more."""
    if len(turns) > 0:
        tl.debug_barrier()
        tl.atomic_add(turns[0] + turn, 1, sem="release")
