"""Planted bugs of K and V by the copy engine."""

from __future__ import annotations

from .mutation import Mutation, tests

CANDIDATES = "kernels/tilewise/tools/tune/candidates.py"
COPIES = "kernels/tilewise/kernels/copies.py"
PIECES = "kernels/tilewise/parts/pieces.py"
TILE = "kernels/tilewise/kernels/tile.py"
WALK = "kernels/tilewise/kernels/walk.py"

TWO_PIECES = tests("copies", "the_same_bits_by_either_way[(80, 16)-None]")
ONE_PIECE = tests("copies", "the_same_bits_by_either_way[(32, 32)-None]")
TAKES = tests("copies", "the_copy_engine_is_asked_only_for_what_it_can_take")

# fmt: off
MUTATIONS = (
    Mutation("copies: every piece from column 0", PIECES,
             "corner = [first[0], first[1], first[2] + row, columns_before(PIECES, i)]",
             "corner = [first[0], first[1], first[2] + row, 0]", TWO_PIECES),
    Mutation("copies: from the tensor's first row, not the sequence's", PIECES,
             "corner = [first[0], first[1], first[2] + row, columns_before(PIECES, i)]",
             "corner = [first[0], first[1], row, columns_before(PIECES, i)]",
             tests("copies", "the_same_bits_of_packed_sequences")),
    Mutation("copies: keys of the first head for all", WALK,
             "copies, (place[0], head, place[1])", "copies, (place[0], head * 0, place[1])", ONE_PIECE),
    Mutation("copies: cut steps too", WALK,
             "    if IS_CUT:\n        return load_pieces(x_head, kv_idx, (kv",
             "    if IS_CUT and len(copies) == 0:\n        return load_pieces(x_head, kv_idx, (kv",
             tests("copies", "what_nobody_sees_may_hold_nan")),
    Mutation("copies: rows that begin anywhere", COPIES,
             "(step % ALIGNMENT or not 0 < step", "(not 0 < step", TAKES),
    Mutation("copies: an address anywhere", COPIES,
             "if start_of(x) % ALIGNMENT:", "if False:", TAKES),
    Mutation("copies: rows in single elements", COPIES,
             "if x.shape[3] > 1 and x.stride(3) != 1:", "if False:", TAKES),
    Mutation("copies: of tiles that did not ask for them", COPIES,
             "not isinstance(tile, CopiedTile)", "False", TAKES),
    Mutation("copies: of pages, as if they were in a row", COPIES,
             "        or in_pages\n", "", TAKES),
    Mutation("copies: a table that forgets them", TILE,
             'CopiedTile if given.get("is_copied") else Tile', "Tile",
             tests("copies", "such_a_tile_is_written_and_read")),
    Mutation("copies: tried where there is no copy engine", CANDIDATES,
             'family(arch) in ("sm_90", "sm_100")', "bool(arch)",
             tests("copies", "it_is_a_candidate_where_the_chip_has_a_copy_engine")),
)
