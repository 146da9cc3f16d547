"""The planted bugs that `harness.mutate` tries, each with tests that must notice it.

Every one of them is a mistake that attention kernels have shipped with, or could have. Tests are chosen
narrow, so that a run takes seconds.
"""

from __future__ import annotations

from .mutation import Mutation, tests
from .mutations_backward import MUTATIONS as BACKWARD_MUTATIONS
from .mutations_bench import MUTATIONS as BENCH_MUTATIONS
from .mutations_blocks import MUTATIONS as BLOCKS_MUTATIONS
from .mutations_compat import MUTATIONS as COMPAT_MUTATIONS
from .mutations_context_parallel import MUTATIONS as CONTEXT_PARALLEL_MUTATIONS
from .mutations_copies import MUTATIONS as COPIES_MUTATIONS
from .mutations_distributed import MUTATIONS as DISTRIBUTED_MUTATIONS
from .mutations_drop_in import MUTATIONS as DROP_IN_MUTATIONS
from .mutations_flash_impl import MUTATIONS as FLASH_IMPL_MUTATIONS
from .mutations_float64 import MUTATIONS as FLOAT64_MUTATIONS
from .mutations_fp8 import MUTATIONS as FP8_MUTATIONS
from .mutations_fp8_tools import MUTATIONS as FP8_TOOLS_MUTATIONS
from .mutations_hopper import MUTATIONS as HOPPER_MUTATIONS
from .mutations_hopper_backward import MUTATIONS as HOPPER_BACKWARD_MUTATIONS
from .mutations_host import MUTATIONS as HOST_MUTATIONS
from .mutations_ladder import MUTATIONS as LADDER_MUTATIONS
from .mutations_nn import MUTATIONS as NN_MUTATIONS
from .mutations_one_walk import MUTATIONS as ONE_WALK_MUTATIONS
from .mutations_pieces import MUTATIONS as PIECES_MUTATIONS
from .mutations_planner import MUTATIONS as PLANNER_MUTATIONS
from .mutations_positions import MUTATIONS as POSITIONS_MUTATIONS
from .mutations_reference import MUTATIONS as REFERENCE_MUTATIONS
from .mutations_rows import MUTATIONS as ROWS_MUTATIONS
from .mutations_second import MUTATIONS as SECOND_MUTATIONS
from .mutations_sharded import MUTATIONS as SHARDED_MUTATIONS
from .mutations_show import MUTATIONS as SHOW_MUTATIONS
from .mutations_space import MUTATIONS as SPACE_MUTATIONS
from .mutations_statistics import MUTATIONS as STATISTICS_MUTATIONS
from .mutations_tools import MUTATIONS as TOOLS_MUTATIONS
from .mutations_transformers import MUTATIONS as TRANSFORMERS_MUTATIONS
from .mutations_watch import MUTATIONS as WATCH_MUTATIONS

ADDRESSING = "kernels/tilewise/parts/addressing.py"
ALIBI = "kernels/tilewise/parts/scores/alibi.py"
API = "kernels/tilewise/api.py"
BIAS = "kernels/tilewise/parts/scores/bias.py"
BIND = "kernels/tilewise/plan/bind.py"
CALL = "kernels/tilewise/kernels/call.py"
CAUSAL = "kernels/tilewise/parts/masks/causal.py"
CHECKS = "kernels/tilewise/plan/checks.py"
DENSE = "kernels/tilewise/parts/masks/dense.py"
DESCRIBED = "kernels/tilewise/parts/described.py"
DOCUMENTS = "kernels/tilewise/parts/masks/documents.py"
FORWARD = "kernels/tilewise/kernels/forward.py"
IMPLEMENTATION = "kernels/tilewise/plan/implementation.py"
INTERVALS = "kernels/tilewise/parts/intervals.py"
LENGTHS = "kernels/tilewise/parts/masks/lengths.py"
MASKS_INTERVALS = "kernels/tilewise/parts/masks/intervals.py"
NUMERICS = "kernels/tilewise/parts/numerics.py"
OPTIONS = "kernels/tilewise/plan/rules/options.py"
PADDING = "kernels/tilewise/parts/masks/padding.py"
PLAIN = "kernels/tilewise/pytorch/plain.py"
PREFIX = "kernels/tilewise/parts/masks/prefix.py"
RELATIVE_POSITION = "kernels/tilewise/parts/scores/relative_position.py"
REQUEST = "kernels/tilewise/plan/request.py"
SHAPE = "kernels/tilewise/parts/shape.py"
SIMILARITY = "kernels/tilewise/parts/similarity.py"
SOFTCAP = "kernels/tilewise/parts/scores/softcap.py"
SOFTMAX = "kernels/tilewise/parts/softmax.py"
TENSORS = "kernels/tilewise/plan/rules/tensors.py"
TILE = "kernels/tilewise/kernels/tile.py"
SDPA = "kernels/tilewise/scaled_dot_product.py"
SEQUENCES = "kernels/tilewise/parts/sequences.py"
WALK = "kernels/tilewise/kernels/walk.py"
WINDOW = "kernels/tilewise/parts/masks/window.py"


