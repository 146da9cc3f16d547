"""Planted bugs of what the softmax knows beside its result; see `mutations`."""

from __future__ import annotations

from .mutation import Mutation, tests

BACKWARD = "kernels/tilewise/kernels/backward.py"
COMBINE = "kernels/tilewise/kernels/combine.py"
PASSES = "kernels/tilewise/plan/passes.py"
PLAIN = "kernels/tilewise/pytorch/plain_statistics.py"
PLAN = "kernels/tilewise/plan/statistics.py"
STATISTICS = "kernels/tilewise/parts/statistics.py"
TOP_KEYS = "kernels/tilewise/kernels/top_keys.py"
WEIGHTS = "kernels/tilewise/kernels/weights.py"

ALL = tests("statistics", "gradients_through_all_of_them[masks, softcap, sink]")
ALONE = tests("statistics", "each_alone_in_half_precision[entropy-1]")
LARGEST = tests("statistics", "largest_keys_of_equal_weights")
CACHE = tests("statistics", "caches[cache-16]")
ABSENT = tests("statistics", "rows_that_are_not_there_have_no_weights")
NOBODY = tests("statistics", "a_row_without_keys_and_nan_that_nobody_sees")

# fmt: off
MUTATIONS = (
    Mutation("statistics: the moment is not moved with the maximum", STATISTICS,
             "rescale * (moment + shift_log2 * row_sum)", "rescale * moment",
             ALL),
    Mutation("statistics: 0 · -inf in the moment", STATISTICS,
             "tl.sum(tl.where(p > 0.0, p * log2_p, 0.0), 1)", "tl.sum(p * log2_p, 1)",
             ALL),
    Mutation("statistics: the sink has no part in the entropy", STATISTICS,
             "before[1], alone, sink[0], sink[1], row_max", "before[1], alone, sink[0], alone, row_max",
             ALL),
    Mutation("statistics: the last of the largest keys", STATISTICS,
             "tl.where(new_max > row_max, first, tl.minimum(largest, first))",
             "tl.where(new_max >= row_max, first, largest)",
             LARGEST),
    Mutation("statistics: max_logit in the unit of the dot products", STATISTICS,
             "max_score *= unit", "max_score *= 1.0",
             tests("statistics", "a_cache_of_packed_queries")),
    Mutation("statistics: dH without the logarithm's base", STATISTICS,
             "log2_p * LN2, 0.0)", "log2_p, 0.0)",
             ALONE),
    Mutation("statistics: dH · H is left out of delta", PLAN,
             "moved = dentropy * kept.entropy", "moved = dentropy * 0.0",
             ALONE),
    Mutation("statistics: the sink's gradient without its entropy", PASSES,
             "backward.delta, *of_rows[0])", "backward.delta)",
             ALONE),
    Mutation("statistics: splits of a cache add up their entropies", COMBINE,
             "other=0.0) * -LOG2E", "other=0.0) * 0.0",
             CACHE),
    Mutation("statistics: the mass is of the weights after dropout", PLAN,
             'v=v, dropout=None, impl="portable"', 'v=v, impl="portable"',
             tests("statistics", "gradients_through_all_of_them[cosine, padding, dropout]")),
    Mutation("statistics: what a query counts is forgotten on the way back", PLAN,
             "rows, weights_of_rows(stats, request), None, asked", "rows, torch.ones_like(out), None, asked",
             ALL),
    Mutation("statistics: a row behind the last is the last", WEIGHTS,
             "(number >= 0) & (number < q_len)", "(number >= 0) & (number <= q_len)",
             ABSENT),
    Mutation("statistics: chosen rows of one sequence are all sequences'", WEIGHTS,
             "number -= q_place[1]", "number -= 0",
             tests("statistics", "gradients_through_all_of_them[packed]")),
    Mutation("statistics: of equal weights the larger key", TOP_KEYS,
             "last = tl.max(tl.where(kept_s == least[:, None], kept_keys, -1), 1)",
             "last = tl.min(tl.where(kept_s == least[:, None], kept_keys, NO_KEY), 1)",
             LARGEST),
    Mutation("statistics: a row without keys has a largest one", TOP_KEYS,
             'is_key = score > float("-inf")', 'is_key = score >= float("-inf")',
             NOBODY),
    Mutation("statistics: plain PyTorch forgets where a block's keys begin", PLAIN,
             "torch.where(key < 0, key, key + block.kv_start)", "key",
             tests("statistics", "plain_pytorch_answers_as_the_definition")),
)
# fmt: on
