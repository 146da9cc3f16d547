"""Planted bugs of `Blocks`, of the lists of tiles and of walks over them."""

from __future__ import annotations

from .mutation import Mutation, tests

BLOCKS = "kernels/tilewise/parts/masks/blocks.py"
COVERAGE = "kernels/tilewise/kernels/coverage.py"
FORWARD = "kernels/tilewise/kernels/forward.py"
INTERVALS = "kernels/tilewise/parts/intervals.py"
LISTS = "kernels/tilewise/kernels/lists.py"
PASSES = "kernels/tilewise/plan/passes.py"
PLACE = "kernels/tilewise/parts/place.py"
BACKWARD = "kernels/tilewise/kernels/backward.py"

LISTED = tests("blocks", "lists_are_those_of_brute_force[(5, 7)]")
MATCHING = tests("blocks", "lists_are_those_of_brute_force[(16, 32)]")
STEPS = tests("blocks", "empty_tiles_are_not_visited")
WITH_DOCUMENTS = tests(
    "blocks", "with_other_features[grouped_heads-oblong_tile-causal-scattered_documents-bias]"
)
SHARED = tests("blocks", "a_list_is_shared_by_splits")

# fmt: off
MUTATIONS = (
    Mutation("blocks: a run of keys ends before its last block", BLOCKS,
             "kv_last // block_kv + 1", "(kv_last + 1) // block_kv",
             LISTED),
    Mutation("blocks: the rows of one head for all", BLOCKS,
             "    ptrs = count_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]",
             "    ptrs = count_ptr + batch.to(tl.int64) * strides[0]",
             MATCHING),
    Mutation("blocks: a row that has all of its blocks but one is whole", BLOCKS,
             "stop - first == total[..., 0]", "stop - first <= total[..., 0] + 1",
             tests("extending", "a_mask_says_on_the_host_what_its_interval_says[Blocks]")),
    Mutation("blocks: what is broadcast ends with its only block", BLOCKS,
             "FAR if n == 1 else n_side", "n_side",
             SHARED),
    Mutation("lists: a tile is full if one of its rows sees it all", COVERAGE,
             "is_full = (tl.min(seen, 0) == 2)", "is_full = (tl.max(seen, 0) == 2)",
             LISTED),
    Mutation("lists: a tile that reaches beyond the keys may be full", COVERAGE,
             "(tl.min(seen, 0) == 2) & (tile * TILE_KV + TILE_KV <= kv_len)", "(tl.min(seen, 0) == 2)",
             LISTED),
    Mutation("lists: a tile that reaches beyond the rows may be full", COVERAGE,
             "missing = tl.maximum(tile * TILE_Q + TILE_Q - q_len, kv_start + TILE_KV - kv_len)",
             "missing = tile * 0 + kv_start + TILE_KV - kv_len",
             LISTED),
    Mutation("lists: of each group the first head's", COVERAGE,
             "head = kv_head * group + tl.program_id(1)", "head = kv_head * group",
             MATCHING),
    Mutation("lists: cut tiles of a chunk over those of the one before", COVERAGE,
             "return full + tl.sum(is_full.to(tl.int32)), cut + tl.sum(is_cut.to(tl.int32))",
             "return full + tl.sum(is_full.to(tl.int32)), tl.sum(is_cut.to(tl.int32))",
             SHARED),
    Mutation("lists: masks without coverage say nothing of full tiles", INTERVALS,
             "if COVERAGES is None or COVERAGES[i] is None:", "if COVERAGES is None:",
             WITH_DOCUMENTS + tests("blocks", "with_other_features[copied_tile-bool_mask]")),
    Mutation("lists: masks with coverage say it twice", INTERVALS,
             "if COVERAGES is None or COVERAGES[i] is None:", "if True:",
             LISTED),
    Mutation("lists: tiles of other masks' intervals alone", INTERVALS,
             "overlaps = tl.maximum(lo, first) < tl.minimum(hi, last + 1)", "overlaps = lo <= last",
             STEPS),
    Mutation("walk: the last program of a split takes what is left and more", LISTS,
             "full = tl.maximum(tl.minimum(full - full_before, full_share), 0)", "full = full_share",
             SHARED),
    Mutation("walk: every split takes the whole list", LISTS,
             "    if len(split) == 0:\n        return tiles", "    if True:\n        return tiles",
             SHARED),
    Mutation("lists: cut tiles behind as many as are full", COVERAGE,
             "room - 1 - cut_place", "room - 1 - full_place",
             LISTED),
    Mutation("walk: the list of the first head of a group for all", BACKWARD,
             "listed_rows(lists, program * group + part // HALVES)", "listed_rows(lists, program * group)",
             STEPS),
    Mutation("walk: holes are visited", FORWARD,
             "lists = list_keys(call, tile, count, call.is_grouped)", "lists = ()",
             STEPS),
    Mutation("blocks: one walk where any order will do", PASSES,
             "choose_walks(q, shape, in_order or has_holes)", "choose_walks(q, shape, in_order)",
             tests("blocks", "calls_with_holes_take_two_walks")),
    Mutation("place: a part asks about its own keys", PLACE,
             "first, last = kv_first + origin[3], kv_last + origin[3]", "first, last = kv_first, kv_last",
             tests("place", "parts_are_the_whole[intervals-blocks-user_score-portable]")),
)
