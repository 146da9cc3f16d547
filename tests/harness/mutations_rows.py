"""Planted bugs of where rows lie: packed sequences, caches, pages, splits."""

from __future__ import annotations

from .mutation import Mutation, tests

ADDRESSING = "kernels/tilewise/parts/addressing.py"
APPEND = "kernels/tilewise/kernels/append.py"
COMBINE = "kernels/tilewise/kernels/combine.py"
FORWARD = "kernels/tilewise/kernels/forward.py"
INTERVALS = "kernels/tilewise/parts/masks/intervals.py"
JOINING = "kernels/tilewise/joining.py"
PARAMETERS = "kernels/tilewise/kernels/parameters.py"
PIECES = "kernels/tilewise/pytorch/pieces.py"
ROTARY = "kernels/tilewise/parts/rotary.py"
SEQUENCES = "kernels/tilewise/parts/sequences.py"
SHAPE = "kernels/tilewise/parts/shape.py"
SIMILARITY = "kernels/tilewise/parts/similarity.py"
TILES = "kernels/tilewise/plan/tiles.py"
WALK = "kernels/tilewise/kernels/walk.py"

ALONE = tests("packed", "a_sequence_has_the_bits_that_it_has_alone[Causal()]")
OUTSIDE = tests("packed", "rows_of_no_sequence_give_nothing_and_take_nothing[portable]")
MANY = tests("packed", "more_sequences_than_rows[150]")
WRITTEN = tests("cached", "new_rows_are_written_and_attended_to[portable-16-3]")
BITS = tests("cached", "bits_depend_on_nothing_but_the_sequence")

