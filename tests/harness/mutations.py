"""The planted bugs that `harness.mutate` tries, each with tests that must notice it.

Every one of them is a mistake that attention kernels have shipped with, or could have. Tests are chosen
narrow, so that a run takes seconds.
"""

from __future__ import annotations

from .mutate import Mutation

ADDRESSING = "kernels/tilewise/addressing.py"
API = "kernels/tilewise/api.py"
CHECKS = "kernels/tilewise/checks.py"
DOCUMENTS = "kernels/tilewise/documents.py"
FORWARD = "kernels/tilewise/forward.py"
INTERVALS = "kernels/tilewise/intervals.py"
MASKS = "kernels/tilewise/masks.py"
NUMERICS = "kernels/tilewise/numerics.py"
PROBLEM = "kernels/tilewise/problem.py"
SCORES = "kernels/tilewise/scores.py"
SIMILARITY = "kernels/tilewise/similarity.py"
SOFTMAX = "kernels/tilewise/softmax.py"
TILES = "kernels/tilewise/tiles.py"


def tests(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{file}.py::test_{name}" for name in names)


GROUPINGS = tests("softmax", "every_grouping_and_order_gives_the_softmax")
RANGES = tests("intervals", "kv_range_visits_what_is_needed_once")
RULES = "a_broken_rule_raises_and_says_why"

MUTATIONS = (
    # ---- The softmax state
    Mutation(
        "softmax: maximum not updated",
        SOFTMAX,
        "return new_max, row_sum * rescale",
        "return row_max, row_sum * rescale",
        GROUPINGS,
    ),
    Mutation(
        "softmax: sum not rescaled",
        SOFTMAX,
        "row_sum * rescale + tl.sum(p, 1)",
        "row_sum + tl.sum(p, 1)",
        GROUPINGS,
    ),
    Mutation(
        "softmax: merge forgets to rescale o",
        SOFTMAX,
        "o_a * a[:, None] + o_b * b[:, None]",
        "o_a + o_b * b[:, None]",
        GROUPINGS,
    ),
    Mutation(
        "softmax: lse in base 2",
        SOFTMAX,
        "lse = row_max + tl.log2(row_sum) * LN2",
        "lse = row_max + tl.log2(row_sum)",
        tests("softmax", "lse_is_the_natural_logarithm"),
    ),
    Mutation(
        "softmax: lse mixes two bases",
        SOFTMAX,
        "lse = row_max + tl.log2(row_sum) * LN2",
        "lse = (row_max + tl.log2(row_sum)) * LN2",
        GROUPINGS,
    ),
    Mutation(
        "softmax: empty row divides by 0",
        SOFTMAX,
        "row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)",
        "row_sum = tl.where(row_sum < 0.0, 1.0, row_sum)",
        tests("softmax", "two_empty_states_merge_to_an_empty_state"),
    ),
    Mutation(
        "softmax: empty row subtracts infinities",
        SOFTMAX,
        'tl.where(row_max == float("-inf"), 0.0, row_max)',
        'tl.where(row_max == float("inf"), 0.0, row_max)',
        tests("softmax", "two_empty_states_merge_to_an_empty_state"),
    ),
    Mutation(
        "softmax: unit left out of the exponent's base",
        SOFTMAX,
        "base_log2 = base * unit_log2",
        "base_log2 = base * LOG2E",
        tests("softmax", "the_unit_of_the_scores_is_folded_into_the_exponentials"),
    ),
    Mutation(
        "softmax: lowest number scaled before it is subtracted",
        SOFTMAX,
        "tl.exp2((s - base[:, None]) * LOG2E)",
        "tl.exp2(s * LOG2E - base[:, None] * LOG2E)",
        tests("forward", "additive_mask[finfo.min-torch.float32-float32]"),
    ),
    Mutation(
        "softmax: rescaling in the wrong base",
        SOFTMAX,
        "rescale = tl.exp2((row_max - base) * LOG2E)",
        "rescale = tl.exp2(row_max - base)",
        tests("forward", "score[softcap-float32]"),
    ),
    # ---- The kernel
    Mutation(
        "forward: o not rescaled",
        FORWARD,
        "v, o * rescale[:, None], PRECISION)",
        "v, o, PRECISION)",
        tests("forward", "mask[causal-(37, 37)]"),
    ),
    Mutation(
        "forward: key head by remainder",
        FORWARD,
        "head_ptr(k_ptr, batch, head // group, k_strides)",
        "head_ptr(k_ptr, batch, head % group, k_strides)",
        tests("forward", "heads[6-3]"),
    ),
    Mutation(
        "forward: value head of the wrong group",
        FORWARD,
        "head_ptr(v_ptr, batch, head // group, v_strides)",
        "head_ptr(v_ptr, batch, head % (q_heads // group), v_strides)",
        tests("forward", "heads[6-2]"),
    ),
    Mutation(
        "forward: values with the strides of keys",
        FORWARD,
        "head_ptr(v_ptr, batch, head // group, v_strides)",
        "head_ptr(v_ptr, batch, head // group, k_strides)",
        tests("forward", "dims[40-smaller]"),
    ),
    Mutation(
        "forward: batch taken for head",
        FORWARD,
        "head = (program // q_tiles) % q_heads",
        "head = program // q_tiles // q_heads",
        tests("forward", "heads[3-3]"),
    ),
    Mutation(
        "forward: masks asked about rows that are not there",
        FORWARD,
        "row = tl.minimum(q_idx, q_len - 1)",
        "row = q_idx",
        tests("forward", "mask[scattered_documents-(37, 37)]", "mask[intervals-(19, 45)]"),
    ),
    Mutation(
        "forward: scores asked about keys that are not there",
        FORWARD,
        "kv_row = tl.minimum(kv_idx, kv_len - 1)",
        "kv_row = kv_idx",
        tests("forward", "score[bias_modifier-float32]", "score[bias_modifier-bfloat16]"),
    ),
    Mutation(
        "forward: keys loaded beyond the last",
        FORWARD,
        "kv_mask = (kv_idx >= start) & (kv_idx < stop)",
        "kv_mask = kv_idx >= start",
        tests("forward", "mask[causal-(37, 37)]"),
    ),
    Mutation(
        "forward: padding on the left loaded",
        FORWARD,
        "kv_mask = (kv_idx >= start) & (kv_idx < stop)",
        "kv_mask = kv_idx < stop",
        tests("data", "unseen_keys_and_values_have_no_influence[left padding-torch.float32]"),
    ),
    Mutation(
        "forward: value of a key that no row sees",
        FORWARD,
        "v = tl.where(seen[:, None], v, tl.zeros_like(v))",
        "v = tl.where(seen[:, None], v, v)",
        tests("data", "unseen_keys_and_values_have_no_influence[columns-torch.float32]"),
    ),
    Mutation(
        "forward: one cut tile too few",
        FORWARD,
        "tiles = last - first - tiles",
        "tiles = tl.maximum(last - first - tiles, 1) - 1",
        tests("intervals", "the_kernel_visits_the_tiles_of_the_mask_and_no_other[window]"),
    ),
    Mutation(
        "forward: cut tiles do not skip the full ones",
        FORWARD,
        "tl.where(tile < full_first, tile, tile + (full_last - full_first))",
        "tile",
        tests("intervals", "the_kernel_visits_the_tiles_of_the_mask_and_no_other[causal]"),
    ),
    Mutation(
        "forward: full tiles counted from the first tile",
        FORWARD,
        "kv_idx = (full_first + step) * TILE_KV",
        "kv_idx = (first + step) * TILE_KV",
        tests("intervals", "the_kernel_visits_the_tiles_of_the_mask_and_no_other[window both ways]"),
    ),
    Mutation(
        "forward: sink has a value",
        FORWARD,
        "sink_o = tl.zeros_like(o)",
        "sink_o = tl.zeros_like(o) + 1.0",
        tests("forward", "rows_without_a_key[float32]"),
    ),
    Mutation(
        "forward: sink of the first head for all",
        FORWARD,
        "head.to(tl.int64) * sink_stride",
        "0 * sink_stride",
        tests("forward", "rows_without_a_key[float32]"),
    ),
    Mutation(
        "forward: last row written twice",
        FORWARD,
        "store_tile(out_head_ptr, out, q_idx, q_idx < q_len,",
        "store_tile(out_head_ptr, out, q_idx, q_idx <= q_len,",
        tests("forward", "mask[causal-(37, 37)]"),
    ),
    Mutation(
        "forward: lse rows counted in keys",
        FORWARD,
        "lse_row = (batch.to(tl.int64) * q_heads + head) * q_len",
        "lse_row = (batch.to(tl.int64) * q_heads + head) * kv_len",
        tests("forward", "mask[causal-(19, 45)]"),
    ),
    Mutation(
        "forward: P not rounded",
        FORWARD,
        "matmul(round_to(p, v.dtype), v,",
        "matmul(p, v,",
        tests("compiled", "oldest_variants_compile_without_spills"),
    ),
    # ---- Addresses
    Mutation(
        "addressing: rows in 32 bits",
        ADDRESSING,
        "rows.to(tl.int64)[:, None] * strides[2]",
        "rows[:, None] * strides[2]",
        tests("addresses", "offsets_beyond_32_bits"),
    ),
    Mutation(
        "addressing: row and dim strides exchanged",
        ADDRESSING,
        "rows.to(tl.int64)[:, None] * strides[2] + columns.to(tl.int64)[None, :] * strides[3]",
        "rows.to(tl.int64)[:, None] * strides[3] + columns.to(tl.int64)[None, :] * strides[2]",
        tests("forward", "layout[contiguous_layout-float32]"),
    ),
    Mutation(
        "addressing: innermost dimension taken as contiguous",
        ADDRESSING,
        "columns.to(tl.int64)[None, :] * strides[3]",
        "columns.to(tl.int64)[None, :]",
        tests("forward", "layout[inner_strided_layout-float32]"),
    ),
    Mutation(
        "addressing: one column too many loaded",
        ADDRESSING,
        "return tl.load(ptrs, mask=row_mask[:, None] & (columns < DIM)[None, :], other=0.0)",
        "return tl.load(ptrs, mask=row_mask[:, None] & (columns <= DIM)[None, :], other=0.0)",
        tests("forward", "dims[20-equal]"),
    ),
    Mutation(
        "addressing: padding columns stored",
        ADDRESSING,
        "mask = row_mask[:, None] & (columns < DIM)[None, :]",
        "mask = row_mask[:, None] & (columns < DIM_TILE)[None, :]",
        tests("forward", "dims[20-equal]"),
    ),
    Mutation(
        "addressing: masked lanes left undefined",
        ADDRESSING,
        "return tl.load(ptrs, mask=row_mask[:, None], other=0.0)",
        "return tl.load(ptrs, mask=row_mask[:, None])",
        tests("forward", "mask[causal-(37, 37)]"),
    ),
    # ---- Ranges of tiles
    Mutation(
        "intervals: range one tile too short",
        INTERVALS,
        "last = tl.maximum(tl.cdiv(stop, TILE_KV), first)",
        "last = tl.maximum(stop // TILE_KV, first)",
        RANGES,
    ),
    Mutation(
        "intervals: full range one tile too long",
        INTERVALS,
        "full_last = tl.minimum(tl.min(tl.where(whole & sees, hi, 0)) // TILE_KV, last)",
        "full_last = tl.minimum(tl.cdiv(tl.min(tl.where(whole & sees, hi, 0)), TILE_KV), last)",
        RANGES,
    ),
    Mutation(
        "intervals: full range starts too early",
        INTERVALS,
        "full_first = tl.maximum(tl.cdiv(tl.max(lo), TILE_KV), first)",
        "full_first = tl.maximum(tl.max(lo) // TILE_KV, first)",
        RANGES,
    ),
    Mutation(
        "intervals: rows that see nothing have full tiles",
        INTERVALS,
        "tl.where(whole & sees, hi, 0)",
        "tl.where(whole, hi, 0)",
        RANGES,
    ),
    Mutation(
        "intervals: full tiles skip a keep function",
        INTERVALS,
        "whole = whole & (q_idx < 0)",
        "whole = whole & (q_idx >= 0)",
        tests("intervals", "intervals_intersect[True]"),
    ),
    Mutation(
        "intervals: union in place of intersection",
        INTERVALS,
        "hi = tl.minimum(hi, mask_hi)",
        "hi = tl.maximum(hi, mask_hi)",
        tests("intervals", "intervals_intersect[False]"),
    ),
    Mutation(
        "intervals: one key too many in a cut tile",
        INTERVALS,
        "(kv_idx[None, :] < hi[:, None])",
        "(kv_idx[None, :] <= hi[:, None])",
        tests("forward", "mask[causal-(37, 37)]"),
    ),
    Mutation(
        "intervals: keep asked about keys that are not there",
        INTERVALS,
        "valid_idx = tl.minimum(kv_idx, kv_len - 1)",
        "valid_idx = kv_idx",
        tests("forward", "mask[scattered_documents-(37, 37)]"),
    ),
    # ---- Masks
    Mutation(
        "causal: diagonal left out",
        MASKS,
        "return q_idx * 0, q_idx + args[0] + 1, q_idx >= 0",
        "return q_idx * 0, q_idx + args[0], q_idx >= 0",
        tests("forward", "mask[causal-(37, 37)]"),
    ),
    Mutation(
        "causal: corners exchanged",
        PROBLEM,
        'if align == "bottom_right" else 0',
        'if align != "bottom_right" else 0',
        tests("forward", "mask[causal-(19, 45)]"),
    ),
    Mutation(
        "window: one key too few on the left",
        MASKS,
        "return q_idx + shift - left, q_idx",
        "return q_idx + shift - left + 1, q_idx",
        tests("forward", "all_interval_masks_at_once[float32]"),
    ),
    Mutation(
        "prefix: causal inside the prefix",
        MASKS,
        "tl.maximum(q_idx + shift + 1, row_length(batch, length_args))",
        "tl.minimum(q_idx + shift + 1, row_length(batch, length_args))",
        tests("forward", "mask[prefix-(37, 37)]"),
    ),
    Mutation(
        "padding: sides exchanged",
        MASKS,
        'interval = padding_right_interval if self.side == "right"',
        'interval = padding_right_interval if self.side == "left"',
        tests("forward", "mask[right_padding-(37, 37)]"),
    ),
    Mutation(
        "padding: first sequence's length for all",
        MASKS,
        "batch.to(tl.int64) * length_args[1]",
        "0 * length_args[1]",
        tests("forward", "mask[left_padding-(37, 37)]"),
    ),
    Mutation(
        "rows: end read with the strides of start",
        MASKS,
        "tl.load(end_ptr + b * end_strides[0]",
        "tl.load(end_ptr + b * start_strides[0]",
        tests("forward", "every_tensor_may_be_strided"),
    ),
    Mutation(
        "bool mask: row and key strides exchanged",
        MASKS,
        "q_idx.to(tl.int64) * strides[2] + kv_idx.to(tl.int64) * strides[3]) != 0",
        "q_idx.to(tl.int64) * strides[3] + kv_idx.to(tl.int64) * strides[2]) != 0",
        tests("forward", "heads[3-3]"),
    ),
    Mutation(
        "documents: hull one key too short",
        DOCUMENTS,
        "stop = order.gather(1, (end - 1).clamp(min=0)) + 1",
        "stop = order.gather(1, (end - 1).clamp(min=0))",
        tests("intervals", "document_hulls"),
    ),
    Mutation(
        "documents: interrupted ones taken as whole",
        DOCUMENTS,
        "stop - first == count",
        "stop - first >= count",
        tests("intervals", "document_hulls"),
    ),
    # ---- Scores
    Mutation(
        "softcap: not scaled back",
        SCORES,
        "return cap * tanh(s / cap)",
        "return tanh(s / cap)",
        tests("forward", "score[softcap-float32]"),
    ),
    Mutation(
        "tanh: exponential in the wrong base",
        SCORES,
        "tl.exp2(tl.abs(x) * (-2.0 * LOG2E))",
        "tl.exp2(tl.abs(x) * -2.0)",
        tests("numerics", "tanh"),
    ),
    Mutation(
        "alibi: distance from the wrong corner",
        SCORES,
        "tl.abs(kv_idx - q_idx - shift).to(tl.float32)",
        "tl.abs(kv_idx - q_idx).to(tl.float32)",
        tests("forward", "score[alibi-float32]", "score[alibi-float16]", "score[alibi-bfloat16]"),
    ),
    Mutation(
        "relative position: table read one off",
        SCORES,
        "head.to(tl.int64) * (2 * max_distance + 1) + max_distance",
        "head.to(tl.int64) * (2 * max_distance) + max_distance",
        tests("forward", "score[relative_position-float32]"),
    ),
    Mutation(
        "bias: row and key strides exchanged",
        SCORES,
        "bias = tl.load(ptr + q_idx.to(tl.int64) * strides[2] + kv_idx.to(tl.int64) * strides[3])",
        "bias = tl.load(ptr + q_idx.to(tl.int64) * strides[3] + kv_idx.to(tl.int64) * strides[2])",
        tests("forward", "bias_comes_after_modifiers_and_before_the_mask"),
    ),
    Mutation(
        "bias: half precision not widened",
        SCORES,
        "return s + widen(bias)",
        "return s + bias.to(tl.int16, bitcast=True).to(tl.float32)",
        tests("numerics", "half_precision_parameters_are_widened_before_use[bias-torch.bfloat16]"),
    ),
    Mutation(
        "bias: before the modifiers",
        API,
        "(*as_scores(score), Bias(bias))",
        "(Bias(bias), *as_scores(score))",
        tests("forward", "bias_comes_after_modifiers_and_before_the_mask"),
    ),
    Mutation(
        "scale: applied twice where modifiers follow",
        SIMILARITY,
        "return (BoundScore(scale_score, (float(scale),)),), None",
        "return (BoundScore(scale_score, (float(scale),)),), float(scale)",
        tests("forward", "scale[0.7-dot]"),
    ),
    Mutation(
        "scale: a negative one folded into the exponentials",
        SIMILARITY,
        "not fp32.tiny <= scale <= fp32.max",
        "not scale <= fp32.max",
        tests("forward", "scale[-0.7-dot]"),
    ),
    Mutation(
        "scale: not the root of head_dim",
        SIMILARITY,
        "1.0 / math.sqrt(head_dim)",
        "1.0 / head_dim",
        tests("forward", "similarity[scaled_dot-float32]"),
    ),
    Mutation(
        "cosine: key head by remainder",
        SIMILARITY,
        "head // (q_heads // kv_heads)",
        "head % kv_heads",
        tests("forward", "similarity[cosine-float32]"),
    ),
    # ---- Number formats
    Mutation(
        "bfloat16: ties away from zero",
        NUMERICS,
        "0x7FFF + ((bits >> 16) & 1)",
        "0x8000",
        tests("numerics", "bfloat16_rounds_to_nearest_even"),
    ),
    Mutation(
        "fp32: tf32 unasked",
        NUMERICS,
        'torch.get_float32_matmul_precision() == "highest"',
        'torch.get_float32_matmul_precision() != "medium"',
        tests("numerics", "float32_matmuls_follow_pytorchs_precision"),
    ),
    # ---- The host
    Mutation(
        "host: group is the number of key heads",
        FORWARD,
        "group=shape.group",
        "group=shape.kv_heads",
        tests("forward", "heads[6-2]"),
    ),
    Mutation(
        "host: masks with gaps taken as without",
        API,
        "has_gaps=any(mask.has_gaps for mask in request.masks)",
        "has_gaps=all(mask.has_gaps for mask in request.masks[:1])",
        tests("data", "unseen_keys_and_values_have_no_influence[several-torch.float32]"),
    ),
    Mutation(
        "sdpa: causal to the bottom right",
        API,
        'mask=Causal("top_left") if is_causal',
        "mask=Causal() if is_causal",
        tests("sdpa", "causal_is_aligned_to_the_top_left[(5, 7)]"),
    ),
    Mutation(
        "tiles: shared memory or registers, not both",
        TILES,
        "        and accumulator_registers(tile, arch, dim) <= budget",
        "        or accumulator_registers(tile, arch, dim) <= budget",
        tests("compiled", "chips_that_the_table_does_not_list_get_a_tile_that_fits"),
    ),
    # ---- The contract
    Mutation(
        "checks: heads without a whole ratio",
        CHECKS,
        "q_heads % kv_heads == 0",
        "q_heads >= kv_heads",
        tests("checks", f"{RULES}[heads_have_a_whole_ratio-q_heads=3]"),
    ),
    Mutation(
        "checks: values shorter than keys",
        CHECKS,
        'return None if k == v else f"lengths k:',
        'return None if k >= v else f"lengths k:',
        tests("checks", f"{RULES}[kv_lengths_agree-k: 7]"),
    ),
    Mutation(
        "checks: infinite scale",
        CHECKS,
        "abs(r.scale) <= FINITE",
        "r.scale == r.scale",
        tests("checks", f"{RULES}[scale_is_a_number-scale=inf]"),
    ),
    Mutation(
        "checks: a rule never asked",
        CHECKS,
        "    masks_and_scores_fit,\n",
        "",
        tests("checks", "every_rule_has_a_case"),
    ),
    Mutation(
        "checks: gradient of a bias silently lost",
        CHECKS,
        "for name, tensor in {**r.qkv(), **r.other_tensors()}.items():",
        "for name, tensor in r.qkv().items():",
        tests("checks", RULES),
    ),
)
