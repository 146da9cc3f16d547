"""Planted bugs of the backward in one walk, of its turns, and of deterministic=; see `mutations`."""

from __future__ import annotations

from .mutation import Mutation, tests

BACKWARD = "kernels/tilewise/kernels/backward.py"
ENCODING = "kernels/tilewise/pytorch/encoding.py"
FINISH = "kernels/tilewise/kernels/finish.py"
ONE_WALK = "kernels/tilewise/kernels/one_walk.py"
PASSES = "kernels/tilewise/plan/passes.py"
SDPA = "kernels/tilewise/scaled_dot_product.py"
SHARES = "kernels/tilewise/kernels/shares.py"
TURNS = "kernels/tilewise/kernels/turns.py"
WALK = "kernels/tilewise/kernels/walk.py"

SQUARE = "Tile(tile_q=32, tile_kv=16, num_warps=4, num_stages=2)"
CAUSAL = tests("one_walk", f"tiles_need_not_be_square[(33, 33)-{SQUARE}]")
ORDER = tests("one_walk", "each_tile_of_rows_is_added_to_in_the_order_of_keys[any-3]")
STARTS = tests("one_walk", "bits_do_not_depend_on_who_starts_first[last first]")
UNSEEN = tests("one_walk", "what_no_query_sees_has_no_influence[nan-scaled_dot]")
LAG = tests("one_walk", "programs_wait_once_and_not_at_every_step[200]")
WORDS = tests("deterministic", "words_say_it[False]")

# fmt: off
MUTATIONS = (
    Mutation("one walk: dS with K and not its transpose", SHARES,
             "matmul(tl.trans(dsT), k, tl.zeros([dsT.shape[1], k.shape[1]]",
             "matmul(dsT, k, tl.zeros([dsT.shape[1], k.shape[1]]",
             CAUSAL),
    Mutation("one walk: NaN in a key that nobody sees", SHARES,
             'tl.abs(widen(x[i])) < float("inf")', 'tl.abs(widen(x[i])) != 7.25',
             UNSEEN),
    Mutation("one walk: shares of the next tile of rows", SHARES,
             "sums_ptr + tile * TILE_Q * HEAD_DIM", "sums_ptr + (tile ^ 1) * TILE_Q * HEAD_DIM",
             CAUSAL),
    Mutation("one walk: a piece added to the columns of the first", SHARES,
             "columns_before(HEAD_TILE, i), HEAD_DIM)", "0, HEAD_DIM)",
             tests("one_walk", "columns_in_pieces")),
    Mutation("one walk: rank counted from the first key", TURNS,
             "return visits, kv_tile - start // TILE_KV", "return visits, kv_tile",
             ORDER),
    Mutation("one walk: rank of a window rounded up", TURNS,
             "kv_tile - start // TILE_KV", "kv_tile - tl.cdiv(start, TILE_KV)",
             ORDER),
    Mutation("one walk: a tile of rows that ends at these keys visits them", TURNS,
             "stop > kv_tile * TILE_KV", "stop >= kv_tile * TILE_KV",
             ORDER),
    Mutation("one walk: turns are not passed on", TURNS,
             'tl.atomic_add(before_ptr, 1, sem="release")', 'tl.atomic_add(before_ptr, 0, sem="release")',
             CAUSAL),
    Mutation("one walk: the last turn is not passed on", BACKWARD,
             "pass_last_turn(shares[1], before)", "pass_last_turn((), before)",
             CAUSAL),
    Mutation("one walk: nobody waits", TURNS,
             "while had != rank:", "while had < 0:",
             tests("one_walk", "nobody_waits_for_ever_in_the_interpreter")),
    Mutation("one walk: numbers are those of the hardware", TURNS,
             'return tl.atomic_add(turns[0], 1, sem="relaxed")', "return tl.program_id(0)",
             STARTS),
    Mutation("one walk: rows from the first to the last", WALK,
             "return full_last - 1 - step", "return full_first + step",
             LAG),
    Mutation("one walk: tiles cut above are walked twice", WALK,
             "return tl.where(half == 0, last - full_last, full_first - first)",
             "return tl.where(half == 0, last - full_last, last - full_last)",
             ORDER),
    Mutation("one walk: the unit of the scores left out of dQ", FINISH,
             "dq = scaled(dq, unit)", "dq = scaled(dq, 1.0)",
             CAUSAL),
    Mutation("one walk: dQ not projected", FINISH,
             "rounded(PROJECT(dq, q),", "rounded(dq,",
             tests("one_walk", "gradients[user_interval float16 cosine]")),
    Mutation("one walk: sums not cleared", ONE_WALK,
             "sums = dq.new_zeros(", "sums = dq.new_ones(",
             CAUSAL),
    Mutation("deterministic=False: PyTorch's switch not asked", PASSES,
             "request.deterministic or torch.are_deterministic_algorithms_enabled()", "request.deterministic",
             tests("deterministic", "pytorchs_switch_keeps_the_order")),
    Mutation("deterministic=False: not in the words", ENCODING,
             "[] if request.deterministic else [ANY_ORDER]", "[]",
             WORDS),
    Mutation("deterministic=: PyTorch's call asks for the order", SDPA,
             "dropout_p=dropout_p, deterministic=False)", "dropout_p=dropout_p)",
             tests("deterministic", "pytorchs_call_leaves_it_to_pytorchs_switch")),
)
# fmt: on