# fmt: off
MUTATIONS = (
    # ---- Packed sequences
    Mutation("packed: offsets not cut to the tensor", SEQUENCES,
             "return tl.minimum(tl.maximum(row, 0), tokens).to(tl.int32)", "return row.to(tl.int32)",
             tests("packed", "bad_offsets_read_and_write_nothing_outside[beyond the end]")),
    Mutation("packed: a sequence as long as a decreasing offset says", SEQUENCES,
             "tl.maximum(edge(offsets_ptr, sequence + 1, batch, tokens) - first, 0)",
             "edge(offsets_ptr, sequence + 1, batch, tokens) - first + 1",
             ALONE),
    Mutation("packed: tiles without room between sequences", SEQUENCES,
             "return q_place[1] // TILE + batch + 1", "return q_place[1] // TILE + batch",
             ALONE),
    Mutation("packed: the first tile of a sequence is that of the one before", SEQUENCES,
             "((begins <= tile) & (sequence < found + count))",
             "((begins < tile) & (sequence < found + count))",
             ALONE),
    Mutation("packed: a search of one step", SEQUENCES,
             "count = tl.minimum(step, count - skipped)", "count = 1",
             MANY),
    Mutation("packed: rows of no sequence see keys", SEQUENCES,
             "sees = (sequence >= 1) & (sequence <= count) & (tile * TILE_Q < q_len * members)",
             "sees = tile * TILE_Q < q_len * members",
             OUTSIDE),
    Mutation("packed: keys of no sequence are seen", SEQUENCES,
             "is_seen = (sequence >= 1) & (sequence <= count) & (tile * TILE_KV < kv_len)",
             "is_seen = tile * TILE_KV < kv_len",
             OUTSIDE),
    Mutation("packed: a sink for rows of no sequence", FORWARD,
             "has_sink = is_of_a_sequence(tile, sizes, layout, members, TILE_Q) & (tl.program_id(1) == 0)",
             "has_sink = tl.program_id(1) == 0",
             OUTSIDE),
    Mutation("packed: corners of the whole tensor", SHAPE,
             "        return self.layout, self.q_len, self.kv_len", "        return (self.shift(align),)",
             ALONE),
    Mutation("packed: masks read beyond their end", INTERVALS,
             "load_within(end_ptrs, q_idx, limits, 0)", "tl.load(end_ptrs)",
             tests("packed", "a_tensor_along_positions_may_end_before_a_sequence[intervals]")),
    Mutation("packed: sums of the first sequence's tiles for all", PARAMETERS,
             "layout[0], TILE) + first", "layout[0], TILE)",
             tests("packed", "gradients_of_what_each_sequence_has_for_itself")),
    Mutation("packed: the norms of the first rows", SIMILARITY,
             "q_first = rows_of(q_place, head, q_heads, q_rows)", "q_first = head * q_rows",
             tests("packed", "cosines_of_packed_rows")),
    Mutation("packed: plain PyTorch takes every sequence for the first", PIECES,
             "results.append(answer(one, batch))", "results.append(answer(one, 0))",
             tests("packed", "gradients_of_what_each_sequence_has_for_itself")),
    Mutation("packed: the tile of a few tokens for all", TILES,
             "        return FAR\n", "        return shape.q_len\n",
             tests("packed", "tiles_do_not_depend_on_what_else_is_packed")),
    # ---- Caches
    Mutation("cache: lengths beyond the capacity", SEQUENCES,
             "tl.minimum(tl.maximum(length, 0), rows).to(tl.int32)", "tl.maximum(length, 0).to(tl.int32)",
             tests("cached", "bad_lengths_and_pages_touch_nothing_outside")),
    Mutation("cache: junk in the table", ADDRESSING,
             "return tl.minimum(tl.maximum(page, 0), page_count - 1)", "return page",
             tests("cached", "bad_lengths_and_pages_touch_nothing_outside")),
    Mutation("cache: rows of a page in the order of the sequence", ADDRESSING,
             "(rows % pages[2]).to(tl.int64) * row_stride", "rows.to(tl.int64) * row_stride",
             WRITTEN),
    Mutation("cache: the table of the first sequence", ADDRESSING,
             "table_ptr += place[0].to(tl.int64) * table_strides[0]", "table_ptr += 0 * table_strides[0]",
             WRITTEN),
    Mutation("cache: new rows from the beginning", APPEND,
             "position = kv_len + row", "position = row",
             WRITTEN),
    Mutation("cache: written beyond the end", APPEND,
             "valid = (row < new_len) & (position < sizes[3])", "valid = row < new_len",
             tests("cached", "what_has_no_room_is_left_out")),
    Mutation("cache: the head of the wrong group", WALK,
             "kv_head * group + member % group, member // group",
             "kv_head + member % group * (q_heads // group), member // group",
             WRITTEN),
    Mutation("cache: queries at the first positions", APPEND,
             "tl.maximum(kv_len - q_len + row, 0)", "row",
             tests("cached", "rows_are_turned_by_their_positions[portable-16-half]")),
    Mutation("rotary: the wrong sign", ROTARY,
             "tl.where(is_first[None, :], -y, y)", "tl.where(is_first[None, :], y, -y)",
             tests("cached", "rows_are_turned_by_their_positions[portable-16-half]")),
    Mutation("rotary: all dimensions turned", ROTARY,
             "is_turned = column < 2 * pairs", "is_turned = column < DIM",
             tests("cached", "rows_are_turned_by_their_positions[portable-6-half]")),
    Mutation("split: one key in two pieces", WALK,
             "tl.minimum(hi, first + size), whole", "tl.minimum(hi, first + size + 1), whole",
             tests("cached", "splits_are_merged_to_the_same_result")),
    Mutation("split: full tiles first", WALK,
             "whole & (split[0] == 0)", "whole",
             tests("cached", "bits_of_a_window_do_not_depend_on_other_rows")),
    Mutation("split: a sink in every piece", FORWARD,
             "members, TILE_Q) & (tl.program_id(1) == 0)", "members, TILE_Q)",
             tests("cached", "splits_are_merged_to_the_same_result")),
    Mutation("split: tiles by how many queries there are", TILES,
             "        return shape.group\n", "        return shape.q_len * shape.group\n",
             tests("cached", "tiles_of_given_splits_do_not_depend_on_the_queries")),
    Mutation("split: the last piece left out", COMBINE,
             "for _ in range(splits):", "for _ in range(splits - 1):",
             tests("cached", "splits_are_merged_to_the_same_result")),
    Mutation("merge: weights of the other", JOINING,
             "(out_a, a, has_a), (out_b, b, has_b)", "(out_a, b, has_a), (out_b, a, has_b)",
             tests("joining", "two_halves_of_the_keys_make_the_whole")),
    Mutation("merge: NaN of what has no key", JOINING,
             "out.to(dtype).masked_fill(~has[..., None], 0.0)", "out.to(dtype)",
             tests("joining", "what_has_no_key_stays_out")),
)
# fmt: on
