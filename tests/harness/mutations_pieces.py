"""Planted bugs of tiles in pieces, of wide rows, and of the rows of the table that they get."""

from __future__ import annotations

from .mutation import Mutation, tests

ADDRESSING = "kernels/tilewise/parts/addressing.py"
APPEND = "kernels/tilewise/kernels/append.py"
BACKWARD = "kernels/tilewise/kernels/backward.py"
CALL = "kernels/tilewise/kernels/call.py"
HOPPER_RULES = "kernels/tilewise/plan/rules/hopper.py"
PASSES = "kernels/tilewise/plan/passes.py"
PIECES = "kernels/tilewise/parts/pieces.py"
PREPARE = "kernels/tilewise/kernels/prepare.py"
ROOM = "kernels/tilewise/kernels/room.py"
SIMILARITY = "kernels/tilewise/parts/similarity.py"
TENSORS = "kernels/tilewise/plan/rules/tensors.py"
TILES = "kernels/tilewise/plan/tiles.py"
WALK = "kernels/tilewise/kernels/walk.py"

# fmt: off
MUTATIONS = (
    Mutation("pieces: padded to the next power of two", PIECES,
             "if dim > UNDIVIDED and rest + half < whole else", "if False else",
             tests("pieces", "pieces_of_some_dimensions[80-pieces4]")),
    Mutation("pieces: narrower than a matmul takes", PIECES,
             "rest = max(narrowest, next_power_of_two(dim - half))", "rest = next_power_of_two(dim - half)",
             tests("pieces", "pieces_are_powers_of_two_and_waste_the_least")),
    Mutation("pieces: the widest first", PIECES,
             "return (rest, half) if", "return (half, rest) if",
             tests("pieces", "pieces_are_powers_of_two_and_waste_the_least")),
    Mutation("pieces: all begin at the first column", PIECES,
             "return sum(pieces[:i])", "return 0",
             tests("pieces", "products_over_pieces_and_into_them[80]")),
    Mutation("pieces: only the last one counts in a product", PIECES,
             "s = matmul(a[i], tl.trans(b[i]), s, PRECISION)",
             "s = matmul(a[i], tl.trans(b[i]), s * (i == 0), PRECISION)",
             tests("pieces", "products_over_pieces_and_into_them[80]")),
    Mutation("pieces: every sum goes on from the first", PIECES,
             "matmul(p, x[i], sums[i], PRECISION)", "matmul(p, x[i], sums[i] * (i == 0), PRECISION)",
             tests("pieces", "forward_and_gradients[(80, 80)]")),
    Mutation("pieces: the first alone is scaled", PIECES,
             "y = y + (x[i] * factor,)", "y = y + (x[i] * factor if i == 0 else x[i],)",
             tests("pieces", "forward_and_gradients[(80, 80)]")),
    Mutation("pieces: NaN left in all but the first", PIECES,
             "y = y + (tl.where(mask[:, None], x[i], tl.zeros_like(x[i])),)",
             "y = y + (tl.where(mask[:, None] | (i > 0), x[i], tl.zeros_like(x[i])),)",
             tests("pieces", "nan_where_nobody_looks[(80, 80)]")),
    Mutation("pieces: lengths without the second", PIECES,
             "total += tl.sum(a[i] * b[i], 1)", "total += 0.0",
             tests("pieces", "forward_and_gradients[(96, 40)]")),
    Mutation("pieces: delta without the second", PREPARE,
             "total += tl.sum(tl.where(o[i] == 0.0, 0.0, o[i] * do[i]), 1)", "total += 0.0",
             tests("pieces", "forward_and_gradients[(80, 80)]")),
    Mutation("pieces: a gradient in the second taken for none", PIECES,
             "total += tl.sum(tl.abs(x[i]), 1)", "total += 0.0",
             tests("pieces", "a_gradient_in_one_piece_alone")),
    Mutation("pieces: padding read as numbers", ADDRESSING,
             "elif START + COLUMNS <= DIM:", "elif COLUMNS <= DIM:",
             tests("pieces", "products_over_pieces_and_into_them[75]")),
    Mutation("pieces: padding written", ADDRESSING,
             "mask = row_mask[:, None] & (columns < DIM)[None, :]", "mask = row_mask[:, None]",
             tests("pieces", "products_over_pieces_and_into_them[75]")),
    Mutation("pieces: values cut as keys are", CALL,
             "VALUE_TILE=pieces_of(shape.value_dim)", "VALUE_TILE=pieces_of(shape.head_dim)",
             tests("pieces", "forward_and_gradients[(40, 160)]")),
    Mutation("apart: dK and dV that fit beside each other", BACKWARD,
             "element_bytes == 2 and columns > TOGETHER", "element_bytes == 2 and columns >= TOGETHER",
             tests("pieces", "which_dk_and_dv_are_summed_apart")),
    Mutation("apart: fp32, too", BACKWARD,
             "element_bytes == 2 and columns > TOGETHER", "columns > TOGETHER",
             tests("pieces", "which_dk_and_dv_are_summed_apart")),
    Mutation("apart: delta is left out of dK", BACKWARD,
             "dsT = pT * (drop(dpT, keep, dropout) - delta)",
             "dsT = pT * (drop(dpT, keep, dropout) - delta * (SUMS == 'dkv'))",
             tests("pieces", "dk_and_dv_apart_with_what_is_learned")),
    Mutation("apart: the keys once more are the first tile's", WALK,
             "return (tile + tl.minimum(kv_len, 0)) * TILE +", "return tl.minimum(kv_len, 0) * TILE +",
             tests("pieces", "dk_and_dv_apart_with_what_is_learned")),
    Mutation("apart: a parameter with ranges of other tiles", PASSES,
             "if square.tile_q != tile.tile_q and any(", "if in_hopper and any(",
             tests("pieces", "dk_and_dv_apart_with_what_is_learned")),
    Mutation("apart: as many rows for a parameter's tile", TILES,
             "side = NARROWEST if dim > WIDE", "side = tile.tile_q if dim > WIDE",
             tests("pieces", "tiles_of_parameters_of_wide_rows_fit")),
    Mutation("wide: one limit for both", TENSORS,
             'r.v.shape[3], MAX_VALUE_DIM)', 'r.v.shape[3], MAX_HEAD_DIM)',
             tests("pieces", "what_is_wider_is_refused_by_name[value_dim-dims1-512]")),
    Mutation("wide: rows of a program as many as of narrow ones", APPEND,
             "TILE_ROWS * TILE_COLUMNS // power_of_two_tile(dim)", "TILE_ROWS",
             tests("pieces", "a_program_that_appends_holds_as_much_whatever_the_width")),
    Mutation("wide: handed to Hopper's forward", HOPPER_RULES,
             "if max(head_dim, value_dim) <= WIDEST:", "if min(head_dim, value_dim) <= WIDEST:",
             tests("hopper_rules", "every_rule_has_a_case", "what_is_refused_says_why")),
    Mutation("wide: a row of another width", TILES,
             "return min([each for each in dims if each >= dim],",
             "return min([each for each in dims if each > dim],",
             tests("compiled", "every_row_of_the_table_fits")),
    Mutation("wide: shared memory as for larger instructions", ROOM,
             "from_shared = element_bytes <= 2 and rows >= 64 and", "from_shared = element_bytes <= 2 and",
             tests("compiled", "every_row_of_the_table_fits")),
)
# fmt: on