GROUPINGS = tests("softmax", "every_grouping_and_order_gives_the_softmax")
RANGES = tests("intervals", "kv_range_visits_what_is_needed_once")
RULES = "a_broken_rule_raises_and_says_why"

# Three or four lines a bug: its name and file; the code; the code with the bug; the tests.
# fmt: off
MUTATIONS = (
    # ---- The softmax state
    Mutation("softmax: maximum not updated", SOFTMAX,
             "return new_max, row_sum * rescale", "return row_max, row_sum * rescale",
             GROUPINGS),
    Mutation("softmax: sum not rescaled", SOFTMAX,
             "row_sum * rescale + tl.sum(p, 1)", "row_sum + tl.sum(p, 1)",
             GROUPINGS),
    Mutation("softmax: merge forgets to rescale o", SOFTMAX,
             "o_a * a[:, None] + o_b * b[:, None]", "o_a + o_b * b[:, None]",
             GROUPINGS),
    Mutation("softmax: lse in base 2", SOFTMAX,
             "row_max + sum_log2 * LN2", "row_max + sum_log2",
             tests("softmax", "lse_is_the_natural_logarithm")),
    Mutation("softmax: lse mixes two bases", SOFTMAX,
             "row_max + sum_log2 * LN2", "(row_max + sum_log2) * LN2",
             GROUPINGS),
    Mutation("softmax: empty row divides by 0", SOFTMAX,
             "row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)",
             "row_sum = tl.where(row_sum < 0.0, 1.0, row_sum)",
             tests("softmax", "two_empty_states_merge_to_an_empty_state")),
    Mutation("softmax: empty row subtracts infinities", SOFTMAX,
             'tl.where(row_max == float("-inf"), 0.0, row_max)',
             'tl.where(row_max == float("inf"), 0.0, row_max)',
             tests("softmax", "two_empty_states_merge_to_an_empty_state")),
    Mutation("softmax: unit left out of the exponent's base", SOFTMAX,
             "base_log2 = base * unit_log2", "base_log2 = base * LOG2E",
             tests("softmax", "the_unit_of_the_scores_is_folded_into_the_exponentials")),
    Mutation("softmax: lowest number scaled before it is subtracted", SOFTMAX,
             "tl.exp2((s - base[:, None]) * LOG2E)", "tl.exp2(s * LOG2E - base[:, None] * LOG2E)",
             tests("forward", "additive_mask[finfo.min-torch.float32-float32]")),
    Mutation("softmax: rescaling in the wrong base", SOFTMAX,
             "rescale = tl.exp2((row_max - base) * LOG2E)", "rescale = tl.exp2(row_max - base)",
             tests("forward", "score[alibi-float32]")),
    # ---- The kernel
    Mutation("forward: o not rescaled", FORWARD,
             "v, scaled(o, rescale[:, None]), PRECISION)", "v, o, PRECISION)",
             tests("forward", "mask[causal-(37, 37)]")),
    Mutation("forward: key head by remainder", FORWARD,
             "k_copy_2), kv_place, kv_head,", "k_copy_2), kv_place, head % group,",
             tests("sdpa", "grouped_heads[()-(9, 3)]")),
    Mutation("forward: value head of the wrong group", FORWARD,
             "v_copy_2), kv_place, kv_head,",
             "v_copy_2), kv_place, head % (q_heads // group),",
             tests("sdpa", "grouped_heads[()-(6, 2)]")),
    Mutation("forward: values with the strides of keys", CALL,
             "call.k.stride(), call.v.stride()),", "call.k.stride(), call.k.stride()),",
             tests("shapes", "dims[40-smaller]")),
    Mutation("forward: batch taken for head", WALK,
             "head = (program // tiles) % q_heads", "head = program // tiles // q_heads",
             tests("forward", "mask[causal-(37, 37)]")),
    Mutation("forward: masks asked about rows that are not there", SEQUENCES,
             "row = tl.minimum(q_idx, q_len - 1)", "row = q_idx",
             tests("forward", "mask[scattered_documents-(37, 37)]", "mask[intervals-(19, 45)]")),
    Mutation("forward: scores asked about keys that are not there", WALK,
             "return kv_start, kv_idx, tl.minimum(kv_idx, kv_len - 1)", "return kv_start, kv_idx, kv_idx",
             tests("forward", "score[bias_modifier-float32]", "score[bias_modifier-bfloat16]")),
    Mutation("forward: keys loaded beyond the last", WALK,
             "(kv_idx >= span[0]) & (kv_idx < span[1])", "kv_idx >= span[0]",
             tests("forward", "mask[causal-(37, 37)]")),
    Mutation("forward: padding on the left loaded", WALK,
             "(kv_idx >= span[0]) & (kv_idx < span[1])", "kv_idx < span[1]",
             tests("data", "unseen_keys_and_values_have_no_influence[left padding-torch.float32]")),
    Mutation("forward: value of a key that no row sees", FORWARD,
             "v = where_rows(seen, v)", "v = v",
             tests("data", "unseen_keys_and_values_have_no_influence[columns-torch.float32]")),
    Mutation("forward: one cut tile too few", WALK,
             "return last - first - (full_last - full_first)",
             "return tl.maximum(last - first - (full_last - full_first), 1) - 1",
             tests("intervals", "the_kernel_visits_the_tiles_of_the_mask_and_no_other[window]")),
    Mutation("intervals: cut tiles do not skip the full ones", INTERVALS,
             "tl.where(tile < full_first, tile, tile + (full_last - full_first))", "tile",
             tests("intervals", "the_kernel_visits_the_tiles_of_the_mask_and_no_other[causal]")),
    Mutation("forward: full tiles counted from the first tile", WALK,
             "        if IS_CUT:\n            return cut_tile(step, first, full_first, full_last)\n"
             "        else:\n            return full_first + step",
             "        if IS_CUT:\n            return cut_tile(step, first, full_first, full_last)\n"
             "        else:\n            return first + step",
             tests("intervals", "the_kernel_visits_the_tiles_of_the_mask_and_no_other[left padding]")),
    Mutation("forward: a sink takes nothing from o", FORWARD,
             "        o = scaled(o, rescale[:, None])\n", "",
             tests("forward", "rows_without_a_key[float32]")),
    Mutation("forward: sink of the first head for all", FORWARD,
             "head.to(tl.int64) * sink_stride", "0 * sink_stride",
             tests("forward", "rows_without_a_key[float32]")),
    Mutation("forward: last row written twice", FORWARD,
             "valid = q_idx < q_len", "valid = q_idx <= q_len",
             tests("forward", "mask[causal-(37, 37)]")),
    Mutation("forward: lse rows counted in keys", FORWARD,
             "rows = rows_of(q_place, head, q_heads, q_rows)",
             "rows = rows_of(q_place, head, q_heads, kv_len)",
             tests("forward", "mask[causal-(19, 45)]")),
    Mutation("forward: P not rounded", FORWARD,
             "p = round_to(p, v[0].dtype)", "p = p",
             tests("compiled", "oldest_variants_compile_without_spills")),
    # ---- Addresses
    Mutation("addressing: rows in 32 bits", ADDRESSING,
             "rows.to(tl.int64)[:, None] * row_stride", "rows[:, None] * row_stride",
             tests("addresses", "offsets_beyond_32_bits")),
    Mutation("addressing: row and dim strides exchanged", ADDRESSING,
             "strides[2], strides[2], strides[3]", "strides[2], strides[3], strides[2]",
             tests("shapes", "layout[contiguous_layout-float32]")),
    Mutation("addressing: innermost dimension taken as contiguous", ADDRESSING,
             "row_stride + columns.to(tl.int64)[None, :] * dim_stride",
             "row_stride + columns.to(tl.int64)[None, :]",
             tests("shapes", "layout[inner_strided_layout-float32]")),
    Mutation("addressing: one column too many loaded", ADDRESSING,
             "return tl.load(ptrs, mask=row_mask[:, None] & (columns < DIM)[None, :], other=0.0)",
             "return tl.load(ptrs, mask=row_mask[:, None] & (columns <= DIM)[None, :], other=0.0)",
             tests("shapes", "dims[20-equal]")),
    Mutation("addressing: padding columns stored", ADDRESSING,
             "mask = row_mask[:, None] & (columns < DIM)[None, :]",
             "mask = row_mask[:, None] & (columns < DIM_TILE)[None, :]",
             tests("shapes", "dims[20-equal]")),
    Mutation("addressing: masked lanes left undefined", ADDRESSING,
             "return tl.load(ptrs, mask=row_mask[:, None], other=0.0)",
             "return tl.load(ptrs, mask=row_mask[:, None])",
             tests("forward", "mask[causal-(37, 37)]")),
    # ---- Ranges of tiles
    Mutation("intervals: range one tile too short", INTERVALS,
             "last = tl.maximum(tl.cdiv(stop, TILE_KV), first)",
             "last = tl.maximum(stop // TILE_KV, first)",
             RANGES),
    Mutation("intervals: full range one tile too long", INTERVALS,
             "full_last = tl.minimum(tl.min(tl.where(whole, hi, 0)) // TILE_KV, last)",
             "full_last = tl.minimum(tl.cdiv(tl.min(tl.where(whole, hi, 0)), TILE_KV), last)",
             RANGES),
    Mutation("intervals: full range starts too early", INTERVALS,
             "full_first = tl.maximum(tl.cdiv(tl.max(lo), TILE_KV), first)",
             "full_first = tl.maximum(tl.max(lo) // TILE_KV, first)",
             RANGES),
    Mutation("intervals: full tiles under a mask that is not whole", INTERVALS,
             "full_last = tl.minimum(tl.min(tl.where(whole, hi, 0))",
             "full_last = tl.minimum(tl.min(tl.where(sees, hi, 0))",
             RANGES),
    Mutation("intervals: full tiles skip a keep function", INTERVALS,
             "mask_whole = q_idx < 0", "mask_whole = q_idx >= 0",
             tests("intervals", "intervals_intersect[True]")),
    Mutation("intervals: union in place of intersection", INTERVALS,
             "hi = tl.minimum(hi, mask_hi)", "hi = tl.maximum(hi, mask_hi)",
             tests("intervals", "intervals_intersect[False]")),
    Mutation("intervals: one key too many in a cut tile", INTERVALS,
             "(kv_idx >= lo) & (kv_idx < hi)", "(kv_idx >= lo) & (kv_idx <= hi)",
             tests("forward", "mask[causal-(37, 37)]")),
    Mutation("intervals: keep asked about keys that are not there", INTERVALS,
             "valid_idx = tl.minimum(kv_idx, kv_len - 1)", "valid_idx = kv_idx",
             tests("forward", "mask[scattered_documents-(37, 37)]")),
    # ---- Masks
    Mutation("causal: diagonal left out", CAUSAL,
             "q_idx + row_shift(batch, args[0]) + 1, q_idx >= 0",
             "q_idx + row_shift(batch, args[0]), q_idx >= 0",
             tests("forward", "mask[causal-(37, 37)]")),
    Mutation("causal: corners exchanged", SHAPE,
             'return 0 if align == "top_left" else', 'return 0 if align != "top_left" else',
             tests("forward", "mask[causal-(19, 45)]")),
    Mutation("window: one key too few on the left", WINDOW,
             "return position - left, position", "return position - left + 1, position",
             tests("forward", "all_interval_masks_at_once[float32]")),
    Mutation("prefix: causal inside the prefix", PREFIX,
             "tl.maximum(position + 1, row_length(batch, length_args))",
             "tl.minimum(position + 1, row_length(batch, length_args))",
             tests("forward", "mask[prefix-(37, 37)]")),
    Mutation("padding: sides exchanged", PADDING,
             'interval = padding_right_interval if self.side == "right"',
             'interval = padding_right_interval if self.side == "left"',
             tests("forward", "mask[right_padding-(37, 37)]")),
    Mutation("padding: first sequence's length for all", LENGTHS,
             "batch.to(tl.int64) * length_args[1]", "0 * length_args[1]",
             tests("forward", "mask[left_padding-(37, 37)]")),
    Mutation("rows: end read with the strides of start", MASKS_INTERVALS,
             "end_ptr + b * end_strides[0]", "end_ptr + b * start_strides[0]",
             tests("shapes", "every_tensor_may_be_strided")),
    Mutation("bool mask: row and key strides exchanged", DENSE,
             "q_idx.to(tl.int64) * strides[2] + kv_idx.to(tl.int64) * strides[3]",
             "q_idx.to(tl.int64) * strides[3] + kv_idx.to(tl.int64) * strides[2]",
             tests("data", "unseen_keys_and_values_have_no_influence[columns-torch.float32]")),
    Mutation("documents: hull one key too short", DOCUMENTS,
             "stop = order.gather(1, (end - 1).clamp(min=0)) + 1",
             "stop = order.gather(1, (end - 1).clamp(min=0))",
             tests("intervals", "document_hulls")),
    Mutation("documents: interrupted ones taken as whole", DOCUMENTS,
             "stop - first == count", "stop - first >= count",
             tests("intervals", "document_hulls")),
    # ---- Scores
    Mutation("softcap: not scaled back", SOFTCAP,
             "return cap * tanh(s / cap)", "return tanh(s / cap)",
             tests("forward", "score[softcap-float32]")),
    Mutation("tanh: exponential in the wrong base", SOFTCAP,
             "tl.exp2(tl.abs(x) * (-2.0 * LOG2E))", "tl.exp2(tl.abs(x) * -2.0)",
             tests("numerics", "tanh")),
    Mutation("alibi: distance from the wrong corner", ALIBI,
             "distance = kv_idx - q_idx - row_shift(batch, shift_args)", "distance = kv_idx - q_idx",
             tests("shapes", "every_tensor_may_be_strided")),
    Mutation("relative position: table read one off", RELATIVE_POSITION,
             "head.to(tl.int64) * (2 * max_distance + 1) + max_distance",
             "head.to(tl.int64) * (2 * max_distance) + max_distance",
             tests("forward", "score[relative_position-float32]")),
    Mutation("bias: row and key strides exchanged", BIAS,
             "q_idx.to(tl.int64) * strides[2] + kv_idx.to(tl.int64) * strides[3]",
             "q_idx.to(tl.int64) * strides[3] + kv_idx.to(tl.int64) * strides[2]",
             tests("forward", "bias_comes_after_modifiers_and_before_the_mask")),
    Mutation("bias: half precision not widened", BIAS,
             "s + widen(load_pairs(ptrs, q_idx, kv_idx, limits, float(\"nan\")))",
             "s + load_pairs(ptrs, q_idx, kv_idx, limits, 0.0).to(tl.int16, bitcast=True).to(tl.float32)",
             tests("numerics", "half_precision_parameters_are_widened_before_use[bias-torch.bfloat16]")),
    Mutation("bias: before the modifiers", REQUEST,
             "(*as_scores(score), Bias(bias))", "(Bias(bias), *as_scores(score))",
             tests("nn", "mask_bias_and_score_reach_the_kernel")),
    Mutation("scale: applied twice where modifiers follow", SIMILARITY,
             'return Similarity((*own, Scale("scale", scale)), None)',
             'return Similarity((*own, Scale("scale", scale)), float(scale))',
             tests("forward", "scale[0.7-dot]")),
    Mutation("scale: a negative one folded into the exponentials", SIMILARITY,
             "not SMALLEST_UNIT <= scale <= LARGEST_UNIT", "not scale <= LARGEST_UNIT",
             tests("forward", "scale[-0.7-dot]")),
    Mutation("scale: not the root of head_dim", SIMILARITY,
             "1.0 / math.sqrt(head_dim)", "1.0 / head_dim",
             tests("sdpa", "causal_is_aligned_to_the_top_left[(5, 5)]")),
    Mutation("cosine: key head by remainder", SIMILARITY,
             "q_heads // group, head // group", "q_heads // group, head % (q_heads // group)",
             tests("forward", "similarity[cosine-float32]")),
    # ---- Number formats
    Mutation("bfloat16: ties away from zero", NUMERICS,
             "0x7FFF + ((bits >> 16) & 1)", "0x8000",
             tests("numerics", "bfloat16_rounds_to_nearest_even")),
    Mutation("the interpreter sums in fp32", NUMERICS,
             "tl.dot(a, b, out_dtype=tl.float64).to(tl.float32)",
             "tl.dot(a.to(tl.float32), b.to(tl.float32))",
             tests("numerics", "matmul_accumulates_in_float32[torch.float32]")),
    Mutation("fp32: tf32 unasked", NUMERICS,
             'torch.get_float32_matmul_precision() == "highest"',
             'torch.get_float32_matmul_precision() != "medium"',
             tests("numerics", "float32_matmuls_follow_pytorchs_precision")),
    # ---- The host
    Mutation("host: group is the number of key heads", CALL,
             "return shape.q_heads, shape.group,", "return shape.q_heads, shape.kv_heads,",
             tests("shapes", "heads[6-2]")),
    Mutation("host: NumPy warns of the lowest number", CALL,
             'np.errstate(over="ignore", invalid="ignore")', 'np.errstate(invalid="ignore")',
             tests("warnings", "a_bias_may_be_the_lowest_number[portable-dtype0]")),
    Mutation("host: NumPy warns of padding", CALL,
             'np.errstate(over="ignore", invalid="ignore")', 'np.errstate(over="ignore")',
             tests("warnings", "padding_may_hold_anything[inf-portable-dtype0]")),
    Mutation("host: NumPy warns of nothing at all", CALL,
             'np.errstate(over="ignore", invalid="ignore")', 'np.errstate(all="ignore")',
             tests("warnings", "other_warnings_come_through")),
    Mutation("host: masks with gaps taken as without", BIND,
             "has_gaps=any([mask.has_gaps for mask in request.masks])",
             "has_gaps=any([mask.has_gaps for mask in request.masks[:1]])",
             tests("data", "unseen_keys_and_values_have_no_influence[several-torch.float32]")),
    Mutation("sdpa: causal to the bottom right", SDPA,
             '= Causal("top_left")', "= Causal()",
             tests("sdpa", "causal_is_aligned_to_the_top_left[(5, 7)]")),
    Mutation("tiles: sizes that are no power of two", TILE,
             "if size < 16 or size & (size - 1):", "if size < 16:",
             tests("compiled", "a_tile_is_a_power_of_two")),
    # ---- Plain PyTorch
    Mutation("plain: causal handed over whatever its scale", PLAIN,
             "return True if request.scale is None or request.scale > 0 else None", "return True",
             tests("plain_fused", "the_definition_answers[causal, negative scale]")),
    Mutation("plain: keys behind the last row handed over", PLAIN,
             "if causal and shape.kv_len > shape.q_len:", "if False:",
             tests("plain_fused", "the_fused_kernel_answers[causal, more keys-torch.float32]")),
    Mutation("plain: causal of the wrong corner handed over", PLAIN,
             "elif first != 0:", "elif False:",
             tests("plain_fused", "the_definition_answers[causal, a cache]")),
    Mutation("plain: rows with gaps handed over", PLAIN,
             "return x if x.stride(3) == 1 else x.contiguous()", "return x",
             tests("plain_fused", "memory_layouts[gaps within a row]")),
    Mutation("plain: gradient of lse lost", PLAIN,
             "if do is not None and dlse is None and not", "if do is not None and not",
             tests("plain_fused", "one_tensor_for_q_k_and_v", "gradients_of_some_tensors[True-q]")),
    Mutation("plain: one tensor's gradient counted for q, k and v each", PLAIN,
             "q, k, v = (x.view_as(x) for x in (q, k, v))", "pass",
             tests("plain_fused", "one_tensor_for_q_k_and_v")),
    Mutation("plain: transforms and forward mode handed over", IMPLEMENTATION,
             "if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:", "if False:",
             tests("plain_fused", "forward_mode")),
    Mutation("plain: a compiled lse without gradient", PLAIN,
             "and return_lse and request.needs_gradient", "and False",
             tests("plain_fused", "compiled_lse_keeps_its_gradient")),
    Mutation("plain: every block at row 0", PLAIN,
             "row + block.q_start, key", "row, key",
             tests("plain_blocks", "blocks_of_any_number_of_rows[alibi-2]")),
    Mutation("plain: every block at key 0", PLAIN,
             "key + block.kv_start\n", "key\n",
             tests("plain_blocks", "blocks_of_any_number_of_rows[window-2]")),
    Mutation("plain: every block drops as the first", PLAIN,
             "seed.device, origin)", "seed.device, (0, 0, 0, 0))",
             tests("plain_blocks", "blocks_of_any_number_of_rows[dropout-2]")),
    Mutation("plain: the last key of a block forgotten", PLAIN,
             "int(keys[1][start:end].max())", "int(keys[1][start:end].min())",
             tests("plain_blocks", "blocks_of_any_number_of_rows[causal-2]")),
    # ---- The contract
    Mutation("checks: heads without a whole ratio", TENSORS,
             "q_heads % kv_heads == 0", "q_heads >= kv_heads",
             tests("checks", f"{RULES}[heads_have_a_whole_ratio-q_heads=3]")),
    Mutation("checks: values shorter than keys", TENSORS,
             'return None if k == v else f"lengths k:', 'return None if k >= v else f"lengths k:',
             tests("checks", f"{RULES}[kv_lengths_agree-k: 7]")),
    Mutation("checks: infinite scale", OPTIONS,
             "abs(r.scale) <= largest(r)", "r.scale == r.scale",
             tests("checks", f"{RULES}[scale_is_a_number-scale=inf]")),
    Mutation("checks: a rule never asked", CHECKS,
             "    (options.masks_and_scores_fit, SIZES),\n", "",
             tests("checks", "every_rule_has_a_case")),
    Mutation("checks: what follows from a mistake judged too", CHECKS,
             "if not unsure.isdisjoint(needs):", "if not unsure:",
             tests("why_not", "what_is_wrong_together_is_listed_together[sizes beside options]",
                   "what_is_wrong_together_is_listed_together[no tensor]")),
    Mutation("checks: a missing dimension ends the list", TENSORS,
             "    return replace(r, q=q, k=k, v=v)", "    return None",
             tests("why_not", "what_is_wrong_together_is_listed_together[a rank beside heads and a dtype]")),
    Mutation("api: unknown names let through", API,
             'refuse_unknown("attention", unknown)', "unknown.clear()",
             tests("remedies", "an_argument_that_it_does_not_have_is_told_what_it_is_here[is_causal]")),
    Mutation("hints: the usual layout taken for another", TENSORS,
             "if fits and k_heads > k_len", "if fits or k_heads > k_len",
             tests("remedies", "wrong_heads_of_the_usual_layout_are_not_taken_for_another")),
    Mutation("repr: an argument at its default", DESCRIBED,
             "is_same(value, parameter.default)", "is_same(value, UNKNOWN)",
             tests("repr", "what_holds_no_tensor_can_be_evaluated[Causal()]")),
    Mutation("checks: gradient of a bias silently lost", REQUEST,
             "or any([tensor.requires_grad for _, tensor in self.other_tensors])", "or False",
             tests("transforms", "second_order_of_one_tensor[bias]")),
    *BACKWARD_MUTATIONS,
    *COMPAT_MUTATIONS,
    *CONTEXT_PARALLEL_MUTATIONS,
    *COPIES_MUTATIONS,
    *FLASH_IMPL_MUTATIONS,
    *DISTRIBUTED_MUTATIONS,
    *DROP_IN_MUTATIONS,
    *FLOAT64_MUTATIONS,
    *FP8_MUTATIONS,
    *FP8_TOOLS_MUTATIONS,
    *HOPPER_MUTATIONS,
    *HOST_MUTATIONS,
    *HOPPER_BACKWARD_MUTATIONS,
    *LADDER_MUTATIONS,
    *NN_MUTATIONS,
    *ONE_WALK_MUTATIONS,
    *PIECES_MUTATIONS,
    *PLANNER_MUTATIONS,
    *POSITIONS_MUTATIONS,
    *REFERENCE_MUTATIONS,
    *ROWS_MUTATIONS,
    *SECOND_MUTATIONS,
    *SHARDED_MUTATIONS,
    *SHOW_MUTATIONS,
    *SPACE_MUTATIONS,
    *STATISTICS_MUTATIONS,
    *TOOLS_MUTATIONS,
    *TRANSFORMERS_MUTATIONS,
    *WATCH_MUTATIONS,
    *BENCH_MUTATIONS,
    *BLOCKS_MUTATIONS,
)
# fmt: on
