"""Planted bugs in masks of space, and in what `|` and `~` make of masks; see `mutations`."""

from __future__ import annotations

from .mutation import Mutation, tests

ALGEBRA = "kernels/tilewise/parts/masks/algebra.py"
BLOCK_CAUSAL = "kernels/tilewise/parts/masks/block_causal.py"
COMBINED = "kernels/tilewise/parts/masks/combined.py"
ENCODING = "kernels/tilewise/pytorch/encoding.py"
MASK = "kernels/tilewise/parts/masks/mask.py"
NEIGHBORHOOD = "kernels/tilewise/parts/masks/neighborhood.py"
OPTIONS = "kernels/tilewise/plan/rules/options.py"

POINTS = "a_query_sees_the_nearest_points"

# fmt: off
MUTATIONS = (
    Mutation("either: the hull of a row that one mask hides", COMBINED,
             "lo = tl.where(none_a, lo_b, tl.where(none_b, lo_a, tl.minimum(lo_a, lo_b)))",
             "lo = tl.maximum(lo_a, lo_b)",
             tests("mask_algebra", "every_mask_inside_of_others[causal]",
                   "bounds_are_those_of_the_device_function[either]")),
    Mutation("either: whole across a gap", COMBINED,
             "    meet = whole_a & whole_b & (lo_a <= hi_b) & (lo_b <= hi_a)\n    return lo, hi",
             "    meet = whole_a & whole_b\n    return lo, hi",
             tests("mask_algebra", "bounds_are_those_of_the_device_function[either]")),
    Mutation("either: kept outside of a part's interval", COMBINED,
             "return (kv_idx >= lo) & (kv_idx < hi)\n", "return (kv_idx >= lo) & (kv_idx <= hi)\n",
             tests("mask_algebra", "keys_that_nobody_sees_may_be_nan")),
    Mutation("opposite: the rest of what is not a prefix", COMBINED,
             "is_prefix, is_suffix = whole & (lo <= 0), whole & (hi >= kv_len)",
             "is_prefix, is_suffix = whole & (lo >= 0), whole & (hi >= kv_len)",
             tests("mask_algebra", "bounds_are_those_of_the_device_function[opposite]")),
    Mutation("opposite: a coverage that is not turned", COMBINED,
             "return 2 - FIRST(", "return 0 + FIRST(",
             tests("mask_algebra", "a_coverage_says_only_what_is_sure[opposite]")),
    Mutation("opposite: everything beyond short tensors", ALGEBRA,
             "        found = opposite(self.mask.bind(shape), shape)\n"
             "        return found if shape.is_dense else limited(found, self.extents(shape))",
             "        return opposite(self.mask.bind(shape), shape)",
             tests("mask_algebra", "nothing_counts_beyond_tensors_that_are_too_short")),
    Mutation("masks: dropped by `and`", MASK,
             "        raise TypeError(\n", "        return True\n        raise TypeError(\n",
             tests("mask_algebra", "what_is_no_mask_algebra_says_so")),
    Mutation("masks in masks: a corner that is not clear", OPTIONS,
             "leaves = [leaf for part in r.plugs for leaf in part.leaves()]", "leaves = [*r.plugs]",
             tests("mask_algebra", "what_is_no_mask_algebra_says_so")),
    Mutation("masks in masks: their functions lose their twins", ENCODING,
             "        for leaf in leaves_of(request.plugs):", "        for leaf in request.plugs:",
             tests("mask_algebra", "encoded_and_decoded")),
    Mutation("neighborhood: not moved inside at the last point", NEIGHBORHOOD,
             "first = tl.minimum(tl.maximum(x - before, 0), length - size)",
             "first = tl.maximum(x - before, 0)",
             tests("neighborhood", f"{POINTS}[Neighborhood(3, shape=(11,))]")),
    Mutation("neighborhood: groups of one length", NEIGHBORHOOD,
             "members + (own < longer).to(tl.int32) - size", "members - size",
             tests("neighborhood", f"{POINTS}[Neighborhood(3, dilation=2, shape=(7, 9))]")),
    Mutation("neighborhood: fields that borrow from one another", NEIGHBORHOOD,
             "return [(n - 1).bit_length() for n in numbers]",
             "return [(n - 1).bit_length() - 1 for n in numbers]",
             tests("neighborhood", f"{POINTS}[Neighborhood(3, shape=(11,))]",
                   f"{POINTS}[Neighborhood(3, dilation=2, shape=(7, 9))]")),
    Mutation("neighborhood: a box that wraps taken for one row", NEIGHBORHOOD,
             "start, stop = tl.where(is_one, start, 0), tl.where(is_one, stop, length - 1)",
             "start, stop = tl.minimum(start, stop), tl.maximum(start, stop)",
             tests("mask_algebra", "a_coverage_says_only_what_is_sure[neighborhood]")),
    Mutation("blocks: rows before the first key see the first block", BLOCK_CAUSAL,
             "tl.where(position < 0, 0, start + block)", "start + block",
             tests("neighborhood", "frames_see_the_frames_before[None]")),
    Mutation("blocks: no gaps beside another mask", BLOCK_CAUSAL,
             "has_gaps = True", "has_gaps = False",
             tests("neighborhood", "gaps_that_a_mask_beside_it_leaves_are_known")),
)
# fmt: on
